"""Kill, cut, fill the disk: the same command goes on to the same bytes, and nothing is torn."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pytest
import torch

from wsi_stain.config import BundleSpec, NetSpec, RunConfig, resolve_run_config
from wsi_stain.errors import DeviceError, DiskFullError, OutputError, PlanError
from wsi_stain.geometry import Scale, Size
from wsi_stain.layout import RunFiles
from wsi_stain.manifest import Event, RunManifest
from wsi_stain.pipeline import translate_slide
from wsi_stain.slides.plan import TileGrid
from wsi_stain.slides.store import PatchStore
from wsi_stain.translate.bundle import save_nets
from wsi_stain.translate.networks import ScoreNet
from wsi_stain.write.validate import validate

Pixels = npt.NDArray[np.uint8]
Write = Callable[..., Path]
CHECKOUT = Path(__file__).resolve().parents[1]
NET = NetSpec(channels=(16, 16), blocks=1)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained net: what it draws depends on noise, place and seed."""
    torch.manual_seed(0)
    weights = ScoreNet(NET).state_dict()
    weights["tail.weight"] = 0.05 * torch.randn_like(weights["tail.weight"])
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    spec = BundleSpec(name="tiny", marker="Test", tile_px=128, net=NET, start_image="stain")
    save_nets(folder, spec, {"score": weights})
    return folder


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory, write_slide: Write, he_pixels: Pixels) -> Path:
    """About 10 tiles of tissue."""
    path = tmp_path_factory.mktemp("slides") / "s.tiff"
    return write_slide(path, he_pixels[300:600, 250:650], 0.5)


def recipe(bundle: Path, executor: str = "serial") -> str:
    return (
        f'bundle = "{bundle}"\n[tiles]\nshard_tiles = 2\n[sample]\nsteps = 2\nguided = false\n'
        f'[cluster]\nexecutor = "{executor}"\ndevice = "cpu"\nworkers = 2\n'
    )


def settings(bundle: Path, folder: Path, **flags: Any) -> RunConfig:
    path = folder / "settings.toml"
    path.write_text(recipe(bundle))
    return resolve_run_config({k.replace("__", "."): v for k, v in flags.items()}, path)[0]


