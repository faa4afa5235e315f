"""Open a slide with OpenSlide, or read a TIFF straight where that is better.

Room 1 of 4. In: a path. Out: a `Backend`. Not here: mpp decisions, resampling, color profiles'
use. The label and macro pictures are never read: they may name a patient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import openslide
import tifffile
from PIL import Image, ImageCms

from wsi_stain.errors import DAMAGE, SlideError, in_one_line
from wsi_stain.geometry import Region, Size
from wsi_stain.slides.missing import UNDECODABLE, Cell, cells_of, tile_error
from wsi_stain.slides.pixel_size import PixelSize, from_power, from_resolution
from wsi_stain.slides.slide_facts import (
    ONE_THREAD_PX,
    Backend,
    Level,
    Pixels,
    SlideFacts,
    check_sizes,
    true_downsample,
)
from wsi_stain.slides.tiff_read import (
    TiffBackend,
    TiffPageReader,
    check_directories,
    damaged,
    is_tiff,
)
from wsi_stain.slides.zarr_read import ZarrBackend

__all__ = ["OpenSlideBackend", "open_backend"]

# OpenSlide reads level px at round(l0 / downsample): beside a whole pixel it interpolates.
LARGEST_SHIFT_PX = 0.01
SHIFT_MARGIN_PX = 4
BLOCK_PX = 512
LARGEST_CELL_PX = 2**22
_OPAQUE = 0xFF000000  # the alpha of RGBA as a little-endian number
# Codecs that decode to the same pixels without OpenSlide: none, LZW, JPEG, deflate, Aperio RGB
# JPEG 2000. Not 33003: its YCbCr needs OpenSlide's conversion.
_DIRECT_CODECS = frozenset({1, 5, 7, 8, 32946, 33005})
_VENDOR_ONLY = ("is_ndpi", "is_scn", "is_bif", "is_philips")


def open_backend(path: Path, cache_mb: int) -> Backend:
    """Open a slide with the library that reads it right.

    Raises
    ------
    SlideError
        No library reads the file; the text says why.
    """
    if path.is_dir():
        return _checked(path, ZarrBackend(path))
    tiff = _tiff_kind(path)
    if tiff == "ome":
        return _checked(path, TiffBackend(path, cache_mb))
    try:
        slide = openslide.OpenSlide(path)
    except (openslide.OpenSlideError, openslide.OpenSlideUnsupportedFormatError) as error:
        if tiff == "plain":
            # It words what is wrong better than OpenSlide; but what is wrong for OpenSlide alone,
            # as a lost directory, is wrong for us.
            backend = _checked(path, TiffBackend(path, cache_mb))
            if _lacks_format(error):
                return backend
            backend.close()
        raise _refused(path, error, tiff) from error
    return _checked(path, OpenSlideBackend(path, slide, cache_mb))


class OpenSlideBackend:
    """A slide opened with OpenSlide.

    Tiled TIFF and SVS pixels come straight from the file where the codec allows: the same bits,
    about 3 times faster, and exact on levels whose downsample is 4.0001 to OpenSlide.
    """

    def __init__(self, path: Path, slide: openslide.OpenSlide, cache_mb: int) -> None:
        self._path = path
        self._cache_mb = cache_mb
        self._slide = slide
        self.left_out: set[Cell] = set()
        slide.set_cache(openslide.OpenSlideCache(cache_mb * 2**20))
        sizes = [Size(*dimensions) for dimensions in slide.level_dimensions]
        self.facts = _facts(slide, dict(slide.properties), sizes)
        self._direct_file: tifffile.TiffFile | None = None
        self._direct: list[TiffPageReader] = []
        if self.facts.format in ("aperio", "generic-tiff"):
            with ExitStack() as on_error:
                on_error.callback(self.close)
                try:
                    self._open_direct(sizes, cache_mb)
                except SlideError:
                    raise
                except DAMAGE as error:
                    raise damaged(path, error) from error
                on_error.pop_all()

    def read(self, level: int, region: Region) -> Pixels:
        """Read a region that lies inside a level's whole grid, as uint8 (h, w, 3) RGB."""
        if self._direct:
            return self._direct[level].read(region)
        factor = self._slide.level_downsamples[level]
        shift = max(abs(round(at * factor) / factor - at) for at in (region.x_px, region.y_px))
        if shift > LARGEST_SHIFT_PX:
            return self._read_unshifted(level, region)
        return self._read_rgb(level, region)

    def close(self) -> None:
        """Close the file."""
        self._slide.close()
        if self._direct_file is not None:
            self._direct_file.close()

    def _read_unshifted(self, level: int, region: Region) -> Pixels:
        """Undo the fraction of a pixel by which OpenSlide moves a reduced level.

        Beside a tile that is left out, tiles are read one by one, and half a pixel may stay.
        """
        factor = self._slide.level_downsamples[level]
        wide = _grow(region, SHIFT_MARGIN_PX)
        left_px = region.x_px - round(wide.x_px * factor) / factor
        top_px = region.y_px - round(wide.y_px * factor) / factor
        box = (left_px, top_px, left_px + region.width_px, top_px + region.height_px)
        pixels = Image.fromarray(self._read_rgb(level, wide))
        return np.asarray(pixels.resize(region.size, Image.Resampling.LANCZOS, box=box))

    def _read_rgb(self, level: int, region: Region) -> Pixels:
        cells = {cell for cell in self.left_out if cell.level == level}
        if not any(0 not in region.intersect(cell.region).size for cell in cells):
            try:
                return self._read_blocks(level, region)
            except openslide.OpenSlideError:
                self._reopen()  # after an error OpenSlide says no more; then find the tile
        return self._read_cells(level, region, cells)

    def _read_blocks(self, level: int, region: Region) -> Pixels:
        """Read a region in blocks, whose buffers stay in the processor's cache.

        Where a level's px are no whole px of level 0, a block would not begin where it should.
        """
        factor = self._slide.level_downsamples[level]
        out = np.empty((region.height_px, region.width_px, 3), np.uint8)
        for block in _columns(region, BLOCK_PX) if factor == round(factor) else [region]:
            x_px = block.x_px - region.x_px
            rgba = self._read_rgba(level, block)
            self._lay(rgba, out[:, x_px : x_px + block.width_px])
        return out

    def _read_cells(self, level: int, region: Region, cells: set[Cell]) -> Pixels:
        """Read a region tile by tile, without those that are left out."""
        picture = Image.new("RGBA", region.size)
        for cell in cells_of(level, region, self._tile_size(level)):
            part = region.intersect(cell.region)
            if cell in cells:
                continue
            try:
                pixels = self._read_rgba(level, part)
            except openslide.OpenSlideError as error:
                self._reopen()
                raise tile_error(self._path, cell, UNDECODABLE, in_one_line(error)) from error
            picture.paste(pixels, (part.x_px - region.x_px, part.y_px - region.y_px))
        out = np.empty((region.height_px, region.width_px, 3), np.uint8)
        self._lay(picture, out)
        return out

    def _read_rgba(self, level: int, region: Region) -> Image.Image:
        factor = self._slide.level_downsamples[level]
        place_l0 = (round(region.x_px * factor), round(region.y_px * factor))
        return self._slide.read_region(place_l0, level, region.size)

    def _lay(self, rgba: Image.Image, out: Pixels) -> None:
        """Put a picture, where it is not opaque laid on the background, into uint8 (h, w, 3)."""
        pixels = np.asarray(rgba)
        if np.bitwise_and.reduce(pixels.reshape(-1).view("<u4")) < _OPAQUE:
            opaque = Image.new("RGBA", rgba.size, (*self.facts.background, 255))
            opaque.alpha_composite(rgba)
            pixels = np.asarray(opaque)
        step_px = max(1, ONE_THREAD_PX // rgba.width)
        for top_px in range(0, rgba.height, step_px):
            rows = slice(top_px, top_px + step_px)
            cv2.cvtColor(pixels[rows], cv2.COLOR_RGBA2RGB, dst=out[rows])

    def _tile_size(self, level: int) -> Size:
        """Tell how the file cuts a level; where it does not say, or cuts whole rows, blocks."""
        names = (f"openslide.level[{level}].tile-{side}" for side in ("width", "height"))
        width_px, height_px = (int(self._slide.properties.get(name, 0)) for name in names)
        if 0 < width_px * height_px <= LARGEST_CELL_PX:
            return Size(width_px, height_px)
        return Size(BLOCK_PX, BLOCK_PX)

    def _reopen(self) -> None:
        self._slide.close()
        try:
            self._slide = openslide.OpenSlide(self._path)
        except (openslide.OpenSlideError, OSError) as error:
            raise _refused(self._path, error, "") from error
        self._slide.set_cache(openslide.OpenSlideCache(self._cache_mb * 2**20))

    def _open_direct(self, sizes: list[Size], cache_mb: int) -> None:
        """Take the direct way when every level is a page that decodes to the same pixels."""
        file = self._direct_file = tifffile.TiffFile(self._path)
        _check_depth(self._path, file)
        pages = {
            Size(page.imagewidth, page.imagelength): page
            for page in file.pages
            if isinstance(page, tifffile.TiffPage) and _is_direct(page)
        }
        missing = [
            page.databytecounts.count(0)
            for page in file.pages
            if isinstance(page, tifffile.TiffPage)
            and (page.imagewidth, page.imagelength) == sizes[0]
        ]
        self.facts = replace(self.facts, missing_pieces=max(missing, default=0))
        if all(size in pages for size in sizes):
            self._direct = [
                TiffPageReader(
                    pages[size],
                    self.facts.background,
                    cache_mb * 2**20 // len(sizes),
                    level=level,
                    left_out=self.left_out,
                )
                for level, size in enumerate(sizes)
            ]


def _check_depth(path: Path, file: tifffile.TiffFile) -> None:
    """Refuse what OpenSlide would quietly squeeze into 8-bit RGB."""
    page = file.pages.first
    if page.bitspersample != 8 or page.samplesperpixel < 3:
        raise SlideError(
            f"Slide {path} is not 8-bit RGB: {page.samplesperpixel} samples of "
            f"{page.bitspersample} bits.",
            hint="Only brightfield H&E can be translated; fluorescence and raw planes cannot.",
        )


def _is_direct(page: tifffile.TiffPage) -> bool:
    # Aperio leaves tiles out and means "look in the level below": OpenSlide knows how.
    return (
        page.is_tiled
        and page.compression in _DIRECT_CODECS
        and page.samplesperpixel == 3
        and page.bitspersample == 8
        and page.planarconfig == 1
        and page.photometric in (2, 6)
        and 0 not in page.databytecounts
    )


def _tiff_kind(path: Path) -> str:
    """Tell "ome", "plain" or "vendor" TIFF, or "" for anything else."""
    if not is_tiff(path):
        return ""
    try:
        with tifffile.TiffFile(path) as file:
            check_directories(path, file)
            if file.is_ome:
                return "ome"
            return "vendor" if any(getattr(file, flag) for flag in _VENDOR_ONLY) else "plain"
    except SlideError:
        raise
    except DAMAGE as error:
        raise damaged(path, error) from error


def _lacks_format(error: openslide.OpenSlideError) -> bool:
    unknown = isinstance(error, openslide.OpenSlideUnsupportedFormatError)
    return unknown or "compression" in str(error)


def _refused(path: Path, error: Exception, tiff: str) -> SlideError:
    version = f"OpenSlide {openslide.__library_version__}"
    if isinstance(error, openslide.OpenSlideUnsupportedFormatError):
        return SlideError(
            f"Slide {path} is in no format that {version} knows.",
            hint="Give an H&E slide: SVS, NDPI, MRXS, SCN, BIF, DICOM, OME-TIFF or tiled TIFF.",
        )
    return SlideError(
        f"Slide {path} is refused by {version}: {in_one_line(error)}.",
        hint="" if tiff else "Convert it to OME-TIFF, for example with bfconvert.",
    )


def _checked(path: Path, backend: Backend) -> Backend:
    check_sizes(path, [backend.facts.size_l0, *(level.size for level in backend.facts.levels)])
    return backend


def _facts(
    slide: openslide.OpenSlide, properties: Mapping[str, str], sizes: list[Size]
) -> SlideFacts:
    bounds = [
        _number(properties, f"openslide.bounds-{side}") for side in ("x", "y", "width", "height")
    ]
    x_px, y_px, width_px, height_px = (int(value) if value is not None else -1 for value in bounds)
    bounded = min(x_px, y_px) >= 0 and min(width_px, height_px) > 0
    power = _number(properties, "openslide.objective-power")
    color = properties.get("openslide.background-color", "FFFFFF")
    return SlideFacts(
        format=properties.get("openslide.vendor", "unknown"),
        size_l0=Size(width_px, height_px) if bounded else sizes[0],
        origin_l0=(x_px, y_px) if bounded else (0, 0),
        levels=tuple(Level(size, true_downsample(sizes[0], size)) for size in sizes),
        pixel_sizes=(*_pixel_sizes(properties), *from_power(power)),
        objective_power=power,
        background=(int(color[0:2], 16), int(color[2:4], 16), int(color[4:6], 16)),
        icc=_profile(slide),
    )


def _profile(slide: openslide.OpenSlide) -> bytes | None:
    try:
        profile = slide.color_profile
    except ImageCms.PyCMSError:  # there is one, and it is broken: whoever uses it will say so
        return b""
    return profile.tobytes() if profile is not None else None


def _pixel_sizes(properties: Mapping[str, str]) -> list[PixelSize]:
    found: list[PixelSize] = []
    x_um, y_um = _number(properties, "openslide.mpp-x"), _number(properties, "openslide.mpp-y")
    if x_um is not None and y_um is not None:
        found.append(PixelSize("openslide.mpp-x", x_um, y_um))
    aperio = _number(properties, "aperio.MPP")
    if aperio is not None:
        found.append(PixelSize("aperio.MPP", aperio, aperio))
    x_res, y_res = _number(properties, "tiff.XResolution"), _number(properties, "tiff.YResolution")
    if x_res is not None and y_res is not None:
        unit = properties.get("tiff.ResolutionUnit", "")
        found += from_resolution("tiff.XResolution", x_res, y_res, unit)
    return found


def _number(properties: Mapping[str, str], name: str) -> float | None:
    try:
        value = float(properties[name].replace(",", "."))
    except KeyError:
        return None
    except ValueError:  # a vendor's "N/A" is as good as nothing
        return None
    return value if math.isfinite(value) else None


def _grow(region: Region, margin_px: int) -> Region:
    return Region(
        region.x_px - margin_px,
        region.y_px - margin_px,
        region.width_px + 2 * margin_px,
        region.height_px + 2 * margin_px,
    )


def _columns(region: Region, width_px: int) -> Iterator[Region]:
    """Cut a region at multiples of a width, where the tiles of most files end, too."""
    start_px = region.x_px
    while start_px < region.right_px:
        stop_px = min(region.right_px, (start_px // width_px + 1) * width_px)
        yield Region(start_px, region.y_px, stop_px - start_px, region.height_px)
        start_px = stop_px
