"""Is this a sound pyramid? The file is opened again as a stranger would open it.

Room 4 of 4. In: a path, and what the file should show. Out: ok, problems, facts. Not here: the
rules (checks.py), how the file was written.

Two strangers look: `tifffile` for the structure, OpenSlide for what a viewer gets. This is the
one door to OpenSlide beside slides/image, because a check that shares code with a reader of
slides would be no stranger.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
import openslide
import tifffile

from wsi_stain.errors import DAMAGE, in_one_line
from wsi_stain.geometry import Region, Size
from wsi_stain.write import checks
from wsi_stain.write.checks import FileView, LevelView
from wsi_stain.write.omezarr_check import validate_omezarr
from wsi_stain.write.probes import (
    PROBE_LIMIT,
    Expected,
    Validation,
    check_content,
    check_levels_agree,
    difference,
    probes,
)

__all__ = ["Expected", "Validation", "validate"]

Pixels = npt.NDArray[np.uint8]

# What it finds becomes a problem of ours; tifffile's own lines would come on top of it.
logging.getLogger("tifffile").addHandler(logging.NullHandler())

TILES_PER_LEVEL = 16  # decoded, evenly spread, with the first and the last


def validate(path: Path, *, expected: Expected | None = None) -> Validation:
    """Check a pyramid: layout, tiles, pixel size, OME-XML, what OpenSlide sees, some pixels.

    Parameters
    ----------
    path
        The file, or the folder of an OME-Zarr. It is only read.
    expected
        What it should show.

    Returns
    -------
    Validation
        Never raises for a damaged, missing or foreign file: that is a problem like any other.
    """
    asked = expected or Expected()
    facts: dict[str, Any] = {"path": str(path)}
    try:
        if path.is_dir():
            return validate_omezarr(path, asked)
        if path.exists() and not path.is_file():  # a pipe would block for ever
            return Validation(False, ("it is no file, but a pipe or a device",), facts)
        with tifffile.TiffFile(path) as tiff:
            problems = _look(path, tiff, asked, facts)
    except FileNotFoundError:
        problems = ["there is no such file"]
    except DAMAGE as error:
        problems = [f"the file cannot be read as TIFF: {in_one_line(error)}"]
    return Validation(not problems, tuple(problems), facts)


def _look(path: Path, tiff: tifffile.TiffFile, asked: Expected, facts: dict[str, Any]) -> list[str]:
    pages = _level_pages(tiff)
    with path.open("rb") as file:
        view = _view(path, tiff, pages, file)
    first = view.levels[0]
    xml, problems = checks.check_xml(view)
    problems += checks.check_layout(view)
    for number, level in enumerate(view.levels):
        problems += checks.check_level(number, level)
        problems += checks.check_tiles(number, level, view.n_bytes)
    problems += checks.check_frame(view.levels, xml, asked.size, asked.mpp_out)
    facts |= {
        "bytes": view.n_bytes,
        "levels": [list(level.size) for level in view.levels],
        "tile_px": list(first.tile_size),
        "tiles": int(sum(len(level.counts) for level in view.levels)),
        "codec": checks.READABLE_CODECS.get(first.codec, str(first.codec)),
        "mpp": first.mpp,
        "name": xml.name if xml else "",
    }
    readers = [_LevelReader(page, level) for page, level in zip(pages, view.levels, strict=True)]
    problems += _check_pixels(readers, facts)
    if not problems:
        # A file with such faults would only make these repeat them in other words.
        problems += _check_openslide(path, view, readers, facts)
        problems += check_levels_agree(readers)
        problems += check_content(readers[0], asked, facts)
    return problems


# ---- structure ------------------------------------------------------------------------------


def _level_pages(tiff: tifffile.TiffFile) -> list[tifffile.TiffPage]:
    """Give the pages of all levels: IFD 0 with its SubIFDs, else the main chain."""
    first = cast(tifffile.TiffPage, tiff.pages[0])
    others = first.pages if first.subifds else tiff.pages[1:]
    return [first, *(cast(tifffile.TiffPage, page) for page in others or ())]


def _view(
    path: Path, tiff: tifffile.TiffFile, pages: list[tifffile.TiffPage], file: BinaryIO
) -> FileView:
    first = pages[0]
    return FileView(
        n_bytes=path.stat().st_size,
        description=first.description,
        chain=tuple(page.offset for page in tiff.pages),
        subifds=tuple(first.subifds or ()),
        levels=tuple(_level_view(page, file) for page in pages),
    )


def _level_view(page: tifffile.TiffPage, file: BinaryIO) -> LevelView:
    offsets = np.array(page.dataoffsets, np.int64)
    counts = np.array(page.databytecounts, np.int64)
    tails = offsets + np.maximum(counts - 2, 0)
    subsampling = page.tags.get("YCbCrSubSampling")
    return LevelView(
        ifd=page.offset,
        size=Size(page.imagewidth, page.imagelength),
        tile_size=Size(page.tilewidth, page.tilelength),
        samples=page.samplesperpixel,
        bits=int(page.bitspersample),
        photometric=int(page.photometric),
        codec=int(page.compression),
        mpp=_mpp(page),
        reduced=bool(page.subfiletype & 1),
        subsampling=None if subsampling is None else tuple(subsampling.value),
        offsets=offsets,
        counts=counts,
        heads=tuple(_two_bytes(file, int(offset)) for offset in offsets),
        tails=tuple(_two_bytes(file, int(offset)) for offset in tails),
    )


def _two_bytes(file: BinaryIO, offset: int) -> bytes:
    file.seek(offset)
    return file.read(2)


def _mpp(page: tifffile.TiffPage) -> float:
    """Pixel size from XResolution and its unit, um/px; 0 where they do not say."""
    um_per_unit = {2: 25400.0, 3: 1e4}.get(int(page.resolutionunit))
    per_unit = page.resolution[0]
    return um_per_unit / per_unit if um_per_unit and per_unit > 0 else 0.0


# ---- pixels ---------------------------------------------------------------------------------


class _LevelReader:
    """Decodes tiles and regions of one level; clean of any cache."""

    def __init__(self, page: tifffile.TiffPage, level: LevelView) -> None:
        self._page, self.level = page, level

    @property
    def size(self) -> Size:
        """Size of the level, px."""
        return self.level.size

    def tile(self, index: int) -> Pixels:
        """Decode a tile, uint8 (h, w, 3), cut to the level at its edge."""
        handle = self._page.parent.filehandle
        handle.seek(int(self.level.offsets[index]))
        data = handle.read(int(self.level.counts[index]))
        pixels, _, shape = self._page.decode(data, index, jpegtables=self._page.jpegtables)
        if pixels is None:
            raise ValueError("no pixels")
        return np.asarray(pixels[0, : shape[1], : shape[2]], np.uint8)

    def region(self, region: Region) -> Pixels:
        """Read a region, clipped to the level, uint8 (h, w, 3)."""
        clip = region.intersect(Region(0, 0, *self.level.size))
        out = np.zeros((clip.height_px, clip.width_px, 3), np.uint8)
        step_x, step_y = self.level.tile_size
        across = -(-self.level.size.width_px // step_x)
        for row in range(clip.y_px // step_y, -(-clip.bottom_px // step_y)):
            for column in range(clip.x_px // step_x, -(-clip.right_px // step_x)):
                place = Region(column * step_x, row * step_y, step_x, step_y)
                common = clip.intersect(place)
                out[_within(common, clip)] = self.tile(row * across + column)[
                    _within(common, place)
                ]
        return out


def _within(part: Region, whole: Region) -> tuple[slice, slice]:
    x_px, y_px = part.x_px - whole.x_px, part.y_px - whole.y_px
    return slice(y_px, y_px + part.height_px), slice(x_px, x_px + part.width_px)


def _check_pixels(readers: list[_LevelReader], facts: dict[str, Any]) -> Iterator[str]:
    """Decode some tiles of every level."""
    facts["decoded_tiles"] = 0
    for number, reader in enumerate(readers):
        n_tiles = len(reader.level.counts)
        chosen = np.unique(np.linspace(0, n_tiles - 1, min(n_tiles, TILES_PER_LEVEL)).astype(int))
        for index in chosen:
            try:
                reader.tile(int(index))
            except DAMAGE as error:
                yield f"level {number}: tile {index} cannot be decoded: {in_one_line(error)}"
                break
            facts["decoded_tiles"] += 1


# ---- OpenSlide ------------------------------------------------------------------------------


def _check_openslide(
    path: Path, view: FileView, readers: list[_LevelReader], facts: dict[str, Any]
) -> Iterator[str]:
    """Check what a viewer built on OpenSlide gets: levels, pixel size, pixels."""
    try:
        with openslide.OpenSlide(path) as slide:
            yield from _compare_openslide(slide, view, readers, facts)
    except openslide.OpenSlideError as error:
        yield f"OpenSlide cannot read it: {error}"


def _compare_openslide(
    slide: openslide.OpenSlide,
    view: FileView,
    readers: list[_LevelReader],
    facts: dict[str, Any],
) -> Iterator[str]:
    sizes = [Size(*size) for size in slide.level_dimensions]
    mpp = float(slide.properties.get(openslide.PROPERTY_NAME_MPP_X, "0"))
    facts["openslide"] = {"levels": len(sizes), "mpp": mpp}
    if sizes != [level.size for level in view.levels]:
        yield f"OpenSlide sees {len(sizes)} levels of {len(view.levels)}"
        return
    if not checks.close(mpp, view.levels[0].mpp):
        yield f"OpenSlide sees {mpp:.6g} um/px instead of {view.levels[0].mpp:.6g}"
    for number, reader in enumerate(readers):
        probe = probes(reader.size)[2]
        scale = slide.level_downsamples[number]
        place = (round(probe.x_px * scale), round(probe.y_px * scale))
        seen = np.asarray(slide.read_region(place, number, probe.size).convert("RGB"), np.uint8)
        off = difference(seen, reader.region(probe))
        if off > PROBE_LIMIT:
            yield f"OpenSlide shows other pixels at level {number}: {off:.0f} grey levels"
