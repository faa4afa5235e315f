"""All levels of a pyramid from one pass over its rows, encoded on a few threads.

Room 4 of 4. In: bands of rows of level 0, and a function that encodes a tile. Out: encoded tiles,
level 0 at once, the others from a spool file when level 0 is through. Not here: TIFF, codecs.

Rows gather until they fill a row of tiles; that row is cut and encoded, and its 2 x 2 mean is
handed down as rows of the next level. So every level grows at once and none is ever whole in
memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

import cv2
import numpy as np
import numpy.typing as npt

from wsi_stain.errors import OutputError
from wsi_stain.geometry import Size
from wsi_stain.slides.slide_facts import ONE_THREAD_PX

__all__ = ["PyramidFeed", "halve"]

Pixels = npt.NDArray[np.uint8]
Encode = Callable[[Pixels], bytes]


class PyramidFeed:
    """Turns bands into the encoded tiles of all levels.

    Memory bound: per level two rows of tiles (one gathers, one is being encoded) of full width;
    with the halving of widths that is four rows of tiles of level 0. Encoded tiles of the upper
    levels wait in the spool. Nothing else grows with the height, but some 100 bytes per tile.

    Parameters
    ----------
    sizes
        Level sizes, px, level 0 first, each half of the one before, rounded up.
    tile_px
        Side of a tile, px, even.
    encode
        Gives the bytes of a tile, uint8 (tile_px, tile_px, 3); called from several threads.
    pool
        Threads that encode.
    spool
        Private file for the tiles of levels 1 and up.
    """

    def __init__(
        self,
        sizes: list[Size],
        tile_px: int,
        encode: Encode,
        pool: ThreadPoolExecutor,
        spool: BinaryIO,
    ) -> None:
        self._levels = [_Level(size, tile_px) for size in sizes]
        self._tile_px = tile_px
        self._encode = encode
        self._pool = pool
        self._spool = spool

    def level0(self, bands: Iterable[Pixels]) -> Iterator[bytes]:
        """Consume the bands and give the tiles of level 0, row-major.

        Parameters
        ----------
        bands
            uint8 (h, W, 3) of any h, top to bottom.

        Raises
        ------
        OutputError
            A band has the wrong shape, there are too few or too many rows, or a tile is empty.
        """
        size = self._levels[0].size
        done_px = 0
        for band in bands:
            _check_band(band, size, done_px)
            done_px += len(band)
            yield from self._push(0, band)
        if done_px != size.height_px:
            raise OutputError(f"The bands end after {done_px} rows of {size.height_px}.")
        for number, level in enumerate(self._levels):
            yield from self._cut(number, level.take())
            yield from self._settle(number, keep_rows=0)

    def upper(self, number: int) -> Iterator[bytes]:
        """Give the tiles of level `number` >= 1, row-major; call when `level0` is through."""
        for offset, count in self._levels[number].spooled:
            self._spool.seek(offset)
            yield self._spool.read(count)

    def _push(self, number: int, rows: Pixels) -> Iterator[bytes]:
        """Add rows to a level, and through it to the levels above."""
        for tile_row in self._levels[number].gather(rows):
            yield from self._cut(number, tile_row)
            yield from self._settle(number, keep_rows=1)

    def _cut(self, number: int, rows: Pixels) -> Iterator[bytes]:
        """Send a row of tiles to the threads, and its mean to the next level."""
        if not len(rows):
            return
        level, tile_px = self._levels[number], self._tile_px
        starts = range(0, level.size.width_px, tile_px)
        level.pending.append(
            [
                self._pool.submit(self._encode_part, rows[:, start : start + tile_px])
                for start in starts
            ]
        )
        if number + 1 < len(self._levels):
            yield from self._push(number + 1, halve(rows))

    def _encode_part(self, part: Pixels) -> bytes:
        return self._encode(_fill(part, self._tile_px))

    def _settle(self, number: int, keep_rows: int) -> Iterator[bytes]:
        """Take finished rows of tiles; only `keep_rows` may go on being encoded."""
        level = self._levels[number]
        while len(level.pending) > keep_rows:
            for future in level.pending.popleft():
                data = future.result()
                if not data:
                    raise OutputError(f"Level {number}: the encoder gave an empty tile.")
                if number == 0:
                    yield data
                else:
                    level.spooled.append((self._spool.seek(0, 2), len(data)))
                    self._spool.write(data)


class _Level:
    """Rows of one level that do not fill a row of tiles yet, and what became of the others."""

    def __init__(self, size: Size, tile_px: int) -> None:
        self.size = size
        self.tile_px = tile_px
        self.pending: deque[list[Future[bytes]]] = deque()
        self.spooled: list[tuple[int, int]] = []  # offset, count
        self._rows: Pixels | None = None
        self._n_rows = 0

    def gather(self, rows: Pixels) -> Iterator[Pixels]:
        """Add rows; give each full row of tiles, uint8 (tile_px, W, 3)."""
        start = 0
        while start < len(rows):
            if self._n_rows == 0 and len(rows) - start >= self.tile_px:
                yield rows[start : start + self.tile_px]  # the common case: no copy
                start += self.tile_px
                continue
            if self._rows is None:
                self._rows = np.empty((self.tile_px, self.size.width_px, 3), np.uint8)
            part = rows[start : start + self.tile_px - self._n_rows]
            self._rows[self._n_rows : self._n_rows + len(part)] = part
            self._n_rows += len(part)
            start += len(part)
            if self._n_rows == self.tile_px:
                yield self.take()

    def take(self) -> Pixels:
        """Give the rows gathered so far, at the end fewer than a row of tiles."""
        rows, n_rows = self._rows, self._n_rows
        # The threads still read the old rows: the next ones need an array of their own.
        self._rows, self._n_rows = None, 0
        return np.empty((0, self.size.width_px, 3), np.uint8) if rows is None else rows[:n_rows]


def halve(rows: Pixels) -> Pixels:
    """Take the 2 x 2 mean, rounded half up: ``(sum + 2) >> 2``.

    Parameters
    ----------
    rows
        uint8 (h, w, 3). An odd last row or column is repeated first.

    Returns
    -------
    ndarray
        uint8 (ceil(h / 2), ceil(w / 2), 3).
    """
    height_px, width_px = rows.shape[:2]
    if height_px % 2 or width_px % 2:
        pad = (0, height_px % 2, 0, width_px % 2)
        rows = np.asarray(cv2.copyMakeBorder(rows, *pad, cv2.BORDER_REPLICATE), np.uint8)
    half = np.empty((rows.shape[0] // 2, rows.shape[1] // 2, 3), np.uint8)
    step_px = max(1, ONE_THREAD_PX // half.shape[1])
    for top_px in range(0, len(half), step_px):
        part = half[top_px : top_px + step_px]
        source = rows[2 * top_px : 2 * (top_px + len(part))]
        cv2.resize(source, part.shape[1::-1], dst=part, interpolation=cv2.INTER_AREA)
    return half


def _fill(part: Pixels, tile_px: int) -> Pixels:
    """Repeat the last row and column of a tile at the edge: black would bleed into JPEG blocks."""
    height_px, width_px = part.shape[:2]
    if (height_px, width_px) == (tile_px, tile_px):
        return np.ascontiguousarray(part)
    pad = ((0, tile_px - height_px), (0, tile_px - width_px), (0, 0))
    return np.pad(part, pad, mode="edge")


def _check_band(band: Pixels, size: Size, done_px: int) -> None:
    if band.dtype != np.uint8 or band.ndim != 3 or band.shape[1:] != (size.width_px, 3):
        raise OutputError(
            f"The band at row {done_px} is {band.dtype} {band.shape}, not uint8 "
            f"(h, {size.width_px}, 3)."
        )
    if done_px + len(band) > size.height_px:
        raise OutputError(
            f"The bands reach row {done_px + len(band)}, but the picture has {size.height_px}."
        )
