"""One pyramid file that every reader opens right, written in one pass from bands of rows.

Room 4 of 4. In: size, bands, pixel size, settings. Out: a BigTIFF that is OME-TIFF for
Bio-Formats and QuPath, and a plain tiled pyramid for OpenSlide and the rest. Not here: patches,
stitching.

OME readers look for the levels in SubIFDs of the first IFD, the others in the main chain of
IFDs. `tifffile` writes the first; then the `next` pointers are set so that the same IFDs are the
second, too.
"""

from __future__ import annotations

import os
import struct
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile

from wsi_stain.config import WriteConfig
from wsi_stain.errors import OutputError, WsiStainError
from wsi_stain.files import cannot_write, flush_to_disk, refuse_existing
from wsi_stain.geometry import Size, pyramid_sizes
from wsi_stain.write.levels import PyramidFeed
from wsi_stain.write.omexml import build_ome_xml

__all__ = ["PyramidFacts", "write_pyramid"]

Pixels = npt.NDArray[np.uint8]

DESCRIPTION = "virtual stain, research use only"
BLANK_COLORS = 64  # distinct one-color tiles worth remembering: glass is one


@dataclass(frozen=True)
class PyramidFacts:
    """What was written.

    Attributes
    ----------
    path
        The finished file.
    levels
        Level sizes, px, level 0 first.
    mpp_out
        Pixel size of level 0, um/px.
    n_tiles
        Tiles of all levels.
    n_bytes
        Size of the file.
    seconds
        Wall time, with the time spent waiting for bands.
    """

    path: Path
    levels: tuple[Size, ...]
    mpp_out: float
    n_tiles: int
    n_bytes: int
    seconds: float


def write_pyramid(
    path: Path,
    size: Size,
    bands: Iterable[Pixels],
    mpp_out: float,
    spec: WriteConfig,
    *,
    name: str,
    description: str = DESCRIPTION,
) -> PyramidFacts:
    """Write a pyramid; the file appears under its name only when it is whole and on disk.

    Memory bound: that of `PyramidFeed`, about four rows of tiles of full width; flat in the
    height. Disk: a third of the file again, beside it, while it is written.

    Parameters
    ----------
    path
        Output, ``*.ome.tiff``. Work happens in ``<path>.part`` in the same folder.
    size
        Size of level 0, px.
    bands
        uint8 (h, W, 3) of any h, RGB 0..255, top to bottom, `size` in all.
    mpp_out
        Pixel size, um/px.
    spec
        Codec, quality, tile side, and whether an existing file may be replaced.
    name, description
        Written into the OME-XML.

    Raises
    ------
    OutputError
        The file exists, the folder cannot be written, the disk is full, or the bands do not add
        up to `size`. Nothing is left behind. Errors of `bands` itself pass unchanged.
    """
    started_s = time.perf_counter()
    refuse_existing(path, overwrite=spec.overwrite)
    levels = tuple(pyramid_sizes(size))
    xml = build_ome_xml(name, size, mpp_out, description)
    part = path.with_name(path.name + ".part")
    source = _Guarded(bands)
    with _working_file(part, source):
        n_tiles = _write_levels(part, levels, source, xml, mpp_out, spec)
        with part.open("r+b") as file:
            _chain_levels(file, *_level_offsets(part))
            file.flush()
            os.fsync(file.fileno())
        n_bytes = part.stat().st_size
        refuse_existing(path, overwrite=spec.overwrite)
        part.replace(path)
        flush_to_disk(path.parent)
    return PyramidFacts(path, levels, mpp_out, n_tiles, n_bytes, time.perf_counter() - started_s)


class _Guarded:
    """Bands that remember their own failure, so that it is not blamed on the output file."""

    def __init__(self, bands: Iterable[Pixels]) -> None:
        self._bands = bands
        self.error: OSError | None = None

    def __iter__(self) -> Iterator[Pixels]:
        try:
            yield from self._bands
        except OSError as error:
            self.error = error
            raise


@contextmanager
def _working_file(part: Path, source: _Guarded) -> Iterator[None]:
    """Name the file in errors of the disk; remove it where it got no name of its own."""
    try:
        yield
    except OSError as error:
        if isinstance(error, WsiStainError) or error is source.error:
            raise
        raise cannot_write(part, error) from error
    finally:
        # The folder itself may be what failed; the first error is the one to tell.
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _write_levels(
    part: Path,
    levels: tuple[Size, ...],
    bands: Iterable[Pixels],
    xml: bytes,
    mpp_out: float,
    spec: WriteConfig,
) -> int:
    """Write all levels, level 0 first, and give the number of tiles."""
    threads = min(4, max(2, os.cpu_count() or 2))
    written = 0
    with (
        ThreadPoolExecutor(threads, thread_name_prefix="encode") as pool,
        tempfile.TemporaryFile(dir=part.parent, prefix=f".{part.name}.") as spool,
        tifffile.TiffWriter(part, bigtiff=True, byteorder="<", ome=False) as tiff,
    ):
        feed = PyramidFeed(list(levels), spec.tile_px, _Codec(spec).encode, pool, spool)
        for number, size in enumerate(levels):
            tiles = _Counted(feed.level0(bands) if number == 0 else feed.upper(number))
            tags = _tags(number, len(levels), size, mpp_out, spec)
            if number == 0:
                tags |= {"description": xml, "subifds": len(levels) - 1, "software": "wsi-stain"}
            tiff.write(tiles, **tags)
            # Asks for one tile more: this is where bands that are too long show up.
            tiles.finish(number, _n_tiles(size, spec.tile_px))
            written += tiles.count
    return written


