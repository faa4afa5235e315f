"""Damage inputs on purpose; each case must end as documented. ``make fuzz N=500 SEED=7``.

A case is a target and a seed, and runs the real command line in its own process, with limits of
time, memory and file size. It fails where the process hangs, dies, shows a traceback or more than
one line, ends with another exit code than the documented ones, changes its input, writes outside
of the output folder, or leaves a half-written pyramid. A run that goes on from a damaged run
folder must give the same bytes as an undisturbed one.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import tifffile
import torch

from wsi_stain import cli, planning, stages  # noqa: F401 - once here, not in each child
from wsi_stain.config import BundleSpec, NetSpec, WriteConfig, resolve_run_config
from wsi_stain.evaluate import report  # noqa: F401
from wsi_stain.geometry import Size
from wsi_stain.manifest import Event
from wsi_stain.pipeline import translate_slide
from wsi_stain.translate.bundle import save_nets
from wsi_stain.translate.networks import ScoreNet
from wsi_stain.write import validate  # noqa: F401
from wsi_stain.write.omezarr import write_omezarr

LIMIT_CPU_S = 60
LIMIT_S = 600.0  # of wall time, for what sleeps; generous, since the machine may be busy
EXTRA_BYTES = 3 * 2**30
LARGEST_FILE_BYTES = 2**29
MADE = (".ome.tiff", ".geojson")  # under their own names, and only by runs that end well
RECIPE = """bundle = "identity"
seed = 0
[slide]
cache_mb = 64
mpp = 0.5
[tiles]
overlap_px = 32
tissue_min_fraction = 0.02
mpp_tolerance = 0.1
shard_tiles = 4
mask_mpp = 8.0
[stain]
method = "macenko"
fit_pixels = 100000
[sample]
solver = "solver"
steps = 2
guided = false
batch_tiles = 4
[write]
quality = 90
subsampling = "4:2:0"
lossless = false
tile_px = 512
[cluster]
device = "cpu"
workers = 1
executor = "serial"
attempts = 1
"""


def _load(name: str) -> ModuleType:
    """Import a module that lies beside this one: the tests are no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


damage = _load("damage")


@dataclass(frozen=True)
class Target:
    """What is damaged, and what is then typed.

    Attributes
    ----------
    files
        Patterns in the case's folder; the seed chooses one file.
    spoil
        (rng, bytes) -> bytes.
    verbs
        Command lines; the seed chooses one.
    codes
        Exit codes that may come.
    same_bytes
        A good end must give the bytes of an undisturbed run.
    """

    files: tuple[str, ...]
    spoil: Callable[[random.Random, bytes], bytes]
    verbs: tuple[str, ...]
    codes: frozenset[int]
    same_bytes: bool = False
    needs: tuple[str, ...] = ("identity", "r.toml")


