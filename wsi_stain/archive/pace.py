"""How fast this machine goes through slides with a bundle: measured on a few tiles of one slide.

In: a slide of the archive, orders. Out: seconds per start, slide and tile. Not here: tiles of
other slides (`forecast`).

The very road is run on a few tiles, then on more of them, with as many slides at once as the
archive will have, and all workers busy to the end. Two times and two unknowns: what a slide costs
beside its tiles, and what a tile costs. Both are seconds of the archive's clock, with all that
overlaps, so that

    seconds = start + slides x slide_s + tiles x tile_s
"""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import msgspec

from wsi_stain.archive.jobs import WHOLE, Job
from wsi_stain.archive.lanes import Lanes, Orders, Workers
from wsi_stain.archive.ledger import Ledger
from wsi_stain.archive.record import ArchiveFiles
from wsi_stain.cluster import available_cores, count_workers
from wsi_stain.errors import DeviceError
from wsi_stain.files import atomic_write_bytes, make_folder
from wsi_stain.manifest import Event
from wsi_stain.planning import nvidia_devices

__all__ = ["Pace", "measure_pace", "read_pace"]

FEW_TILES = 4
MORE_TILES = 256
LONGEST_S = 60.0
PROBE_FOLDER = ".probe"


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of the archive's clock.

    Attributes
    ----------
    key
        What it was measured for: model, settings, machine.
    workers, device
        How many there were, and of what kind.
    start_s, slide_s, tile_s
        To start workers and load the model; for a slide beside its tiles; for a tile.
    """

    key: str
    workers: int
    device: str
    start_s: float
    slide_s: float
    tile_s: float

    def seconds(self, n_slides: int, n_tiles: int) -> float:
        """Project the time of an archive."""
        return self.start_s + n_slides * self.slide_s + n_tiles * self.tile_s if n_slides else 0.0


def pace_key(job: Job, orders: Orders) -> str:
    """Identify what a pace depends on."""
    config = job.config
    parts = (
        job.bundle_digest,
        msgspec.to_builtins(config.sample),
        msgspec.to_builtins(config.cluster),
        msgspec.to_builtins(config.write),
        orders.config.slides_at_once,
        available_cores(),
        nvidia_devices(config.cluster),
    )
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def read_pace(path: Path, job: Job, orders: Orders) -> Pace | None:
    """Read what was measured before, if it was for the same; else nothing."""
    try:
        paces = msgspec.json.decode(path.read_bytes(), type=list[Pace])
    except (OSError, msgspec.DecodeError):
        return None
    key = pace_key(job, orders)
    return next((pace for pace in paces if pace.key == key), None)


def measure_pace(job: Job, orders: Orders, path: Path) -> Pace:
    """Run the road on a few tiles of a slide, and keep what it took.

    Parameters
    ----------
    job
        A slide like the others.
    orders
        Those of the archive.
    path
        File to keep the pace in, in the output folder.

    Raises
    ------
    WsiStainError
        The slide cannot be translated here, so others cannot be either.
    """
    # One of its own: parts of an archive may be tried out at once.
    make_folder(path.parent)
    folder = Path(tempfile.mkdtemp(prefix=PROBE_FOLDER, dir=path.parent))
    began_s = time.monotonic()
    try:
        with Workers(orders.base.cluster) as workers:
            probe = _Probe(job, orders, folder, workers)
            probe.run(1, FEW_TILES)
            warm_s = time.monotonic() - began_s
            few_s, n_few = probe.run(probe.n_slides, FEW_TILES)
            more = _how_many(few_s, n_few)
            many_s, n_many = probe.run(probe.n_slides, more)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    tile_s = max(0.0, many_s - few_s) / max(1, n_many - n_few)
    if n_many <= n_few:  # slides of a handful of tiles
        tile_s = 0.0
    slide_s = max(0.0, few_s - n_few * tile_s) / probe.n_slides
    pace = Pace(
        key=pace_key(job, orders),
        workers=probe.n_workers,
        device="cuda" if nvidia_devices(job.config.cluster) else "cpu",
        start_s=round(max(0.0, warm_s - slide_s - FEW_TILES * tile_s), 3),
        slide_s=round(slide_s, 4),
        tile_s=round(tile_s, 5),
    )
    atomic_write_bytes(path, msgspec.json.encode([pace]) + b"\n")
    return pace


def _how_many(few_s: float, n_few: int) -> int:
    """Choose how many tiles of each slide: as many as a minute allows."""
    most = n_few * LONGEST_S / max(few_s, 1e-3)
    return int(min(MORE_TILES, max(2 * FEW_TILES, FEW_TILES * most / n_few)))


class _Probe:
    """Runs the road on some tiles of one slide, under several names at once."""

    def __init__(self, job: Job, orders: Orders, folder: Path, workers: Workers) -> None:
        serial = orders.base.cluster.executor == "serial"
        self.n_workers = 1 if serial else _n_workers(orders)
        # As many for each worker: three shards on two of them would take the time of four.
        rounds = math.ceil(orders.config.slides_at_once / self.n_workers)
        self.n_slides = 1 if serial else rounds * self.n_workers
        self._job, self._orders, self._folder, self._workers = job, orders, folder, workers
        self._runs = 0

    def run(self, n_slides: int, n_tiles: int) -> tuple[float, int]:
        """Give seconds, and tiles in all."""
        self._runs += 1
        out = self._folder / str(self._runs)
        files = ArchiveFiles(out, WHOLE)
        files.logs.mkdir(parents=True)
        config = msgspec.structs.replace(
            self._orders.config, attempts=1, stage=False, keep_store=False
        )
        orders = replace(self._orders, files=files, config=config, most_tiles=n_tiles)
        jobs = [
            replace(self._job, name=f"{self._job.name}{i}", stem=f"probe{i}")
            for i in range(n_slides)
        ]
        ledger = Ledger(files, jobs, "")
        began_s = time.monotonic()
        Lanes(jobs, orders, ledger, _ignore).work(nullcontext(self._workers))
        seconds = time.monotonic() - began_s
        if failed := ledger.record.of_state("failed"):
            raise DeviceError(
                f"Slide {self._job.slide.name} could not be tried out: {failed[0].error}",
                hint="Translate it alone: wsi-stain translate shows more.",
            )
        return seconds, sum(slide.tiles for slide in ledger.record.slides)


def _n_workers(orders: Orders) -> int:
    cluster = orders.base.cluster
    return count_workers(cluster.workers, nvidia_devices(cluster))


def _ignore(name: str, event: Event) -> None:
    """Hear nothing."""
