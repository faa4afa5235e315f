"""Twelve slides through `batch`, as typed: on a real Slurm, on local workers, through kills.

The slides are cut from real ones where these lie beside the checkout, else drawn. The model is a
small untrained net: what it draws depends on noise, place and seed, so equal bytes say something.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import psutil
import pytest
import torch

from wsi_stain.config import BundleSpec, NetSpec
from wsi_stain.files import sha256_file
from wsi_stain.geometry import Region, Scale
from wsi_stain.lock import OutputLock
from wsi_stain.manifest import RunManifest
from wsi_stain.slides.image import SlideSource
from wsi_stain.translate.bundle import save_nets
from wsi_stain.translate.networks import ScoreNet
from wsi_stain.write.validate import validate

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(9000)]

Pixels = npt.NDArray[np.uint8]
Write = Callable[..., Path]
Where = Literal["slurm", "local"]
Node = Any  # what the fixture `node` gives

CHECKOUT = Path(__file__).resolve().parents[2]
DEADLINE_S = 3000.0  # a busy machine is no failure
NET = NetSpec(channels=(16, 16), blocks=1)
# Slide, pixel size where the file has none, left and top of the part, px.
REAL_PARTS = (
    ("gastric_he_2.svs", None, 0, 0),
    ("gastric_he_2.svs", None, 1000, 200),
    ("gastric_he_2.svs", None, 300, 1100),
    ("tma_core_he.tif", 0.5, 400, 400),
    ("tma_core_he.tif", 0.5, 700, 200),
    ("tcga_no_mpp.svs", 0.5, 1500, 1200),
    ("tcga_no_mpp.svs", 0.5, 2600, 2000),
)
PART_UM = 110
LOCKED = "s3_test"
SOUND = {f"s{index}_test" for index in range(8)}
REASONS = {
    "cut_test": r"cut|truncated|cannot be (read|opened)",
    "empty_test": r"empty",
    "no_mpp_test": r"pixel size",
    "glass_test": r"No tissue",
}
RECIPE = """\
[tiles]
shard_tiles = 1
[sample]
steps = 2
guided = false
[cluster]
device = "cpu"
workers = 2
"""
SLURM = """\
executor = "slurm"
wait_s = 600
[cluster.slurm]
queue = "batch"
gres = "gpu:1"
cores = 1
memory_mb = 1500
walltime_min = 60
interface = "lo"
folder = "{folder}/shared"
scratch = "{folder}"
directives = ["--requeue"]
setup = ["export PYTHONPATH={checkout}"]
"""


@pytest.fixture(scope="module")
def slides(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    write_slide: Write,
    he_pixels: Pixels,
) -> Path:
    """Eight sound slides, two broken, one without a pixel size, one of glass."""
    folder = tmp_path_factory.mktemp("slides")
    try:
        real: Path | None = request.getfixturevalue("shared_data") / "slides"
    except pytest.skip.Exception:
        real = None
    parts = _real_parts(real) if real else _drawn_parts(he_pixels)
    for index, (pixels, mpp) in enumerate(parts):
        write_slide(folder / f"s{index}.tiff", pixels, mpp)
    if real:
        shutil.copyfile(real / "gastric_he_1.svs", folder / "s7.svs")  # the largest: begun first
    whole = (folder / "s0.tiff").read_bytes()
    (folder / "cut.tiff").write_bytes(whole[: len(whole) // 3])
    (folder / "empty.svs").write_bytes(b"")
    write_slide(folder / "no_mpp.tiff", he_pixels[300:520, 250:530], None)
    write_slide(folder / "glass.tiff", np.full((300, 300, 3), 243, np.uint8), 0.5)
    assert len([*folder.iterdir()]) == 12
    return folder


def _real_parts(folder: Path) -> Iterator[tuple[Pixels, float]]:
    for name, mpp, x_px, y_px in REAL_PARTS:
        with SlideSource.open(folder / name, mpp=mpp) as source:
            frame = Scale(1.0, source.mpp_l0, source.size_l0)
            side_px = round(PART_UM / source.mpp_l0)
            yield source.read_out(Region(x_px, y_px, side_px, side_px), frame), source.mpp_l0


def _drawn_parts(pixels: Pixels) -> Iterator[tuple[Pixels, float]]:
    for index in range(8):
        top_px, side_px = 250 + 30 * index, 260 + 20 * (index % 4)
        yield pixels[top_px : top_px + 300, 250 : 250 + side_px], 0.5


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    weights = ScoreNet(NET).state_dict()
    weights["tail.weight"] = 0.05 * torch.randn_like(weights["tail.weight"])
    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    spec = BundleSpec(name="tiny", marker="Test", tile_px=128, net=NET, start_image="stain")
    save_nets(folder, spec, {"score": weights})
    return folder


def command(slides: Path, bundle: Path, out: Path, where: Where) -> list[str]:
    """Write the recipe, and what a person would type."""
    recipe = out.with_suffix(".toml")
    slurm = SLURM.format(folder=out.parent, checkout=CHECKOUT) if where == "slurm" else ""
    recipe.write_text(RECIPE + slurm)
    words = ["batch", slides, "--out", out, "--recipe", recipe, "--bundle", bundle]
    words += ["--attempts", 2, "--retry-wait-s", 0.1, "--keep-store"]
    return [sys.executable, "-m", "wsi_stain", *map(str, words)]


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, cwd=CHECKOUT, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )


def digests(out: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(out.glob("*.ome.tiff"))}


def states(out: Path) -> dict[str, str]:
    raw = json.loads((out / "archive.json").read_text())
    return {slide["name"]: slide["state"] for slide in raw["slides"]}


def locked(out: Path) -> OutputLock:
    """Hold one slide as another live run does."""
    run_folder = out / f"{LOCKED}.run"
    run_folder.mkdir(parents=True)
    return OutputLock(run_folder / "lock")


def check_end(done: subprocess.CompletedProcess[str], out: Path) -> None:
    """Exit 9; five failures, each with its reason and what to type next; the rest is sound."""
    assert done.returncode == 9, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("wsi-stain: 5 of 12 slides failed"), last
    reasons = REASONS | {LOCKED: rf"Another run .*process {os.getpid()} on host"}
    raw = json.loads((out / "archive.json").read_text())
    failed = {slide["name"]: slide for slide in raw["slides"] if slide["state"] == "failed"}
    printed = re.sub(r"/(?:[^\s/']+/)+", "", done.stdout)  # commands to type name folders
    assert set(failed) == set(reasons)
    for name, slide in failed.items():
        assert re.search(reasons[name], slide["error"]), slide
        assert slide["next"]
        assert f"failed  {name}: {slide['error']}\n        next: {slide['next']}" in printed
    sound = SOUND - {LOCKED}
    assert {name for name, state in states(out).items() if state in ("done", "skipped")} == sound
    rows = list(csv.DictReader((out / "archive.csv").read_text().splitlines()))
    assert {row["name"]: row["state"] for row in rows} == states(out)
    pyramids = sorted(out.glob("*.ome.tiff"))
    assert {path.name.partition(".")[0] for path in pyramids} == sound
    assert all(validate(path).ok for path in pyramids)


# ---- kills ------------------------------------------------------------------------------------


def finished(out: Path) -> set[str]:
    paths = out.glob("*.run/manifest.json")
    records = {path.parent.stem: RunManifest.load(path).content.state for path in paths}
    return {name for name, state in records.items() if state == "finished"}


def shards(out: Path) -> dict[Path, int]:
    """Give the marker of each finished shard, of either step, and when it was written."""
    return {path: path.stat().st_mtime_ns for path in out.glob("*.run/store/done/*/*.json")}


def translated(out: Path) -> int:
    """Count translated shards of slides that are not finished."""
    ended = finished(out)
    return sum(
        path.parent.name == "ihc" and path.relative_to(out).parts[0][: -len(".run")] not in ended
        for path in shards(out)
    )


def workers_of(client: subprocess.Popen[str], where: Where) -> list[psutil.Process]:
    """List the processes that do the work: of Slurm's jobs, or below the client."""
    if where == "local":
        return list(psutil.Process(client.pid).children(recursive=True))
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if "distributed.cli.dask_worker" in (process.info["cmdline"] or [])
    ]


