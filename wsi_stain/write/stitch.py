"""Row bands of the virtual slide from overlapping tiles, without seams.

Room 4 of 4. In: a tile grid and a function that reads a tile. Out: bands of pixels, top to
bottom. Not here: files, pyramids, where tiles come from.

Two neighbors share a strip of `overlap_px`. Across it the weights are linear ramps, the product
of one in x and one in y, divided by the sum over the tiles that exist. Away from the strips that
is a copy, so only strips are computed: first those between left and right neighbors, then the one
shared with the tile row above.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from wsi_stain.errors import ConfigError, OutputError
from wsi_stain.geometry import Scale

__all__ = ["Placement", "ReadTile", "stitch_bands"]

Pixels = npt.NDArray[np.uint8]
Weights = npt.NDArray[np.float32]
ReadTile = Callable[[int], Pixels]

NONE, ABOVE, BELOW, EVEN, MIXED = range(5)


class Placement(Protocol):
    """Where tiles lie: all that stitching asks of a tile grid.

    Tile i covers rows ``rc[i, 0] * stride`` on and columns ``rc[i, 1] * stride`` on, where stride
    is ``tile_px - overlap_px``. It may reach over the right and bottom edge.
    """

    @property
    def scale(self) -> Scale:
        """Out frame; `size_out` is the size of the stitched picture, px."""

    @property
    def tile_px(self) -> int:
        """Side of a tile, px."""

    @property
    def overlap_px(self) -> int:
        """Width of the strip that two neighbors share, px."""

    @property
    def rc(self) -> npt.NDArray[np.int32]:
        """(row, column) of each existing tile, int32 (N, 2), row-major."""


def stitch_bands(
    grid: Placement,
    read_tile: ReadTile,
    background: tuple[int, int, int],
    band_px: int = 512,
) -> Iterator[Pixels]:
    """Stitch tiles to bands.

    Memory bound: one tile and three arrays of full width: two of ``band_px + tile_px`` rows (the
    band being filled, and its successor while it is handed over) and one of `overlap_px` rows.
    Flat in the height of the picture, and proportional to its width.

    Invariant: each tile is read once, in the order of its number.

    Parameters
    ----------
    grid
        Where the tiles lie.
    read_tile
        Gives tile i, uint8 (tile_px, tile_px, 3).
    background
        Color where no tile is, 0..255. A tile at the border of the tissue keeps its full weight
        to its edge: there is no ramp to the background.
    band_px
        Rows of a band; the last one may be lower.

    Yields
    ------
    ndarray
        Band, uint8 (h, W, 3), owned by the caller.

    Raises
    ------
    ConfigError
        The overlap is more than half a tile.
    OutputError
        Tiles are out of order or outside the picture, or one has the wrong shape.
    """
    _check(grid)
    height_px = grid.scale.size_out.height_px
    stride_px = grid.tile_px - grid.overlap_px
    starts = _row_starts(grid)
    canvas = _Canvas(grid, background, band_px)
    y_px = 0  # first row of the canvas, in the picture
    for row in range(len(starts) - 1):
        canvas.place(row * stride_px - y_px, range(starts[row], starts[row + 1]), read_tile)
        last = row == len(starts) - 2
        final_px = height_px if last else min(height_px, (row + 1) * stride_px)
        while final_px - y_px >= band_px or (last and y_px < height_px):
            yield canvas.hand_over(min(band_px, height_px - y_px))
            y_px += band_px


def _check(grid: Placement) -> None:
    stride_px = grid.tile_px - grid.overlap_px
    if not 0 <= grid.overlap_px <= grid.tile_px // 2:
        raise ConfigError(
            f"overlap_px {grid.overlap_px} must be between 0 and half of tile_px {grid.tile_px}.",
            hint=f"Use --overlap-px {grid.tile_px // 8}.",
        )
    if not len(grid.rc):
        return
    rows, columns = grid.rc[:, 0].astype(np.int64), grid.rc[:, 1].astype(np.int64)
    width_px, height_px = grid.scale.size_out
    outside = (rows * stride_px >= height_px) | (columns * stride_px >= width_px)
    wrong = np.flatnonzero(outside | (rows < 0) | (columns < 0))
    if wrong.size:
        raise OutputError(
            f"Tile {wrong[0]} at row {rows[wrong[0]]}, column {columns[wrong[0]]} lies outside "
            f"the picture of {grid.scale.size_out}."
        )
    back = np.flatnonzero(np.diff(rows * (columns.max() + 1) + columns) <= 0)
    if back.size:
        raise OutputError(f"Tile {back[0] + 1} is not after tile {back[0]} in row-major order.")


def _row_starts(grid: Placement) -> list[int]:
    """Number of the first tile of each tile row, and N; rows reach down to the last pixel."""
    stride_px = grid.tile_px - grid.overlap_px
    height_px = grid.scale.size_out.height_px
    rows = grid.rc[:, 0] if len(grid.rc) else np.zeros(0, np.int32)
    needed = max(0, -(-(height_px - grid.tile_px) // stride_px)) + 1
    n_rows = max(needed, int(rows[-1]) + 1 if len(rows) else 0)
    starts: list[int] = np.searchsorted(rows, np.arange(n_rows + 1)).tolist()
    return starts


class _Canvas:
    """The rows that are not handed over yet, and how much of each column is tile.

    `weight` (W,) float32 belongs to the lowest tile row placed: the sum of its x weights over the
    tiles that exist. 1 inside tiles and where two overlap, a ramp where one of two is missing.
    """

    def __init__(self, grid: Placement, background: tuple[int, int, int], band_px: int) -> None:
        self.tile_px, self.overlap_px = grid.tile_px, grid.overlap_px
        self.columns = grid.rc[:, 1]
        self.width_px = grid.scale.size_out.width_px
        self.band_px = band_px
        glass = np.tile(np.array(background, np.uint8), self.width_px)
        self.glass: Pixels = glass.reshape(1, self.width_px, 3)
        centers: Weights = np.arange(0.5, self.overlap_px, dtype=np.float32)
        self.ramp: Weights = centers / np.float32(max(1, self.overlap_px))
        self.ramp_x: Weights = np.repeat(self.ramp, 3)[None]
        self.weight: Weights = np.zeros(self.width_px, np.float32)
        self.pixels = self._empty()
        self.pixels[: self.overlap_px] = self.glass
        self.filled_px = self.overlap_px
        self.head = np.empty((self.overlap_px, self.width_px, 3), np.uint8)

    def _empty(self) -> Pixels:
        # A tile row may start in the last row of a band.
        return np.empty((self.band_px + self.tile_px, self.width_px, 3), np.uint8)

    def place(self, top_px: int, tiles: range, read_tile: ReadTile) -> None:
        """Lay a tile row over the canvas, its first row at `top_px`."""
        body = self.pixels[top_px + self.overlap_px : top_px + self.tile_px]
        weight: Weights = np.zeros(self.width_px, np.float32)
        previous = -2
        for index in tiles:
            tile = _sound(read_tile(index), index, self.tile_px)
            column = int(self.columns[index])
            left_px = column * (self.tile_px - self.overlap_px)
            joined = self.overlap_px > 0 and column == previous + 1
            self._lay(self.head, tile[: self.overlap_px], left_px, joined)
            self._lay(body, tile[self.overlap_px :], left_px, joined)
            self._weigh(weight, left_px)
            previous = column
        for start_px, stop_px in _runs(weight == 0):
            body[:, start_px:stop_px] = self.glass[:, start_px:stop_px]
        if self.overlap_px:
            self._merge(self.pixels[top_px : top_px + self.overlap_px], weight)
        self.weight = weight
        self.filled_px = top_px + self.tile_px

    def _lay(self, rows: Pixels, tile: Pixels, left_px: int, joined: bool) -> None:
        """Put one tile into rows, blended with its left neighbor where there is one."""
        seam_px = left_px + (self.overlap_px if joined else 0)
        if joined:
            strip = rows[:, left_px:seam_px]
            width_px = strip.shape[1]
            _blend(strip, tile[:, :width_px], self.ramp_x[:, : 3 * width_px])
        target = rows[:, seam_px : left_px + self.tile_px]
        target[:] = tile[:, seam_px - left_px :][:, : target.shape[1]]

    def _weigh(self, weight: Weights, left_px: int) -> None:
        """Add the x weight of one tile; a tile's outer strips count as ramps until they meet."""
        up, stride_px = self.ramp, self.tile_px - self.overlap_px
        for start_px, part in (
            (left_px, up),
            (left_px + self.overlap_px, np.ones(stride_px - self.overlap_px, np.float32)),
            (left_px + stride_px, 1 - up),
        ):
            target = weight[start_px : start_px + len(part)]
            target += part[: len(target)]

    def _merge(self, strip: Pixels, weight: Weights) -> None:
        """Blend the head of a tile row into the strip that it shares with the row above."""
        above, below = self.weight, weight
        state = np.full(self.width_px, MIXED, np.uint8)
        state[above == below] = EVEN
        state[below == 0] = ABOVE
        state[above == 0] = BELOW
        state[(above == 0) & (below == 0)] = NONE
        ramp_y = self.ramp[:, None]
        for start_px, stop_px in _runs(state == EVEN):
            columns = slice(start_px, stop_px)
            _blend(strip[:, columns], self.head[:, columns], ramp_y)
        for start_px, stop_px in _runs(state == MIXED):
            columns = slice(start_px, stop_px)
            new = ramp_y * below[columns]
            share = new / (new + (1 - ramp_y) * above[columns])
            _blend(strip[:, columns], self.head[:, columns], np.repeat(share, 3, axis=1))
        for start_px, stop_px in _runs(state == BELOW):
            strip[:, start_px:stop_px] = self.head[:, start_px:stop_px]

    def hand_over(self, rows_px: int) -> Pixels:
        """Give away the upper rows and go on with a canvas that starts below them."""
        full, self.pixels = self.pixels, self._empty()
        self.filled_px = max(0, self.filled_px - self.band_px)
        self.pixels[: self.filled_px] = full[self.band_px : self.band_px + self.filled_px]
        return full[:rows_px]


def _sound(tile: Pixels, index: int, tile_px: int) -> Pixels:
    if tile.shape != (tile_px, tile_px, 3) or tile.dtype != np.uint8:
        raise OutputError(
            f"Tile {index} is {tile.dtype} {tile.shape}, not uint8 ({tile_px}, {tile_px}, 3)."
        )
    return tile


def _blend(old: Pixels, new: Pixels, share: Weights) -> None:
    """Mix a share of `new` into `old`, both (h, w, 3), rounded to the nearest level.

    `share`, 0..1, has shape (h or 1, 3 w or 1): numpy is faster on long rows than on a last axis
    of three channels.
    """
    flat = new.reshape(len(new), -1)
    kept = old.reshape(len(old), -1)
    mixed = flat.astype(np.float32)
    mixed -= kept
    mixed *= share
    mixed += kept
    mixed += 0.5  # truncation then rounds, as all values are positive
    old[:] = mixed.astype(np.uint8).reshape(old.shape)


def _runs(flags: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Give start and stop of each run of true values, flags (W,)."""
    edges = np.flatnonzero(np.diff(flags, prepend=False, append=False))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]
