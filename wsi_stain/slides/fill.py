"""Fill a store's `he` array from a slide, one shard at a time.

Room 1 of 4. In: a slide, a grid, shard numbers. Out: shards. Not here: which shards, by whom.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from wsi_stain.geometry import Region
from wsi_stain.slides.image import SlideSource
from wsi_stain.slides.missing import MissingTile, touching
from wsi_stain.slides.plan import TileGrid
from wsi_stain.slides.slide_facts import Pixels
from wsi_stain.slides.store import PatchStore

__all__ = ["FillReport", "FillTask", "fill_shard", "missing_in", "read_tiles"]

MISSING = "missing"
LARGEST_READ_PX = 8_000_000


@dataclass(frozen=True)
class FillReport:
    """What a worker says about a shard that was read."""

    n_tiles: int
    seconds: float
    n_missing: int = 0  # tiles of the slide that are background in it


@dataclass(frozen=True)
class FillTask:
    """Reads shards of one slide into the store; sent to each worker once.

    Attributes
    ----------
    source
        The slide; opened anew in each process.
    store
        Path of the patch store.
    key
        Identity of the work: goes into the done marker of each shard.
    """

    source: SlideSource
    store: Path
    key: str

    def __call__(self, shard: int) -> FillReport:
        """Read one shard and mark it done."""
        began_s = time.monotonic()
        store = PatchStore.open(self.store)
        missing = fill_shard(self.source, store, shard, self.key)
        seconds = time.monotonic() - began_s
        return FillReport(len(store.grid.shard(shard)), seconds, len(missing))


def fill_shard(
    source: SlideSource, store: PatchStore, shard: int, key: str
) -> tuple[MissingTile, ...]:
    """Read a shard's tiles from the slide and write them to `he`, with what the slide lacks.

    Returns
    -------
    tuple
        Tiles of the slide that are background in this shard.

    Raises
    ------
    SlideError, OutputError
        Reading or writing failed; nothing is marked done.
    """
    grid = store.grid
    indexes = grid.shard(shard)
    tiles = read_tiles(source, grid, indexes)
    level = source.level_for(grid.scale.factor)
    regions_out = [grid.region_out(index) for index in indexes]
    missing = touching(source.missing, level, regions_out, grid.scale)
    store.write("he", shard, tiles, key, {MISSING: missing} if missing else None)
    return missing


def missing_in(store: PatchStore, shard: int) -> tuple[MissingTile, ...] | None:
    """Tell which tiles of the slide are background in a shard; `None` where nobody can tell."""
    facts = store.facts("he", shard) or {}
    try:
        return msgspec.convert(facts, dict[str, tuple[MissingTile, ...]]).get(MISSING, ())
    except msgspec.ValidationError:  # damaged: whoever asks has the shard made again
        return None


def read_tiles(source: SlideSource, grid: TileGrid, indexes: range) -> Pixels:
    """Read tiles, neighbors of one row together: shared slide tiles are decoded once.

    Returns
    -------
    ndarray
        uint8 (n, t, t, 3), sRGB.

    Notes
    -----
    Memory bound: the tiles, and 8 million level-0 px.
    """
    side_px, stride_px = grid.tile_px, grid.stride_px
    tiles = np.empty((len(indexes), side_px, side_px, 3), np.uint8)
    for run in _runs(grid, indexes):
        first = grid.region_out(run.start)
        band = source.read_out(
            Region(first.x_px, first.y_px, (len(run) - 1) * stride_px + side_px, side_px),
            grid.scale,
        )
        for place, index in enumerate(run):
            x_px = place * stride_px
            tiles[index - indexes.start] = band[:, x_px : x_px + side_px]
    return tiles


def _runs(grid: TileGrid, indexes: range) -> Iterator[range]:
    """Split into runs of neighbors in one row, each short enough to be read at once."""
    tile_px_l0 = max(1.0, grid.tile_px * grid.stride_px * grid.scale.factor**2)
    longest = max(1, int(LARGEST_READ_PX / tile_px_l0))
    start = indexes.start
    for index in indexes:
        follows = index + 1 in indexes and bool(
            np.array_equal(grid.rc[index + 1], grid.rc[index] + (0, 1))
        )
        if not follows or index + 1 - start >= longest:
            yield range(start, index + 1)
            start = index + 1