def kill_a_worker(node: Node, client: subprocess.Popen[str], where: Where) -> None:
    if where == "slurm":
        node.call("scancel", node.jobs()[0])
        return
    # The workers themselves are those that load the net; their parents watch over them.
    largest = max(workers_of(client, where), key=lambda process: process.memory_info().rss)
    largest.kill()


def strike(node: Node, words: list[str], out: Path, where: Where) -> dict[Path, int]:
    """Start the command; in the middle kill a worker, then the client; give what was finished."""
    with out.with_suffix(".log").open("w") as log:
        client = subprocess.Popen(words, cwd=CHECKOUT, stdout=log, stderr=log, text=True)
    try:
        wait_for(lambda: bool(finished(out)) and translated(out) > 0, client)
        kill_a_worker(node, client, where)
        seen = len(shards(out))
        wait_for(lambda: len(shards(out)) > seen + 2, client)
        workers = workers_of(client, where)
    finally:
        client.kill()
        client.wait()
    node.wait_until(lambda: not any(map(is_alive, workers)), "workers outlive their client")
    node.cancel_all()
    node.wait_until(lambda: node.jobs() == node.jobs("PD") == [], "jobs outlive the client")
    return shards(out)


def go_on(words: list[str], out: Path, kept: dict[Path, int]) -> None:
    """Type the same again: it ends as it should, and does nothing twice that was finished."""
    ended = finished(out)
    pyramids = {name: (out / f"{name}.ome.tiff").stat().st_mtime_ns for name in ended}
    assert ended < SOUND
    check_end(run(words), out)
    after = shards(out)
    assert [path for path, time_ns in kept.items() if after[path] != time_ns] == []
    assert len(after) > len(kept), "there was something left to do"
    assert {name for name, state in states(out).items() if state == "skipped"} == ended
    assert {n: (out / f"{n}.ome.tiff").stat().st_mtime_ns for n in ended} == pyramids
    for name in ended:
        assert (out / "logs" / f"{name}.log").read_text().count("translate start") == 1


def test_slides_end_alike_on_local_workers_and_through_kills_on_slurm(
    node: Node, slides: Path, bundle: Path, tmp_path: Path
) -> None:
    local, disturbed = tmp_path / "local", tmp_path / "slurm"
    with locked(local):
        check_end(run(command(slides, bundle, local, "local")), local)
    words = command(slides, bundle, disturbed, "slurm")
    with locked(disturbed):
        kept = strike(node, words, disturbed, "slurm")
        go_on(words, disturbed, kept)
    assert digests(disturbed) == digests(local)
    node.wait_until(lambda: node.jobs() == [], "jobs outlive the run")


def test_kills_on_local_workers_cost_no_finished_work(
    node: Node, slides: Path, bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = command(slides, bundle, out, "local")
    with locked(out):
        go_on(words, out, strike(node, words, out, "local"))


def wait_for(moment: Callable[[], bool], client: subprocess.Popen[str]) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not moment():
        assert client.poll() is None, "the client ended before it was killed"
        assert time.monotonic() < end_s
        time.sleep(0.05)


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