@pytest.fixture(scope="module")
def straight(bundle: Path, slide: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The pyramid of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("straight")
    return translate_slide(slide, folder, settings(bundle, folder)).files.output.read_bytes()


class Stop(Exception):
    """Ends a run in the middle, in this process."""


def stop_at(stage: str, kind: str) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        if (event.stage, event.kind) == (stage, kind):
            raise Stop

    return listen


def left_overs(out: Path) -> list[str]:
    """Name what no finished run leaves: work in progress, a store, a lock."""
    half = ("*.part", "*.partial", "store*", "lock", "unsound*")
    return sorted(path.name for pattern in half for path in out.rglob(pattern))


# ---- kill -9 ---------------------------------------------------------------------------------


def start(bundle: Path, slide: Path, folder: Path, executor: str) -> subprocess.Popen[str]:
    """Type the command in a real shell's stead."""
    path = folder / "r.toml"
    path.write_text(recipe(bundle, executor))
    command = ["translate", slide, "--out", folder / "out", "--recipe", path, "--quiet"]
    return subprocess.Popen(
        [sys.executable, "-m", "wsi_stain", *map(str, command)],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


MOMENTS: dict[str, Callable[[RunFiles], bool]] = {
    "store begun": lambda files: files.store.exists(),
    "reading": lambda files: any(files.store.glob("done/he/*.json")),
    "translating": lambda files: any(files.store.glob("done/ihc/*.json")),
    "writing": lambda files: Path(f"{files.output}.part").exists(),
    "named": lambda files: files.output.exists(),
}
QUICK = "translating"


@pytest.mark.parametrize(
    ("moment", "executor"),
    [
        (QUICK, "serial"),
        *[pytest.param(moment, "dask", marks=pytest.mark.slow) for moment in MOMENTS],
    ],
)
@pytest.mark.timeout(600)
def test_killed_run_goes_on_to_the_same_bytes(
    moment: str, executor: str, tmp_path: Path, bundle: Path, slide: Path, straight: bytes
) -> None:
    files = RunFiles.of(tmp_path / "out", slide, "Test")
    process = start(bundle, slide, tmp_path, executor)
    with process:
        while process.poll() is None and not MOMENTS[moment](files):
            time.sleep(0.002)
        workers = (
            psutil.Process(process.pid).children(recursive=True)
            if process.returncode is None
            else []
        )
        process.kill()
    assert process.returncode == -signal.SIGKILL, "it ended before the moment came"
    psutil.wait_procs(workers, timeout=60)
    if files.output.exists():
        assert files.output.read_bytes() == straight, "torn"
    if files.manifest.exists() and RunManifest.load(files.manifest).content.state == "finished":
        return
    with start(bundle, slide, tmp_path, executor) as again:
        _, err = again.communicate(timeout=500)
    assert (again.returncode, err) == (0, "")
    assert files.output.read_bytes() == straight
    assert left_overs(tmp_path / "out") == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_worker_is_replaced_and_nothing_changes(
    tmp_path: Path, bundle: Path, slide: Path, straight: bytes
) -> None:
    files = RunFiles.of(tmp_path / "out", slide, "Test")
    with start(bundle, slide, tmp_path, "dask") as process:
        while process.poll() is None and not MOMENTS["reading"](files):
            time.sleep(0.01)
        workers = [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if "forkserver" in " ".join(child.cmdline()) and child.ppid() != process.pid
        ]
        workers[0].kill()
        _, err = process.communicate(timeout=500)
    assert (process.returncode, err) == (0, "")
    assert files.output.read_bytes() == straight


def test_run_killed_after_its_output_got_its_name_goes_on(
    tmp_path: Path, bundle: Path, slide: Path, straight: bytes
) -> None:
    config = settings(bundle, tmp_path)
    with pytest.raises(Stop):
        translate_slide(slide, tmp_path, config, listener=stop_at("validate", "start"))
    other = settings(bundle, tmp_path, seed=1)
    with pytest.raises(OutputError, match="--overwrite"):
        translate_slide(slide, tmp_path, other)
    # Stopped once more, anywhere: the file from before is gone, or still known to be ours.
    for stage, kind in (("fit", "start"), ("validate", "start")):
        with pytest.raises(Stop):
            translate_slide(slide, tmp_path, config, listener=stop_at(stage, kind))
    result = translate_slide(slide, tmp_path, config)
    assert result.files.output.read_bytes() == straight
    with pytest.raises(OutputError, match="--overwrite"):
        translate_slide(slide, tmp_path, config)


# ---- what lies there from before -------------------------------------------------------------


def test_damaged_and_lost_shards_are_found_and_made_again(
    tmp_path: Path, bundle: Path, slide: Path, straight: bytes
) -> None:
    config = settings(bundle, tmp_path)
    with pytest.raises(Stop):
        translate_slide(slide, tmp_path, config, listener=stop_at("translate", "finish"))
    store = RunFiles.of(tmp_path, slide, "Test").store
    os.truncate(store / "he/c.0.0.0.0", 1000)
    (store / "he/c.1.0.0.0").unlink()
    with (store / "ihc/c.2.0.0.0").open("r+b") as file:
        file.write(bytes(500))
    (store / "done/ihc/000003.json").write_text("{")
    (store / "ihc/zarr.json").write_text("{}")
    result = translate_slide(slide, tmp_path, config)
    assert result.files.output.read_bytes() == straight


def test_run_that_goes_on_says_so(tmp_path: Path, bundle: Path, slide: Path) -> None:
    def said(heard: list[Event]) -> list[str]:
        return [event.text for event in heard if "are there already" in event.text]

    def listen(event: Event) -> None:
        heard.append(event)
        stop_at("translate", "finish")(event)

    config, heard = settings(bundle, tmp_path), list[Event]()
    with pytest.raises(Stop):
        translate_slide(slide, tmp_path, config, listener=listen)
    assert said(heard) == []
    (RunFiles.of(tmp_path, slide, "Test").store / "ihc/c.2.0.0.0").unlink()
    translate_slide(slide, tmp_path, config, listener=heard.append)
    assert said(heard) == ["5 of 6 shards are there already: it goes on"]


def test_left_overs_of_dead_runs_are_gone_in_the_end(
    tmp_path: Path, bundle: Path, slide: Path, straight: bytes
) -> None:
    files = RunFiles.of(tmp_path / "out", slide, "Test")
    files.discarded.mkdir(parents=True)
    for path in (
        files.discarded / "x",
        files.folder / ".manifest.json.99.abcd.part",
        Path(f"{files.output}.part"),
        files.unsound,
        files.he / ".overview.jpg.99.abcd.part",
        Path(f"{files.geojson}.99.part"),
        Path(f"{files.uncertainty}.part"),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    translate_slide(slide, tmp_path / "out", settings(bundle, tmp_path))
    assert files.output.read_bytes() == straight
    assert left_overs(tmp_path / "out") == []


@pytest.fixture
def grid() -> TileGrid:
    """Four tiles in two shards."""
    rc = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.int32)
    return TileGrid(Scale(1.0, 0.5, Size(100, 100)), 64, 16, 2, rc, np.ones(4, np.float32))


@pytest.mark.parametrize("lost", ["grid.json", "grid.npy", "he", "done", "ihc/zarr.json"])
def test_store_is_made_again_when_a_kill_left_any_part_of_it(
    lost: str, tmp_path: Path, grid: TileGrid
) -> None:
    store = PatchStore.create(tmp_path / "store", grid)
    for name in ("he", "ihc"):
        store.write(name, 0, np.full((2, 64, 64, 3), 7, np.uint8), "key")
    path = store.path / lost
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    (store.path / "grid.json.part").write_text("{")
    again = PatchStore.create(tmp_path / "store", grid)
    assert 0 in again.pending("he" if lost != "ihc/zarr.json" else "ihc", "key", verify=True)
    again.write("he", 0, np.full((2, 64, 64, 3), 9, np.uint8), "key")
    assert again.read("he", 0).max() == 9
    assert not list(store.path.rglob("*.part"))


# ---- the disk, the net -----------------------------------------------------------------------


@contextmanager
def largest_file_from(stage: str, kind: str, n_bytes: int) -> Iterator[Callable[[Event], None]]:
    """Give a listener: from an event on the kernel refuses larger files, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def listen(event: Event) -> None:
        if (event.stage, event.kind) == (stage, kind):
            resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))

    try:
        yield listen
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("stage", "kind", "n_bytes", "what"),
    [
        ("plan", "start", 2_000, "manifest"),
        ("fill", "start", 50_000, "of he"),
        ("translate", "finish", 30_000, "ome.tiff"),
    ],
)
def test_full_disk_is_told_and_the_run_goes_on_when_there_is_space(
    stage: str, kind: str, n_bytes: int, what: str, tmp_path: Path, bundle: Path, slide: Path
) -> None:
    config = settings(bundle, tmp_path)
    files = RunFiles.of(tmp_path / "out", slide, "Test")
    with (
        largest_file_from(stage, kind, n_bytes) as listen,
        pytest.raises(DiskFullError, match=r"written: .* \([\d,]+ bytes free\)") as caught,
    ):
        translate_slide(slide, tmp_path / "out", config, listener=listen)
    assert what in caught.value.message
    assert "same command" in caught.value.hint
    assert caught.value.exit_code == 8
    assert not files.output.exists()
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name.endswith(".part")]
    assert translate_slide(slide, tmp_path / "out", config).files.output.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 16 MB, where there may be one."""
    mount, umount, folder = shutil.which("mount"), shutil.which("umount"), tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or mount is None or umount is None:
        pytest.skip("only root can mount a small disk")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder]).returncode:
        pytest.skip("no mounts here")
    yield folder
    subprocess.run([umount, "-l", folder], check=True)


