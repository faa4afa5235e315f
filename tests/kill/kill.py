"""Kill runs with ``kill -9`` at any moment; the same command must end with the same bytes.

``python tests/kill/kill.py --kills 40 --seed 7``. A round is one output: it is killed once to three
times, then left to end. Each kill takes the whole process group, workers too, at a random moment
of the run, as soon as the picture is begun, or as soon as it has got its name. Runs are forked
from one process that has imported everything, so most of a run's time is its work.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from wsi_stain.config import BundleSpec, NetSpec, RunConfig, resolve_run_config
from wsi_stain.files import sha256_any
from wsi_stain.layout import RunFiles
from wsi_stain.manifest import RunManifest
from wsi_stain.pipeline import translate_slide
from wsi_stain.translate.bundle import save_nets
from wsi_stain.translate.networks import ScoreNet

FORMATS = ("ome-tiff", "ome-zarr")
MOMENTS = ("any", "any", "any", "picture begun", "named")
MOST_KILLS = 3  # of one output
LIMIT_S = 600.0


def _fuzzer() -> ModuleType:
    """Import the fuzzer, which can draw tissue: the tests are no package."""
    path = Path(__file__).resolve().parents[1] / "fuzz" / "fuzz.py"
    spec = importlib.util.spec_from_file_location("fuzz", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its frozen dataclasses look their module up.
    sys.modules["fuzz"] = module
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Yard:
    """What all runs share: a slide, a bundle with a small net, and what undisturbed runs gave."""

    folder: Path
    slide: Path
    bundle: Path

    @classmethod
    def make(cls, folder: Path) -> Yard:
        """Write the slide and the bundle."""
        fuzz = _fuzzer()
        pixels = fuzz.draw_tissue()[100:420, 150:550]
        fuzz.write_slide(folder / "s.tiff", pixels, description="a test", metadata=None)
        torch.manual_seed(0)
        net = NetSpec(channels=(16, 16), blocks=1)
        weights = ScoreNet(net).state_dict()
        weights["tail.weight"] = 0.05 * torch.randn_like(weights["tail.weight"])
        spec = BundleSpec(name="tiny", marker="Test", tile_px=128, net=net, start_image="stain")
        save_nets(folder / "tiny", spec, {"score": weights})
        return cls(folder, folder / "s.tiff", folder / "tiny")

    def config(self, pyramid: str, executor: str) -> RunConfig:
        """Settle a run's settings: many small shards."""
        flags = {
            "bundle": str(self.bundle),
            "write.format": pyramid,
            "tiles.shard_tiles": 2,
            "sample.steps": 2,
            "sample.guided": False,
            "cluster.executor": executor,
            "cluster.workers": 2,
            "cluster.device": "cpu",
        }
        return resolve_run_config(flags)[0]

    def files(self, out: Path, pyramid: str) -> RunFiles:
        """Name the files of a run into a folder."""
        return RunFiles.of(out, self.slide, "Test", pyramid)

    def start(self, out: Path, pyramid: str, executor: str) -> int:
        """Start a run in a process group of its own; gives its number."""
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            os.setsid()
            with Path(f"{out}.log").open("ab") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            translate_slide(self.slide, out, self.config(pyramid, executor))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def wait(pid: int, until: Callable[[], bool] = lambda: False) -> int | None:
    """Wait until a process ends, and give its code; or until something else is so: `None`."""
    end_s = time.monotonic() + LIMIT_S
    while time.monotonic() < end_s:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if until():
            return None
        time.sleep(0.001)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"still ran after {LIMIT_S:.0f} s")


def moment_of(name: str, files: RunFiles, after_s: float) -> Callable[[], bool]:
    """Give the test whether the moment to kill has come."""
    if name == "picture begun":
        parts = f"{files.output.name}*.part"
        return lambda: any(files.output.parent.glob(parts))
    if name == "named":
        return files.output.exists
    end_s = time.monotonic() + after_s
    return lambda: time.monotonic() > end_s