RUN = "--out out --recipe r.toml --json"
TRANSLATE = f"translate s.tiff {RUN}"
ZARR_VERBS = ("info z.ome.zarr", "plan z.ome.zarr --recipe r.toml", f"translate z.ome.zarr {RUN}")
TARGETS = {
    "tiff": Target(
        ("s.tiff", "s.svs", "s.ome.tiff", "strips.tiff"),
        damage.damage_tiff,
        ("info {}", "plan {} --recipe r.toml", f"translate {{}} {RUN}"),
        frozenset({0, 3, 4, 5, 8}),
    ),
    "tile": Target(
        ("s.tiff", "s.svs", "s.ome.tiff", "jpeg.svs"),
        damage.damage_tile,
        ("info {}", f"translate {{}} {RUN}", *[f"translate {{}} {RUN} --allow-missing"] * 2),
        frozenset({0, 3, 4}),
    ),
    "pyramid": Target(
        ("made.ome.tiff",), damage.damage_tiff, ("validate {} --json",), frozenset({0, 8}), needs=()
    ),
    "zarr": Target(
        ("z.ome.zarr/**/zarr.json",),
        damage.damage_json,
        (*ZARR_VERBS, "validate z.ome.zarr --json"),
        frozenset({0, 3, 4, 5, 8}),
    ),
    "chunk": Target(
        ("z.ome.zarr/*/c/**/*",),
        damage.damage_bytes,
        (*ZARR_VERBS, f"{ZARR_VERBS[-1]} --allow-missing"),
        frozenset({0, 3, 4, 5}),
    ),
    "recipe": Target(
        ("r.toml",),
        damage.damage_toml,
        (f"plan s.tiff {RUN.replace('--out out ', '')}", f"{TRANSLATE} --steps 1 --workers 1"),
        frozenset({0, 2, 3, 4, 5, 6}),
        needs=("identity", "s.tiff"),
    ),
    "spec": Target(
        ("identity/bundle.json", "tiny/bundle.json"),
        damage.damage_json,
        (f"{TRANSLATE} --bundle {{0.parent}}",),
        frozenset({0, 4, 5, 6, 8}),
        needs=("s.tiff", "r.toml"),
    ),
    "weights": Target(
        ("tiny/score.safetensors",),
        damage.damage_safetensors,
        (f"{TRANSLATE} --bundle tiny",),
        frozenset({0, 6, 7}),
        needs=("s.tiff", "r.toml", "tiny"),
    ),
    "store": Target(
        ("out/*.run/store/**/*",),
        damage.damage_bytes,
        (TRANSLATE,),
        frozenset({0}),
        same_bytes=True,
        needs=("s.tiff", "r.toml", "identity", "out"),
    ),
    "metadata": Target(
        ("out/*.run/store/**/*.json",),
        damage.damage_json,
        (TRANSLATE,),
        frozenset({0}),
        same_bytes=True,
        needs=("s.tiff", "r.toml", "identity", "out"),
    ),
    "manifest": Target(
        ("out/*.run/manifest.json",),
        damage.damage_json,
        (TRANSLATE, "report out"),
        frozenset({0, 8}),
        same_bytes=True,
        needs=("s.tiff", "r.toml", "identity", "out"),
    ),
}


# ---- sound files ----------------------------------------------------------------------------


class Stop(Exception):
    """Ends a run in the middle."""


def make_sound_files(folder: Path) -> None:
    """Write what cases start from: slides, bundles, a recipe, a pyramid, a stopped run."""
    pixels = draw_tissue()
    ome = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    aperio = "Aperio Image Library v11.2.1\n640x520 (256x256) RGB|AppMag = 20|MPP = 0.5000"
    write_slide(folder / "s.tiff", pixels, description="a test", metadata=None)
    write_slide(folder / "s.svs", pixels, description=aperio, metadata=None)
    write_slide(folder / "s.ome.tiff", pixels, metadata=ome, subifds=1)
    write_slide(
        folder / "jpeg.svs", pixels, description=aperio, metadata=None,
        compression="jpeg", compressionargs={"level": 90},
    )  # fmt: skip
    per_cm = (20_000, 20_000)
    tifffile.imwrite(
        folder / "strips.tiff", pixels, rowsperstrip=64, metadata=None,
        photometric="rgb", resolution=per_cm, resolutionunit="CENTIMETER",
    )  # fmt: skip
    (folder / "r.toml").write_text(RECIPE)
    identity = BundleSpec(name="identity", marker="Test", start_image="source")
    save_nets(folder / "identity", identity, {})
    net = NetSpec(channels=(16, 16), blocks=1)
    tiny = BundleSpec(name="tiny", marker="Test", tile_px=128, net=net, start_image="stain")
    torch.manual_seed(0)
    save_nets(folder / "tiny", tiny, {"score": ScoreNet(net).state_dict()})
    in_child(lambda: _make_runs(folder))