def fill_disk(folder: Path, room: int) -> None:
    """Write until the disk is full, then give some room back."""
    with (folder / "ballast").open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        file.truncate(max(0, file.tell() - room))


@pytest.mark.parametrize(
    ("stage", "kind", "room", "pyramid"),
    [
        ("fill", "start", 0, "ome-tiff"),
        ("fill", "advance", 60_000, "ome-tiff"),
        ("translate", "finish", 20_000, "ome-tiff"),
        ("translate", "finish", 20_000, "ome-zarr"),
    ],
)
def test_disk_that_is_full_for_real_tears_nothing(  # noqa: PLR0913 - fixtures
    small_disk: Path,
    stage: str,
    kind: str,
    room: int,
    pyramid: str,
    bundle: Path,
    slide: Path,
    straight: bytes,
) -> None:
    config = settings(bundle, small_disk.parent, write__format=pyramid)
    out = small_disk / "out"
    files = RunFiles.of(out, slide, "Test", pyramid)

    def fill_up(event: Event) -> None:
        if (event.stage, event.kind) == (stage, kind) and not (small_disk / "ballast").exists():
            fill_disk(small_disk, room)

    with pytest.raises(DiskFullError, match=r"written: .* \([\d,]+ bytes free\)") as caught:
        translate_slide(slide, out, config, listener=fill_up)
    assert str(out) in caught.value.message
    assert "same command" in caught.value.hint
    assert not files.output.exists()
    assert not list(out.rglob("*.part"))
    (small_disk / "ballast").unlink()
    result = translate_slide(slide, out, config)
    assert left_overs(out) == []
    if pyramid == "ome-tiff":
        assert result.files.output.read_bytes() == straight
    else:
        assert validate(result.files.output).ok


def test_disk_too_small_is_refused_before_any_work(
    small_disk: Path, bundle: Path, slide: Path
) -> None:
    fill_disk(small_disk, 100_000)
    with pytest.raises(PlanError, match="disk"):
        translate_slide(slide, small_disk / "out", settings(bundle, small_disk.parent))
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_file_system_that_holds_no_files_is_not_told_as_a_full_disk(
    bundle: Path, slide: Path, tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        translate_slide(slide, Path("/proc/out"), settings(bundle, tmp_path))


def test_net_that_gives_nan_is_named(tmp_path: Path, slide: Path) -> None:
    weights = ScoreNet(NET).state_dict()
    weights["tail.weight"] = torch.full_like(weights["tail.weight"], torch.nan)
    spec = BundleSpec(name="nan", marker="Test", tile_px=128, net=NET, start_image="stain")
    save_nets(tmp_path / "nan", spec, {"score": weights})
    with pytest.raises(DeviceError, match="net gave a value that is not finite") as caught:
        translate_slide(slide, tmp_path / "out", settings(tmp_path / "nan", tmp_path))
    assert caught.value.exit_code == 7
    assert not list((tmp_path / "out").glob("*.tiff*"))