def stage_of(files: RunFiles) -> str:
    """Tell from what lies there how far a run came."""
    if files.output.exists():
        return "named"
    if any(files.output.parent.glob(f"{files.output.name}*.part")):
        return "writing"
    for name in ("ihc", "he"):
        if any(files.store.glob(f"done/{name}/*.json")):
            return f"{name} shards"
    return "store" if files.store.exists() else "before the store"


@dataclass
class Tally:
    """What was seen."""

    kills: Counter[str]
    faults: list[str]
    rounds: int = 0


def kill_run(yard: Yard, rng: random.Random, kills: int, executor: str, tally: Tally) -> None:
    """Do one round on an output that nobody has written to yet."""
    number = tally.rounds
    pyramid = FORMATS[number % 2]
    out = yard.folder / f"out-{number}"
    files = yard.files(out, pyramid)
    straight = yard.files(yard.folder / f"straight-{pyramid}", pyramid).output
    whole, straight_s = sha256_any(straight), duration_s(straight)
    for _ in range(kills):
        name = rng.choice(MOMENTS)
        pid = yard.start(out, pyramid, executor)
        slower = 1.0 if executor == "serial" else 4.0
        code = wait(pid, moment_of(name, files, rng.uniform(0, straight_s * slower)))
        if code is not None:  # it ended first
            if code:
                tally.faults.append(
                    f"round {number}: exit {code}: {Path(f'{out}.log').read_text()}"
                )
            break
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        tally.kills[f"{pyramid} {executor}: {stage_of(files)}"] += 1
        if files.output.exists() and sha256_any(files.output) != whole:
            tally.faults.append(f"round {number}: torn after a kill at '{name}'")
    tally.faults += [f"round {number}: {fault}" for fault in finish(yard, files, executor, whole)]
    tally.rounds += 1
    sys.stdout.write(f"run {number}: {tally.kills.total()} kills, faults: {tally.faults}\n")
    sys.stdout.flush()


def finish(yard: Yard, files: RunFiles, executor: str, whole: str) -> Iterator[str]:
    """Type the command again, and compare."""
    out = files.output.parent
    closed = files.output.exists() and files.manifest.exists()
    if not closed or RunManifest.load(files.manifest).content.state != "finished":
        pyramid = "ome-zarr" if files.output.suffix == ".zarr" else "ome-tiff"
        code = wait(yard.start(out, pyramid, executor))
        if code:
            yield f"exit {code}: {Path(f'{out}.log').read_text()}"
            return
    if sha256_any(files.output) != whole:
        yield "other bytes than an undisturbed run"
    half = ("*.part", "*.partial", "lock", "unsound*")
    if left := sorted(path.name for pattern in half for path in out.rglob(pattern)):
        yield f"left over: {left}"


def duration_s(straight: Path) -> float:
    """Give how long the undisturbed run took."""
    return float(Path(f"{straight.parent}.seconds").read_text())


def main() -> int:
    """Kill `--kills` runs; 1 where any ended otherwise than an undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--dask-every", type=int, default=8, help="rounds; its workers take long to start; 0: none"
    )
    arguments = parser.parse_args()
    rng, tally = random.Random(arguments.seed), Tally(Counter(), [])  # noqa: S311
    with tempfile.TemporaryDirectory(prefix="kill-") as folder:
        yard = Yard.make(Path(folder))
        for pyramid in FORMATS:
            out, began_s = yard.folder / f"straight-{pyramid}", time.monotonic()
            assert wait(yard.start(out, pyramid, "serial")) == 0, Path(f"{out}.log").read_text()
            Path(f"{out}.seconds").write_text(str(time.monotonic() - began_s))
        while tally.kills.total() < arguments.kills and len(tally.faults) < 10:
            left = arguments.kills - tally.kills.total()
            kills = min(left, rng.randint(1, MOST_KILLS))
            every = arguments.dask_every
            executor = "dask" if every and tally.rounds % every == every - 1 else "serial"
            kill_run(yard, rng, kills, executor, tally)
    for what, count in sorted(tally.kills.items()):
        sys.stdout.write(f"{count:4d}  {what}\n")
    for fault in tally.faults:
        sys.stdout.write(f"FAULT {fault}\n")
    total = tally.kills.total()
    sys.stdout.write(f"{total} kills in {tally.rounds} runs, {len(tally.faults)} faults\n")
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main())
