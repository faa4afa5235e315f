"""Read regions of tiled and stripped TIFF straight from the file, only the tiles needed.

Room 1 of 4. In: a TIFF path, a region. Out: uint8 RGB. Not here: vendor formats (OpenSlide), mpp
decisions, resampling.

OME-TIFF comes through here because OpenSlide sees one level of it or none, as do TIFFs whose
codec OpenSlide lacks (JPEG 2000, WebP), and the tiled TIFF and SVS levels that OpenSlide would
shift by a fraction of a pixel.
"""

from __future__ import annotations

import errno
import logging
import math
import struct
from collections import OrderedDict
from collections.abc import Set
from contextlib import ExitStack
from numbers import Integral
from pathlib import Path
from typing import cast

import numpy as np
import tifffile

from wsi_stain.errors import DAMAGE, SlideError, in_one_line
from wsi_stain.geometry import Region, Size
from wsi_stain.slides.missing import UNDECODABLE, Cell, cells_of, tile_error
from wsi_stain.slides.ome_facts import ome_pixel_sizes, ome_power
from wsi_stain.slides.pixel_size import PixelSize, from_power, from_resolution
from wsi_stain.slides.slide_facts import Level, Pixels, SlideFacts, true_downsample
from wsi_stain.slides.streams import stream_fault

__all__ = ["TiffBackend", "TiffPageReader", "check_directories", "damaged", "is_tiff"]

# What is wrong with a file becomes an error of ours; tifffile's own lines would come on top of it
# and may quote tags. Whoever wants them sets up logging.
logging.getLogger("tifffile").addHandler(logging.NullHandler())

CLASSIC = 42  # and 43 is BigTIFF
LARGEST_SEGMENT_BYTES = 256 * 2**20
_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_NOT_SLIDES = frozenset({"label", "macro", "thumbnail", "overview", "map"})


def is_tiff(path: Path) -> bool:
    """Tell by the first four bytes whether a file is classic or Big TIFF."""
    with path.open("rb") as file:
        return file.read(4) in _MAGIC