def write_slide(
    path: Path,
    pixels: Any,
    *,
    subifds: int | None = None,
    compression: str = "zlib",
    compressionargs: dict[str, int] | None = None,
    **tags: Any,
) -> None:
    """Write a tiled TIFF of two levels, 0.5 um/px."""
    with tifffile.TiffWriter(path) as tiff:
        for level in (0, 1):
            per_cm = 20_000 / 2**level
            tiff.write(
                pixels[:: 2**level, :: 2**level],
                tile=(256, 256),
                photometric="rgb",
                compression=compression,
                compressionargs=compressionargs,
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
                subfiletype=level,
                subifds=None if level else subifds,
                **(tags if level == 0 else {"metadata": None}),
            )


def draw_tissue() -> Any:
    """Draw a blob of pink and purple on glass, uint8 (520, 640, 3)."""
    rng = np.random.default_rng(1)
    ys, xs = np.mgrid[0:520, 0:640]
    blob = ((xs - 300) / 220) ** 2 + ((ys - 260) / 200) ** 2 < 1
    grain = cv2.GaussianBlur(rng.standard_normal((520, 640, 2)), (0, 0), 4)
    density = blob[..., None] * np.clip(0.5 + 4 * grain, 0.1, 1.5)
    od = density @ np.array([[0.651, 0.701, 0.290], [0.216, 0.801, 0.558]])
    return np.clip(243 * np.exp(-od) + rng.normal(0, 1, od.shape), 0, 255).astype(np.uint8)


def _make_runs(folder: Path) -> None:
    os.chdir(folder)
    config, origins = resolve_run_config({}, Path("r.toml"))
    lossless = WriteConfig(format="ome-zarr", tile_px=128)
    write_omezarr(Path("z.ome.zarr"), Size(640, 520), [draw_tissue()], 0.5, lossless, name="z")
    made = translate_slide(Path("s.tiff"), Path("straight"), config, origins=origins)
    shutil.copy(made.files.output, "made.ome.tiff")

    def stop(event: Event) -> None:
        if (event.stage, event.kind) == ("write", "start"):
            raise Stop

    try:
        translate_slide(Path("s.tiff"), Path("out"), config, origins=origins, listener=stop)
    except Stop:
        return
    raise AssertionError("the run did not stop")


# ---- one case -------------------------------------------------------------------------------


@dataclass
class Outcome:
    """How a process ended."""

    code: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    out: str = ""
    err: str = ""
    faults: list[str] = field(default_factory=list)


def in_child(work: Callable[[], None]) -> Outcome:
    """Run a function in a forked process with limits; give how it ended."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began_s = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _become_child(work, out.fileno(), err.fileno())
        status, usage, timed_out = _wait(pid, began_s + LIMIT_S)
        outcome = Outcome(
            code=os.waitstatus_to_exitcode(status),
            seconds=time.monotonic() - began_s,
            peak_bytes=usage.ru_maxrss * 1024,
        )
        for stream, name in ((out, "out"), (err, "err")):
            stream.seek(0)
            setattr(outcome, name, stream.read().decode("utf-8", "replace"))
    if timed_out:
        outcome.faults.append(f"still ran after {LIMIT_S:.0f} s")
    return outcome


def _wait(pid: int, end_s: float) -> tuple[int, resource.struct_rusage, bool]:
    while time.monotonic() < end_s:
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            return status, usage, False
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    return status, usage, True


def _become_child(work: Callable[[], None], out: int, err: int) -> None:
    """Limit, redirect, work, and leave without the parent's clean-up."""
    code = 1
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        with open("/proc/self/statm", encoding="ascii") as statm:
            used_bytes = int(statm.read().split()[0]) * resource.getpagesize()
        for what, limit in (
            (resource.RLIMIT_CPU, LIMIT_CPU_S),
            (resource.RLIMIT_AS, used_bytes + EXTRA_BYTES),
            (resource.RLIMIT_FSIZE, LARGEST_FILE_BYTES),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(what, (limit, limit))
        work()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_case(sound: Path, name: str, seed: int) -> Outcome:
    """Damage one file by the seed, type one command, and judge."""
    target, rng = TARGETS[name], random.Random(f"{name}:{seed}")  # noqa: S311
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        place = Path(folder)
        chosen, arguments = _set_up(sound, place, target, rng)
        before = _digests(place)

        def work() -> None:
            os.chdir(place)
            sys.argv = ["wsi-stain", *arguments]
            cli.main()

        outcome = in_child(work)
        _judge(outcome, target, place, before)
        if target.same_bytes and outcome.code == 0 and arguments[0] == "translate":
            straight = next((sound / "straight").glob("*.ome.tiff")).read_bytes()
            if next((place / "out").glob("*.ome.tiff")).read_bytes() != straight:
                outcome.faults.append("other bytes than an undisturbed run")
    if outcome.faults:
        outcome.faults.append(f"damaged {chosen}; typed: wsi-stain {' '.join(arguments)}")
    return outcome


def _set_up(
    sound: Path, place: Path, target: Target, rng: random.Random
) -> tuple[Path, Sequence[str]]:
    found = sorted(
        path.relative_to(sound)
        for pattern in target.files
        for path in sound.glob(pattern)
        if path.is_file()
    )
    chosen = rng.choice(found)
    for name in {*target.needs, chosen.parts[0]}:
        source = sound / name
        copy: Callable[..., Any] = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, place / name)
    damaged = target.spoil(rng, (sound / chosen).read_bytes())
    (place / chosen).write_bytes(damaged)
    spec = place / chosen.parent / "bundle.json"
    if chosen.suffix == ".safetensors" and rng.random() < 0.8:
        # Past the check of digests, to the reader behind it.
        record = json.loads(spec.read_text())
        record["files"][chosen.name] = hashlib.sha256(damaged).hexdigest()
        spec.write_text(json.dumps(record))
    return chosen, rng.choice(target.verbs).format(chosen).split()


