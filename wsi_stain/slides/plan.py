"""TileGrid: which tiles of the virtual slide are worked on, and in which shards.

Room 1 of 4. In: a scale, a mask, tile sizes. Out: integers. Not here: images, stores, settings'
defaults. All regions are in the out frame (px of the virtual slide).
"""

from __future__ import annotations

import hashlib
import io
import json
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi_stain.errors import DAMAGE, NoTissueError, PlanError
from wsi_stain.files import atomic_write_bytes
from wsi_stain.geometry import Region, Scale, Size
from wsi_stain.slides.mask import TissueMask

__all__ = ["TileGrid", "plan_tiles"]

GRID_SCHEMA = 1


@dataclass(frozen=True, eq=False)
class TileGrid:
    """The tiles of one slide, row by row.

    Attributes
    ----------
    scale
        The out frame.
    tile_px, overlap_px
        Side of a tile; what it shares with each neighbor. Absolute, never a ratio.
    shard_tiles
        Tiles per shard: one task, one file.
    rc
        int32 (N, 2), row and column of each tile, sorted.
    tissue
        float32 (N,), share of tissue under each, 0..1.
    digest
        SHA-256, hex, over all of that: the identity of the finished work.

    Notes
    -----
    Invariant: tiles of all rows and columns would cover the virtual slide; tile (r, c) begins at
    ``(c * stride_px, r * stride_px)``; the last row and column may reach over the edge.
    """

    scale: Scale
    tile_px: int
    overlap_px: int
    shard_tiles: int
    rc: npt.NDArray[np.int32]
    tissue: npt.NDArray[np.float32]
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256(json.dumps(self._header(), sort_keys=True).encode())
        digest.update(np.ascontiguousarray(self.rc, np.dtype("<i4")).tobytes())
        digest.update(np.ascontiguousarray(self.tissue, np.dtype("<f4")).tobytes())
        object.__setattr__(self, "digest", digest.hexdigest())
        self.rc.flags.writeable = self.tissue.flags.writeable = False

    @property
    def stride_px(self) -> int:
        """Distance of neighboring tiles, px."""
        return self.tile_px - self.overlap_px

    @property
    def n_tiles(self) -> int:
        """Number of tiles."""
        return len(self.rc)

    @property
    def n_shards(self) -> int:
        """Number of shards."""
        return -(-self.n_tiles // self.shard_tiles)

    def region_out(self, index: int) -> Region:
        """Give a tile's place; always a whole tile, so it may reach over the edge."""
        row, column = (int(at) for at in self.rc[index])
        return Region(column * self.stride_px, row * self.stride_px, self.tile_px, self.tile_px)

    def shard(self, number: int) -> range:
        """Give the tiles of a shard; the last may be short."""
        if not 0 <= number < self.n_shards:
            raise IndexError(f"shard {number} of {self.n_shards}")
        start = number * self.shard_tiles
        return range(start, min(start + self.shard_tiles, self.n_tiles))

    def rows(self) -> Iterator[tuple[int, range]]:
        """Iterate over the rows that have tiles: row number, tile indexes from left to right."""
        for row, indexes in groupby(range(self.n_tiles), key=lambda index: int(self.rc[index, 0])):
            members = list(indexes)
            yield row, range(members[0], members[-1] + 1)

    def save(self, path: Path) -> None:
        """Write `path` (JSON), and a ``.npy`` beside: int32 (N, 3), row, column, tissue's bits."""
        table = np.empty((self.n_tiles, 3), np.int32)
        table[:, :2] = self.rc
        table[:, 2] = self.tissue.view(np.int32)
        array = io.BytesIO()
        np.save(array, table)
        atomic_write_bytes(path.with_suffix(".npy"), array.getvalue())
        text = json.dumps({**self._header(), "digest": self.digest}, indent=1)
        atomic_write_bytes(path, text.encode())

    @classmethod
    def load(cls, path: Path) -> TileGrid:
        """Read a saved grid.

        Raises
        ------
        PlanError
            Missing, damaged, or of another version.
        """
        hint = "Delete the work folder and start again."
        try:
            header = json.loads(path.read_text(encoding="utf-8"))
            table = np.load(path.with_suffix(".npy"), allow_pickle=False)
            grid = cls._from_parts(header, table)
            stated = header["digest"], header["schema"]
        except (*DAMAGE, SyntaxError, tokenize.TokenError) as error:  # numpy parses a header
            raise PlanError(f"Tile grid {path} cannot be read: {error}.", hint=hint) from error
        if stated != (grid.digest, GRID_SCHEMA):
            raise PlanError(f"Tile grid {path} is damaged: its digest differs.", hint=hint)
        return grid

    def _header(self) -> dict[str, Any]:
        return {
            "schema": GRID_SCHEMA,
            "factor": self.scale.factor,
            "mpp_out": self.scale.mpp_out,
            "size_out": list(self.scale.size_out),
            "tile_px": self.tile_px,
            "overlap_px": self.overlap_px,
            "shard_tiles": self.shard_tiles,
        }

    @classmethod
    def _from_parts(cls, header: dict[str, Any], table: npt.NDArray[np.int32]) -> TileGrid:
        scale = Scale(header["factor"], header["mpp_out"], Size(*header["size_out"]))
        return cls(
            scale=scale,
            tile_px=header["tile_px"],
            overlap_px=header["overlap_px"],
            shard_tiles=header["shard_tiles"],
            rc=np.ascontiguousarray(table[:, :2]),
            tissue=np.ascontiguousarray(table[:, 2]).view(np.float32),
        )


def plan_tiles(
    scale: Scale,
    mask: TissueMask,
    *,
    tile_px: int,
    overlap_px: int,
    tissue_min_fraction: float,
    shard_tiles: int,
) -> TileGrid:
    """Choose the tiles that hold tissue.

    Parameters
    ----------
    scale
        The out frame.
    mask
        Where there is tissue.
    tile_px, overlap_px
        Side of a tile, and overlap of neighbors, px; the overlap is at most half a tile.
    tissue_min_fraction
        Least share of tissue in what a kept tile shows of the slide, 0..1; 0 keeps all tiles,
        glass too.
    shard_tiles
        Tiles per shard.

    Returns
    -------
    TileGrid
        At least one tile.

    Raises
    ------
    NoTissueError
        No tile has enough tissue.
    PlanError
        The overlap exceeds half a tile: three tiles would meet in one place.
    """
    if not 0 <= 2 * overlap_px <= tile_px:
        raise PlanError(
            f"An overlap of {overlap_px} px does not fit tiles of {tile_px} px.",
            hint=f"Give at most {tile_px // 2}: --overlap-px {tile_px // 8}",
        )
    stride_px = tile_px - overlap_px
    n_columns, n_rows = (max(1, -(-(side - overlap_px) // stride_px)) for side in scale.size_out)
    columns = np.arange(n_columns, dtype=np.int64)
    kept, shares = [], []
    for row in range(n_rows):
        left, top = columns * stride_px, np.full(n_columns, row * stride_px)
        boxes = np.stack([left, top, left + tile_px, top + tile_px], axis=1)
        tissue = mask.fractions(boxes, scale.factor)
        # A tile that hangs over the edge is judged by its part on the slide: else the tissue of a
        # narrow rest would always be too little.
        shown = mask.fractions(np.minimum(boxes, [*scale.size_out] * 2), scale.factor)
        chosen = np.flatnonzero(shown >= tissue_min_fraction)
        kept.append(np.stack([np.full(len(chosen), row), chosen], axis=1))
        shares.append(tissue[chosen])
    rc = np.concatenate(kept).astype(np.int32)
    if len(rc) == 0:
        raise NoTissueError(
            f"No tissue found: of {n_rows * n_columns} tiles of {tile_px} px none has "
            f"{tissue_min_fraction:.1%} ({mask.tissue_fraction:.2%} of the slide looks stained).",
            hint="If there is tissue, lower the bar: --tissue-min-fraction 0",
        )
    return TileGrid(
        scale=scale,
        tile_px=tile_px,
        overlap_px=overlap_px,
        shard_tiles=shard_tiles,
        rc=rc,
        tissue=np.concatenate(shares).astype(np.float32),
    )