class TiffPageReader:
    """Read regions of one TIFF page (one level).

    Parameters
    ----------
    page
        Page of uint8 RGB, pixels interleaved.
    background
        RGB of tiles that the file leaves out.
    cache_bytes
        Bound of decoded tiles kept: neighboring regions share tiles.
    level
        Its number, for errors.
    left_out
        Tiles that are background; read at each call.

    Notes
    -----
    Memory bound: `cache_bytes`, one decoded tile (at most 256 MiB), and the region.
    """

    def __init__(
        self,
        page: tifffile.TiffPage,
        background: tuple[int, int, int],
        cache_bytes: int,
        *,
        level: int,
        left_out: Set[Cell],
    ) -> None:
        _check_page(page)
        self._page = page
        self._level = level
        self._left_out = left_out
        self._background = np.array(background, np.uint8)
        self._cache: OrderedDict[int, Pixels] = OrderedDict()
        height_px, width_px = page.chunks[0], page.chunks[1]
        self._tile_hw = (int(height_px), int(width_px))
        self._n_kept = max(2, cache_bytes // (3 * int(height_px) * int(width_px)))

    def read(self, region: Region) -> Pixels:
        """Read a region that lies inside the page, as uint8 (h, w, 3) RGB."""
        out = np.empty((region.height_px, region.width_px, 3), np.uint8)
        for cell in cells_of(self._level, region, Size(*self._tile_hw[::-1])):
            part = region.intersect(cell.region)
            out[_slices(part, region)] = self._tile(cell)[_slices(part, cell.region)]
        return out

    def _tile(self, cell: Cell) -> Pixels:
        if cell in self._left_out:
            return np.broadcast_to(self._background, (*self._tile_hw, 3))
        index = cell.row * -(-self._page.imagewidth // self._tile_hw[1]) + cell.column
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index]
        tile = self._cache[index] = self._decode(index, cell)
        while len(self._cache) > self._n_kept:
            self._cache.popitem(last=False)
        return tile

    def _decode(self, index: int, cell: Cell) -> Pixels:
        page = self._page
        if page.databytecounts[index] == 0:
            return np.broadcast_to(self._background, (*self._tile_hw, 3))
        data = self._bytes(index, cell)
        options = {}
        if page.jpegtables is not None or page.jpegheader is not None:
            options = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
        name = page.parent.filehandle.path
        if fault := stream_fault(data, page.compression):
            raise tile_error(name, cell, fault)
        try:
            segment, _, _ = page.decode(data, index, **options)
        except DAMAGE as error:
            raise tile_error(name, cell, UNDECODABLE, in_one_line(error)) from error
        if segment is None:
            raise tile_error(name, cell, "it is empty")
        return cast(Pixels, segment[0])

    def _bytes(self, index: int, cell: Cell) -> bytes:
        """Read a tile's stream; a bad block of the disk costs the tile, a lost file all."""
        file, n_bytes = self._page.parent.filehandle, self._page.databytecounts[index]
        try:
            file.seek(self._page.dataoffsets[index])
            data = bytes(file.read(n_bytes))
        except OSError as error:
            if error.errno == errno.EIO:
                raise tile_error(file.path, cell, "input/output error") from error
            raise SlideError(
                f"Slide {file.path} cannot be read any more: {error.strerror or error}."
            ) from error
        if len(data) < n_bytes:
            raise SlideError(
                f"Slide {file.path} was cut while it was read: {n_bytes:,} bytes are missing at "
                f"{self._page.dataoffsets[index] + len(data):,}.",
                hint="Type the same command again when the slide is whole.",
            )
        return data


class TiffBackend:
    """A TIFF slide, read without OpenSlide.

    Parameters
    ----------
    path
        TIFF file.
    cache_mb
        Bound of decoded tiles kept, over all levels.

    Raises
    ------
    SlideError
        Damaged, truncated, or not 8-bit RGB.
    """

    def __init__(self, path: Path, cache_mb: int) -> None:
        self.left_out: set[Cell] = set()
        try:
            self._file = tifffile.TiffFile(path)
        except DAMAGE as error:
            raise damaged(path, error) from error
        with ExitStack() as on_error:
            on_error.callback(self._file.close)
            try:
                self._read_structure(path, cache_mb)
            except SlideError:
                raise
            except DAMAGE as error:
                raise damaged(path, error) from error
            on_error.pop_all()

    def _read_structure(self, path: Path, cache_mb: int) -> None:
        pages = [level.keyframe for level in _largest_series(path, self._file).levels]
        self.facts = _facts(self._file, pages)
        self._readers = [
            TiffPageReader(
                page,
                self.facts.background,
                cache_mb * 2**20 // len(pages),
                level=level,
                left_out=self.left_out,
            )
            for level, page in enumerate(pages)
        ]

    def read(self, level: int, region: Region) -> Pixels:
        """Read a region that lies inside a level, as uint8 (h, w, 3) RGB."""
        return self._readers[level].read(region)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def check_directories(path: Path, file: tifffile.TiffFile) -> None:
    """Refuse a file whose directories lead beyond its end: what came after was cut off.

    Libraries take those that are left for the whole slide.

    Raises
    ------
    SlideError
        Cut off.
    """
    form, handle = file.tiff, file.filehandle

    def number_at(place: int, code: str) -> int:
        size_bytes = struct.calcsize(code)
        if place + size_bytes > handle.size:
            raise SlideError(
                f"Slide {path} is truncated: it has {handle.size} bytes, and a directory of its "
                f"pictures at {place}.",
                hint="Copy it again.",
            )
        handle.seek(place)
        return int(struct.unpack(code, handle.read(size_bytes))[0])

    seen: set[int] = set()
    place = number_at(4 if form.version == CLASSIC else 8, form.offsetformat)
    while place and place not in seen:
        seen.add(place)
        n_tags = number_at(place, form.tagnoformat)
        place = number_at(place + form.tagnosize + n_tags * form.tagsize, form.offsetformat)


def damaged(path: Path, error: Exception) -> SlideError:
    """Word what tifffile says of a file that it cannot read."""
    said = in_one_line(error).rstrip(".")
    return SlideError(f"Slide {path} is a damaged TIFF: {said}.", hint="Copy it again.")


def _facts(file: tifffile.TiffFile, pages: list[tifffile.TiffPage]) -> SlideFacts:
    sizes = [Size(page.imagewidth, page.imagelength) for page in pages]
    xml = file.ome_metadata or ""
    power = ome_power(xml, sizes[0])
    icc = pages[0].tags.get(34675)
    return SlideFacts(
        format="OME-TIFF" if file.is_ome else "TIFF",
        size_l0=sizes[0],
        origin_l0=(0, 0),
        levels=tuple(Level(size, true_downsample(sizes[0], size)) for size in sizes),
        pixel_sizes=(
            *ome_pixel_sizes(xml, sizes[0]),
            *_page_pixel_sizes(pages[0]),
            *from_power(power),
        ),
        objective_power=power,
        background=(255, 255, 255),
        icc=bytes(icc.value) if icc is not None else None,
        missing_pieces=pages[0].databytecounts.count(0),
    )


def _slices(part: Region, frame: Region) -> tuple[slice, slice]:
    x_px, y_px = part.x_px - frame.x_px, part.y_px - frame.y_px
    return slice(y_px, y_px + part.height_px), slice(x_px, x_px + part.width_px)


def _largest_series(path: Path, file: tifffile.TiffFile) -> tifffile.TiffPageSeries:
    """Choose the slide among a file's pictures; label and macro may name a patient."""
    # tifffile takes a tile's size where a page says 0, and the series is then another picture.
    first = file.pages.first
    if not all(first.tags.valueof(code) for code in (256, 257)):
        raise SlideError(f"Slide {path} is damaged: its first picture has no size.")
    pictures = [series for series in file.series if series.name.lower() not in _NOT_SLIDES]
    if not pictures:
        raise SlideError(f"Slide {path} holds no picture.")
    series = max(pictures, key=lambda item: math.prod(item.shape))
    if series.dtype != np.uint8 or series.axes != "YXS" or series.shape[-1] != 3:
        raise SlideError(
            f"Slide {path} is not 8-bit RGB: shape {series.shape} ({series.axes}), {series.dtype}.",
            hint="Only brightfield H&E can be translated; fluorescence and raw planes cannot.",
        )
    return series


def _check_page(page: tifffile.TiffPage) -> None:
    """Refuse pages that would read wrong, or not at all."""
    name = page.parent.filehandle.path
    size = Size(page.imagewidth, page.imagelength)
    if page.photometric not in (2, 6) or page.samplesperpixel != 3:
        raise SlideError(
            f"Slide {name} is not RGB: its colors are {page.photometric!r}, "
            f"{page.samplesperpixel} samples per pixel."
        )
    if not isinstance(page.compression, int):
        raise SlideError(f"Slide {name} is damaged: it names {page.compression!r} as its codec.")
    _check_pieces(page, name, size)
    segment_bytes = 3 * page.chunks[0] * page.chunks[1]
    if segment_bytes > LARGEST_SEGMENT_BYTES:
        raise SlideError(
            f"Slide {name} ({size}) is not tiled: one piece has {segment_bytes / 2**20:.0f} MiB, "
            f"at most {LARGEST_SEGMENT_BYTES // 2**20} can be read.",
            hint=f"Convert it: vips tiffsave {name} tiled.tif --tile --pyramid --bigtiff",
        )
    kinds = {*map(type, page.dataoffsets), *map(type, page.databytecounts)}
    if odd := [kind.__name__ for kind in kinds if not issubclass(kind, Integral)]:
        raise SlideError(
            f"Slide {name} is damaged: it gives places of its pixels as {odd[0]}.",
            hint="Copy it again.",
        )
    end = max(
        (
            offset + count
            for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)
        ),
        default=0,
    )
    if end > page.parent.filehandle.size:
        raise SlideError(
            f"Slide {name} is truncated: it has {page.parent.filehandle.size} bytes, "
            f"its pixels end at {end}.",
            hint="Copy it again.",
        )