def _digests(place: Path) -> dict[str, str]:
    return {
        str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in place.rglob("*")
        if path.is_file() and path.relative_to(place).parts[0] != "out"
    }


def _judge(outcome: Outcome, target: Target, place: Path, before: dict[str, str]) -> None:
    faults, lines = outcome.faults, outcome.err.splitlines()
    if outcome.code not in target.codes:
        faults.append(f"exit code {outcome.code}")
    if "Traceback" in outcome.err:
        faults.append("a traceback")
    if outcome.code not in (0, 2) and len(lines) != 1:
        faults.append(f"{len(lines)} lines on stderr")
    if "out of memory" in outcome.err:
        faults.append("out of memory")
    if _digests(place) != before:
        faults.append("a file outside of the output folder was made or changed")
    left = [path.name for path in place.glob("out/*") if path.is_file()]
    half = [name for name in left if outcome.code or not name.endswith(MADE)]
    if half:
        faults.append(f"half-written: {half}")


# ---- all cases ------------------------------------------------------------------------------


def main() -> int:
    """Run `--cases` cases over all targets, or one that `--only` names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first case")
    parser.add_argument("--only", default="", help="target, or target:seed")
    arguments = parser.parse_args()
    names, _, seed = arguments.only.partition(":")
    targets = [names] if names else list(TARGETS)
    cases = [
        (targets[number % len(targets)], arguments.seed + number // len(targets))
        for number in range(arguments.cases)
    ]
    if seed:
        cases = [(names, int(seed))]
    with tempfile.TemporaryDirectory(prefix="fuzz-sound-") as folder:
        make_sound_files(Path(folder))
        failed = sum(_report(name, at, run_case(Path(folder), name, at)) for name, at in cases)
    sys.stdout.write(f"{len(cases)} cases, {failed} failed\n")
    return 1 if failed else 0


def _report(name: str, seed: int, outcome: Outcome) -> bool:
    peak_mb = outcome.peak_bytes // 2**20
    line = f"{name}:{seed} exit {outcome.code}, {outcome.seconds:.1f} s, {peak_mb} MB"
    sys.stdout.write(f"{line} {'FAIL ' + '; '.join(outcome.faults) if outcome.faults else ''}\n")
    if outcome.faults:
        sys.stdout.write(f"    {outcome.err[-3000:]}\n")
    sys.stdout.flush()
    return bool(outcome.faults)


if __name__ == "__main__":
    sys.exit(main())
