"""Many slides on many GPUs that only sleep, through the real scheduler and the real dispatch.

What is simulated is the translation of a shard, and nothing else: the scheduler is a process of its
own, every GPU is a worker of its own, slides are many callers of one executor, as in `batch`. CPU
seconds per shard hold on a busy machine; efficiency needs an idle one, since scheduler, client and
all workers share its cores here.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from ruler import Ruler, start

from wsi_stain.cluster.quiet import as_environment, dask_settings
from wsi_stain.config import ClusterConfig
from wsi_stain.dispatch import Executor, Step, open_executor

SHARD_TILES = 64
TILES = 1_000_000
SLIDES = 1_000
# 25 guided steps of a 256 px tile at 0.5 ms a step: what `plan` takes for a data-center GPU.
TILE_S = 25 * 1.6 * 0.0005
SHARD_S = SHARD_TILES * TILE_S
CORE_SHARD_S = 80.0  # the same shard by the default solver on a core with AVX2
LIMIT_S = 50.0
PROCESSES = 2
FLEET = Path(__file__).with_name("fleet.py")


@dataclass(frozen=True)
class Archive:
    """How many GPUs, how long a shard takes on one, how many shards the slides have."""

    gpus: int
    shard_s: float
    slides: tuple[int, ...]
    limit_s: float


@dataclass(frozen=True)
class Outcome:
    """What came of it: counts, seconds (CPU and wall), bytes."""

    shards: int
    slides: int
    wall_s: float
    scheduler_s: float
    client_s: float
    scheduler_bytes: int
    client_bytes: int


class Sleeper:
    """The translation of a shard, without the arithmetic."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, number: int) -> float:
        time.sleep(self.seconds)
        return self.seconds


def slide_sizes(slides: int, shards: int) -> tuple[int, ...]:
    """Shards of each slide: from a fifth of the mean to three times it, in no order."""
    shares = [0.2 + 2.8 * (index * 0.618034 % 1.0) ** 2 for index in range(slides)]
    return tuple(max(1, round(shards * share / sum(shares))) for share in shares)


@contextmanager
def fleet(gpus: int, folder: str) -> Iterator[tuple[str, psutil.Process]]:
    """Run a scheduler and its workers; give its address and its process."""
    environment = os.environ | as_environment(dask_settings(folder))
    file = Path(folder) / "scheduler.json"
    where = ["--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file), "--no-dashboard"]
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", *where]
    command += ["--dashboard-address", "127.0.0.1:0"]
    log = (Path(folder) / "log").open("wb")
    with ExitStack() as stack:
        stack.enter_context(log)

        def run(words: list[str]) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        scheduler = run(command)
        while '"address"' not in (file.read_text() if file.exists() else ""):
            time.sleep(0.1)
        address = file.read_text().split('"address": "')[1].split('"')[0]
        n_processes = min(PROCESSES, gpus)
        for index in range(n_processes):
            count = gpus // n_processes + (index < gpus % n_processes)
            run([sys.executable, str(FLEET), address, str(count)])
        yield address, psutil.Process(scheduler.pid)


def play(archive: Archive) -> Outcome:
    """Translate the slides, as many at once as keep all GPUs busy, until the time is over."""
    with tempfile.TemporaryDirectory() as folder, fleet(archive.gpus, folder) as (address, process):
        config = ClusterConfig(
            executor="address", scheduler=address, workers=archive.gpus, wait_s=300
        )
        with open_executor(config, no_devices) as executor:
            wait_for(archive.gpus)
            return measure(executor, archive, process)


def no_devices(config: ClusterConfig) -> int:
    return 0


def wait_for(gpus: int) -> None:
    from distributed import default_client  # noqa: PLC0415 - the executor's own

    while default_client().scheduler_info(n_workers=0)["n_workers"] < gpus:
        time.sleep(0.2)


def measure(executor: Executor, archive: Archive, scheduler: psutil.Process) -> Outcome:
    queue, lock = iter(archive.slides), threading.Lock()
    counts = {"shards": 0, "slides": 0}
    end_s = time.monotonic() + archive.limit_s

    def call() -> None:
        while time.monotonic() < end_s:
            with lock:
                n_shards = next(queue, None)
            if n_shards is None:
                return
            steps = [
                Step("fill", Sleeper(0.0), range(n_shards)),
                Step("translate", Sleeper(archive.shard_s), range(n_shards)),
            ]
            for _ in executor.run_steps(steps):
                pass
            with lock:
                counts["shards"] += n_shards
                counts["slides"] += 1

    mean_shards = sum(archive.slides) / len(archive.slides)
    n_callers = min(len(archive.slides), 2 + int(2 * archive.gpus / mean_shards))
    callers = [threading.Thread(target=call) for _ in range(n_callers)]
    cpu_s, own_s, wall_s = sum(scheduler.cpu_times()[:2]), time.process_time(), time.monotonic()
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    return Outcome(
        shards=counts["shards"],
        slides=counts["slides"],
        wall_s=time.monotonic() - wall_s,
        scheduler_s=sum(scheduler.cpu_times()[:2]) - cpu_s,
        client_s=time.process_time() - own_s,
        scheduler_bytes=scheduler.memory_info().rss,
        client_bytes=psutil.Process().memory_info().rss,
    )


def report(ruler: Ruler, archive: Archive, outcome: Outcome) -> None:
    at = f"{archive.gpus} GPUs, {outcome.shards} shards of {outcome.slides} slides"
    busy_s = outcome.shards * archive.shard_s
    efficiency = busy_s / archive.gpus / outcome.wall_s
    scheduler_s, client_s = outcome.scheduler_s / outcome.shards, outcome.client_s / outcome.shards
    ruler.report(f"efficiency, {at}", "", efficiency, "all GPUs always busy", 1.0)
    ruler.report(f"scheduler CPU per shard, {at}", "ms", 1e3 * scheduler_s)
    ruler.report(f"client CPU per shard, {at}", "ms", 1e3 * client_s)
    # Of a shard of 64 tiles, whatever was slept here.
    for device, seconds in (("GPU", SHARD_S), ("core", CORE_SHARD_S)):
        overhead = 100 * (scheduler_s + client_s) / seconds
        name = f"dispatch CPU of translate time on a {device}, {at}"
        ruler.report(name, "%", overhead, "allowed", 2.0)
    ruler.report(f"saturates at, {at}", "GPUs", SHARD_S / max(scheduler_s, client_s))
    ruler.report(f"memory of the scheduler, {at}", "MB", outcome.scheduler_bytes / 1e6)
    ruler.report(f"memory of the client, {at}", "MB", outcome.client_bytes / 1e6)


def archives(quick: bool) -> Iterator[Archive]:
    if quick:
        yield Archive(4, 0.02, slide_sizes(6, 40), LIMIT_S)
        return
    sizes = slide_sizes(SLIDES, TILES // SHARD_TILES)
    for gpus, slides in ((8, 20), (64, 100), (512, SLIDES)):
        yield Archive(gpus, SHARD_S, tuple(itertools.islice(sizes, slides)), LIMIT_S)


def main() -> None:
    ruler = start("scheduler", __doc__)
    for archive in archives(ruler.quick):
        report(ruler, archive, play(archive))


if __name__ == "__main__":
    main()
