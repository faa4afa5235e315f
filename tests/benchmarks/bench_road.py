"""`wsi-stain translate` beside the bare sampler on as many tiles, and what dispatching costs.

The bare sampler runs in one process per core, one thread each, on tiles in memory: no slide, no
store, no color, no pyramid; loading the model does not count. CPU seconds are those of all
processes. `--tiles N` sets the size of the slide (about: the grid is square), `--ways` which of
student, solver and teacher run. Last, the net's own operations per second of the whole road, beside
the convolution that takes most of them, run on all cores at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import bench_model
import numpy as np
import torch
from ruler import Ruler, start
from specimen import dense_tissue, write_svs

from wsi_stain.cluster import available_cores
from wsi_stain.cluster.quiet import worker_environment
from wsi_stain.config import ClusterConfig, SampleConfig, resolve_sampling
from wsi_stain.dispatch import open_executor
from wsi_stain.translate.bundle import load_bundle, pick_device
from wsi_stain.translate.cost import count_tile_flop
from wsi_stain.translate.noise import NoiseField
from wsi_stain.translate.pixels import to_model

BUNDLE = "ki67"
TILES, QUICK_TILES = 100, 4
STRIDE_PX, OVERLAP_PX = 224, 32
BATCH = 4
SHARDS = 500
CONV_S = 3.0
PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Spent:
    """Seconds of the clock, and CPU seconds of all processes."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class Nothing:
    """A task that does nothing: what is left is dispatching."""

    def __call__(self, number: int) -> int:
        return number


def main() -> None:
    if sys.argv[1:2] == ["--sample"]:
        sample(sys.argv[2], *map(int, sys.argv[3:]))
        return
    if sys.argv[1:2] == ["--conv"]:
        convolve()
        return
    n_tiles = int(taken("--tiles", str(TILES)))
    ways = taken("--ways", "student,solver").split(",")
    ruler = start("road", __doc__)
    adopt_orphans()
    with tempfile.TemporaryDirectory() as folder:
        slide = write_slide(Path(folder) / "slide.svs", QUICK_TILES if ruler.quick else n_tiles)
        for way in ways:
            bench_way(ruler, slide, way)
    bench_dispatch(ruler)  # last: the parent of its workers stays a child of this process


def taken(name: str, otherwise: str) -> str:
    """Take a flag and its value out of the command line."""
    if name not in sys.argv:
        return otherwise
    at = sys.argv.index(name)
    value = sys.argv[at + 1]
    del sys.argv[at : at + 2]
    return value


# ---- the road -------------------------------------------------------------------------------


def write_slide(path: Path, n_tiles: int) -> Path:
    """Write a slide that is tissue all over, so that every tile is translated."""
    side_px = max(1, round(math.sqrt(n_tiles))) * STRIDE_PX + OVERLAP_PX
    return write_svs(path, dense_tissue(2048, 1024), side_px, side_px, gap=False)


def bench_way(ruler: Ruler, slide: Path, way: str) -> None:
    """Translate the slide with one solver, then sample as many tiles."""
    steps = 1 if ruler.quick and way == "solver" else 0
    out = slide.parent / way
    command = [sys.executable, "-m", "wsi_stain", "translate", str(slide), "--out", str(out)]
    flags = ["--tissue-min-fraction", "0", "--solver", way, "--json"]
    flags += ["--steps", str(steps)] if steps else []
    flags += ["--workers", "1"] if ruler.quick else []
    road, text = spend([command + flags], {})
    facts = json.loads(text[0])
    bare = bare_sampler(way, facts["tiles"], steps)
    what = f"translate, {way}, {facts['tiles']} tiles"
    ruler.report(what, "s", road.wall_s, "bare sampler", bare.wall_s)
    ruler.report(f"{what}, CPU", "s", road.cpu_s, "bare sampler", bare.cpu_s)
    for stage, stage_s in facts["seconds"].items():
        ruler.report(f"{what}, stage {stage}", "s", stage_s, "translate", road.wall_s)
    useful, ceiling = facts["tiles"] * tile_gflop(way, steps) / road.wall_s, conv_ceiling()
    ruler.report(f"{what}, the net's own work", "GFLOP/s", useful, "its 3x3 convolution", ceiling)