def _tags(
    number: int, n_levels: int, size: Size, mpp_out: float, spec: WriteConfig
) -> dict[str, Any]:
    per_cm = 1e4 / (mpp_out * 2**number)
    tags: dict[str, Any] = {
        "shape": (size.height_px, size.width_px, 3),
        "dtype": np.uint8,
        "tile": (spec.tile_px, spec.tile_px),
        "metadata": None,
        "resolution": (per_cm, per_cm),
        "resolutionunit": "CENTIMETER",
        "subfiletype": 1 if number else 0,
        "software": False,
    }
    if spec.lossless:
        return tags | {"photometric": "rgb", "compression": "lzw"}
    # Tag 530 is (2, 2) over a 4:4:4 stream as well: decoders take the factors from the stream,
    # and Bio-Formats shows pink where the tag says (1, 1).
    return tags | {"photometric": "ycbcr", "subsampling": (2, 2), "compression": "jpeg"}


def _n_tiles(size: Size, tile_px: int) -> int:
    return -(-size.width_px // tile_px) * -(-size.height_px // tile_px)


class _Counted:
    """An iterator of tiles that knows how many it gave."""

    def __init__(self, tiles: Iterator[bytes]) -> None:
        self._tiles = tiles
        self.count = 0

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        tile = next(self._tiles)
        self.count += 1
        return tile

    def finish(self, number: int, expected: int) -> None:
        """Exhaust the iterator; anything but the expected count is an error."""
        for _ in self:
            pass
        if self.count != expected:
            raise OutputError(f"Level {number} got {self.count} tiles instead of {expected}.")


@dataclass(frozen=True)
class _Codec:
    """Encodes tiles; a tile of one color is encoded once, with the slower, smaller tables."""

    spec: WriteConfig
    blanks: dict[bytes, bytes] = field(default_factory=dict)

    def encode(self, tile: Pixels) -> bytes:
        """Give the bytes of a tile, uint8 (t, t, 3) contiguous; safe on several threads."""
        color = _single_color(tile)
        if color is None:
            return self._encode(tile, optimize=False)
        data = self.blanks.get(color)
        if data is None:
            data = self._encode(tile, optimize=True)
            if len(self.blanks) < BLANK_COLORS:
                self.blanks[color] = data
        return data

    def _encode(self, tile: Pixels, *, optimize: bool) -> bytes:
        if self.spec.lossless:
            return bytes(imagecodecs.lzw_encode(tile.tobytes()))
        return bytes(
            imagecodecs.jpeg8_encode(
                tile,
                level=self.spec.quality,
                colorspace="rgb",
                outcolorspace="ycbcr",
                subsampling=self.spec.subsampling.replace(":", ""),
                optimize=optimize,
            )
        )


def _single_color(tile: Pixels) -> bytes | None:
    """Give the color of a tile that has only one; looks at 64 pixels before looking at all."""
    step = max(1, len(tile) // 8)
    few = tile[::step, ::step].reshape(-1, 3)
    if (few != few[0]).any() or (tile[0] != few[0]).any() or (tile[1:] != tile[:1]).any():
        return None
    color: bytes = few[0].tobytes()
    return color


def _level_offsets(part: Path) -> tuple[int, ...]:
    """Give the file offsets of the IFDs of all levels, level 0 first."""
    with tifffile.TiffFile(part) as tiff:
        first = cast(tifffile.TiffPage, tiff.pages[0])
        return (first.offset, *(first.subifds or ()))


def _chain_levels(file: BinaryIO, *offsets: int) -> None:
    """Make the level IFDs the main chain.

    A BigTIFF IFD is an 8-byte entry count n, n entries of 20 bytes, then the offset of the next
    IFD. That offset is overwritten; the last one becomes 0. Doing it twice changes nothing.
    """
    for offset, following in zip(offsets, (*offsets[1:], 0), strict=True):
        file.seek(offset)
        (n_entries,) = struct.unpack("<Q", file.read(8))
        file.seek(offset + 8 + 20 * n_entries)
        file.write(struct.pack("<Q", following))