def _check_pieces(page: tifffile.TiffPage, name: str, size: Size) -> None:
    """Refuse a page whose list of pieces does not fit its size: either may be wrong."""
    if page.is_tiled:
        across, down = page.tilewidth, page.tilelength
    else:
        across, down = page.imagewidth, min(page.rowsperstrip, page.imagelength)
    if 0 in (*size, across, down):
        raise SlideError(f"Slide {name} is damaged: pieces of {across} x {down} px in {size}.")
    expected = -(-size.width_px // across) * -(-size.height_px // down)
    listed = (len(page.dataoffsets), len(page.databytecounts))
    if listed != (expected, expected):
        raise SlideError(
            f"Slide {name} is damaged: a level of {size} needs {expected} pieces of "
            f"{across} x {down} px, {listed[0]} places and {listed[1]} lengths are listed.",
            hint="Copy it again, or check it with its scanner's viewer.",
        )


def _page_pixel_sizes(page: tifffile.TiffPage) -> list[PixelSize]:
    tags = [page.tags.get(code) for code in (282, 283, 296)]
    if any(tag is None for tag in tags):
        return []
    x_res, y_res, unit = (tag.value for tag in tags if tag is not None)
    if not (x_res[1] and y_res[1]):
        return []
    return from_resolution("tiff.XResolution", x_res[0] / x_res[1], y_res[0] / y_res[1], unit.name)