def spend(commands: list[list[str]], environment: dict[str, str]) -> tuple[Spent, list[str]]:
    """Run commands at the same time; give what they cost and what they print."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began_s = time.perf_counter()
    running = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
        for command in commands
    ]
    texts = [process.communicate()[0] for process in running]
    wall_s = time.perf_counter() - began_s
    wait_for_orphans()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if any(process.returncode for process in running):
        raise SystemExit(f"a command failed: {commands[0]}")
    user_s, system_s = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    return Spent(wall_s, user_s + system_s), texts


def adopt_orphans() -> None:
    """Become the parent of what a command leaves behind, as the process its workers come from."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def wait_for_orphans() -> None:
    """Wait for them: only then their CPU seconds count as ours."""
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


def bare_sampler(way: str, n_tiles: int, steps: int) -> Spent:
    """Sample the tiles on all cores; the slowest process counts."""
    n_workers = available_cores()
    shares = [n_tiles // n_workers + (k < n_tiles % n_workers) for k in range(n_workers)]
    commands = [
        [sys.executable, __file__, "--sample", way, str(share), str(steps)]
        for share in shares
        if share
    ]
    _, texts = spend(commands, worker_environment())
    spent = [Spent(**json.loads(text)) for text in texts]
    return Spent(max(each.wall_s for each in spent), sum(each.cpu_s for each in spent))


def tile_gflop(way: str, steps: int) -> float:
    """Operations of the net for a tile, in thousands of millions."""
    bundle = load_bundle(BUNDLE, pick_device("cpu"))
    config = SampleConfig(solver=way, steps=steps or None)  # type: ignore[arg-type]
    return count_tile_flop(bundle, *resolve_sampling(bundle.spec, config)).net_flop / 1e9


def conv_ceiling() -> float:
    """GFLOP/s of the dominant convolution, one process a core, all at once."""
    commands = [[sys.executable, __file__, "--conv"]] * available_cores()
    _, texts = spend(commands, worker_environment())
    return sum(map(float, texts))


@torch.no_grad()
def convolve() -> None:
    """Run in a process of its own: the convolution that takes most of the net's operations."""
    bundle = load_bundle(BUNDLE, pick_device("cpu"))
    conv = bench_model.conv_ceiling(bundle, bench_model.make_batch(bundle, BATCH))
    conv.run()
    began_s, n_runs = time.perf_counter(), 0
    while time.perf_counter() - began_s < CONV_S:
        conv.run()
        n_runs += 1
    sys.stdout.write(str(n_runs * conv.flop / (time.perf_counter() - began_s) / 1e9))


@torch.no_grad()
def sample(way: str, n_tiles: int, steps: int) -> None:
    """Run in a process of its own: sample tiles in batches, print what that alone cost."""
    bundle = load_bundle(BUNDLE, pick_device("cpu"))
    config = SampleConfig(solver=way, steps=steps or None)  # type: ignore[arg-type]
    sampler = bundle.sampler(*resolve_sampling(bundle.spec, config))
    assert sampler is not None
    side_px = bundle.spec.tile_px
    picture = dense_tissue(BATCH * side_px, side_px)
    tiles = np.stack(np.split(picture, BATCH, axis=1))
    x_0, places = to_model(tiles), torch.zeros(BATCH, 2, dtype=torch.int64)
    began = Spent(time.perf_counter(), time.process_time())
    for first in range(0, n_tiles, BATCH):
        count = min(BATCH, n_tiles - first)
        field = {step: NoiseField(first).at(places[:count], step, side_px) for step in (0, 1001)}
        sampler(x_0[:count], field.__getitem__, 0.3)
    spent = Spent(time.perf_counter() - began.wall_s, time.process_time() - began.cpu_s)
    sys.stdout.write(json.dumps(vars(spent)))


# ---- dispatch -------------------------------------------------------------------------------


def bench_dispatch(ruler: Ruler) -> None:
    """Cost of a shard that does nothing, and of starting and ending the workers."""
    n_shards = 20 if ruler.quick else SHARDS
    seconds = {}
    for executor in ("serial", "dask"):
        config = ClusterConfig(executor=executor, device="cpu")
        began_s = time.perf_counter()
        with open_executor(config, lambda _: 0) as workers:
            list(workers.run(Nothing(), range(4)))  # the first task is also sent
            ready_s = time.perf_counter()
            list(workers.run(Nothing(), range(n_shards)))
            done_s = time.perf_counter()
        ended_s = time.perf_counter() - done_s + ready_s - began_s
        seconds[executor] = (ended_s, (done_s - ready_s) / n_shards)
    ruler.report("starting and ending the workers", "s", seconds["dask"][0])
    shard_ms = {name: 1e3 * value for name, (_, value) in seconds.items()}
    ruler.report(
        "dispatch of an empty shard", "ms", shard_ms["dask"], "plain call", shard_ms["serial"]
    )


if __name__ == "__main__":
    main()
