"""SlideSource: a slide whose pixels can be read in the frame of the virtual slide.

Room 1 of 4. In: a path, the user's mpp. Out: uint8 RGB regions and thumbnails, sRGB, on the
slide's own background. Not here: tissue, tiles, stores; which library opens what
(`openslide_read`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from wsi_stain.errors import SlideError
from wsi_stain.geometry import Region, Scale, Size
from wsi_stain.slides.identity import check_file, content_digest
from wsi_stain.slides.missing import MissingTile
from wsi_stain.slides.pixel_size import settle
from wsi_stain.slides.reader import LevelReader, OpenedSlide
from wsi_stain.slides.slide_facts import Level, Pixels, SlideFacts

__all__ = ["Level", "Pixels", "SlideSource"]

LANCZOS_SUPPORT = 3
THUMBNAIL_BLOCK_PX = 1536  # of the level that is read: 9 MB as RGBA
PROBE_GRID = 5
PROBE_PX = 64
GLASS_GREY = 140
DARK_GREY = 60
LARGEST_SIDE_MM = 300.0  # the largest glass slides have 150 x 200 mm
MPP_DOUBT = 1.2


@dataclass(frozen=True, eq=False)
class SlideSource:
    """A brightfield slide, opened.

    Attributes
    ----------
    path
        The file.
    format
        OpenSlide's vendor name, "OME-TIFF" or "TIFF".
    size_l0, origin_l0
        The slide's bounds rectangle, px, and its place in the file's full level-0 grid.
    mpp_l0, mpp_origin
        Pixel size, um/px, and what said so: "user" or a tag.
    mpp_in_file
        What the file says, um/px, or `None`; differs from `mpp_l0` where the user overrules it.
    objective_power
        Nominal magnification, or `None`.
    levels
        Largest first: whole size, px, and downsample.
    background
        uint8 (3,), sRGB of where nothing was scanned.
    has_icc
        Whether pixels are converted to sRGB by the slide's own profile.
    digest
        SHA-256, hex, of size and samples of the content.
    notes
        What a person should know of the pixels, one line each.

    Notes
    -----
    Memory bound: the cache (`cache_mb`) and the level pixels under one region. Pickles without
    the open file; each process opens it on first read and checks that it is the same slide.
    One reader per process: not for threads.
    """

    path: Path
    format: str
    size_l0: Size
    origin_l0: tuple[int, int]
    mpp_l0: float
    mpp_origin: str
    mpp_in_file: float | None
    objective_power: float | None
    levels: tuple[Level, ...]
    background: Pixels
    has_icc: bool
    digest: str
    notes: tuple[str, ...]
    _reader: LevelReader = field(repr=False)

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        mpp: float | None = None,
        cache_mb: int = 64,
        allow_missing: bool = False,
    ) -> SlideSource:
        """Open a slide.

        Parameters
        ----------
        path
            SVS, NDPI, MRXS, SCN, BIF, DICOM, OME-TIFF, tiled TIFF ...
        mpp
            Pixel size, um/px, where the file says none or a wrong one.
        cache_mb
            Bound of decoded tiles kept in memory.
        allow_missing
            Take tiles that cannot be decoded for background, and list them in `missing`.

        Raises
        ------
        SlideError
            Not a readable slide, damaged, not 8-bit RGB, or not brightfield. A `TileError` where
            it is one tile that is damaged.
        MppUnknownError
            No trustworthy pixel size.
        ConfigError
            `mpp` outside of 0.05..20 um/px.
        """
        path = Path(path)
        check_file(path)
        digest = content_digest(path)
        reader = LevelReader(path, cache_mb, digest, allow_missing=allow_missing)
        opened = reader.opened
        with ExitStack() as on_error:
            on_error.callback(reader.close)
            pixel_size = settle(path, opened.backend.facts.pixel_sizes, mpp)
            _check_extent(path, opened.backend.facts.size_l0, pixel_size[0])
            source = cls._of(reader, path, digest, opened, pixel_size)
            source._check_brightfield()
            on_error.pop_all()
        return source

    @classmethod
    def _of(
        cls,
        reader: LevelReader,
        path: Path,
        digest: str,
        opened: OpenedSlide,
        pixel_size: tuple[float, str, float | None],
    ) -> SlideSource:
        facts = opened.backend.facts
        mpp_l0, mpp_origin, mpp_in_file = pixel_size
        background = np.array(facts.background, np.uint8).reshape(1, 1, 3)
        return cls(
            path=path,
            format=facts.format,
            size_l0=facts.size_l0,
            origin_l0=facts.origin_l0,
            mpp_l0=mpp_l0,
            mpp_origin=mpp_origin,
            mpp_in_file=mpp_in_file,
            objective_power=facts.objective_power,
            levels=facts.levels,
            background=opened.to_srgb(background).reshape(3),
            has_icc=opened.transform is not None,
            digest=digest,
            notes=(*_doubt_mpp(mpp_l0, mpp_in_file), *_notes(facts, opened.transform is not None)),
            _reader=reader,
        )

    @property
    def missing(self) -> tuple[MissingTile, ...]:
        """Tiles that could not be read, so far and in this process, in the order of the file."""
        found = []
        for (level, row, column, region), reason in sorted(self._reader.missing.items()):
            factor = self.levels[level].downsample
            x_px, y_px = (
                round(start * factor) - origin
                for start, origin in zip(region[:2], self.origin_l0, strict=True)
            )
            sides = (round(side * factor) for side in region.size)
            found.append(MissingTile(level, row, column, Region(x_px, y_px, *sides), reason))
        return tuple(found)

    def level_for(self, factor: float) -> int:
        """Choose the level to read for px of `factor` level-0 px: not coarser than they are."""
        fine = [i for i, level in enumerate(self.levels) if level.downsample <= factor * (1 + 1e-6)]
        return max(fine, key=lambda index: self.levels[index].downsample, default=0)

    def read_out(self, region_out: Region, scale: Scale) -> Pixels:
        """Read a region of the virtual slide.

        Where the slide has a level of just this scale, its pixels are copied. Else the coarsest
        level that is still finer is reduced by Lanczos at exact fractional places, so that
        regions read apart agree where they overlap: to the bit where the factor is a multiple of
        1/256, else within 2 grey levels (Pillow keeps places as float32, rows as uint8).

        Parameters
        ----------
        region_out
            In px of the virtual slide; may reach over its edges.
        scale
            The virtual slide's scale, factor >= 1 for reduction; below 1 pixels are enlarged.

        Returns
        -------
        ndarray
            uint8 (h, w, 3) sRGB; background outside of the slide.
        """
        inside = region_out.intersect(Region(0, 0, *scale.size_out))
        if inside == region_out:  # the common case: no copy
            return self._resample(inside, scale.factor, Image.Resampling.LANCZOS)
        out = np.empty((region_out.height_px, region_out.width_px, 3), np.uint8)
        if 0 in inside.size:
            out[:] = self.background
            return out
        left_px, top_px = inside.x_px - region_out.x_px, inside.y_px - region_out.y_px
        rows = slice(top_px, top_px + inside.height_px)
        columns = slice(left_px, left_px + inside.width_px)
        out[rows, columns] = self._resample(inside, scale.factor, Image.Resampling.LANCZOS)
        # Only the rim: numpy repeats three bytes slower than a JPEG tile is decoded.
        for rim in (out[: rows.start], out[rows.stop :]):
            rim[:] = self.background
        for rim in (out[rows, : columns.start], out[rows, columns.stop :]):
            rim[:] = self.background
        return out

    def thumbnail(self, mpp: float) -> Pixels:
        """Reduce the whole slide, by area means, in blocks.

        Parameters
        ----------
        mpp
            Pixel size of the thumbnail, um/px.

        Returns
        -------
        ndarray
            uint8 (h, w, 3) sRGB; h and w are those of the slide over ``mpp / mpp_l0``, rounded up.

        Notes
        -----
        Memory bound: the thumbnail, the cache and a few copies of one block of 1536 x 1536 level
        px (7 MB each), however large the slide. A slide without small levels is read whole, block
        by block.
        """
        factor = mpp / self.mpp_l0
        width_px = max(1, math.ceil(self.size_l0.width_px / factor - 1e-9))
        height_px = max(1, math.ceil(self.size_l0.height_px / factor - 1e-9))
        out = np.empty((height_px, width_px, 3), np.uint8)
        step = factor / self.levels[self.level_for(factor)].downsample
        side_px = max(1, int(THUMBNAIL_BLOCK_PX / step))
        for block in _blocks(Size(width_px, height_px), side_px):
            pixels = self._resample(block, factor, Image.Resampling.BOX)
            out[block.y_px : block.bottom_px, block.x_px : block.right_px] = pixels
        return out

    def close(self) -> None:
        """Close the file; a later read opens it again."""
        self._reader.close()

    def __enter__(self) -> SlideSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _resample(self, region: Region, factor: float, filter_: Image.Resampling) -> Pixels:
        """Read a region, in px of `factor` level-0 px, that begins inside the slide."""
        index = self.level_for(factor)
        downsample = self.levels[index].downsample
        step = factor / downsample
        left, top = (
            (origin + start * factor) / downsample
            for origin, start in zip(self.origin_l0, region[:2], strict=True)
        )
        if abs(step - 1) < 1e-9 and left == round(left) and top == round(top):
            return self._read_padded(index, Region(round(left), round(top), *region.size))
        lanczos = filter_ is Image.Resampling.LANCZOS
        margin = math.ceil(LANCZOS_SUPPORT * max(step, 1.0)) + 1 if lanczos else 0
        x_px, y_px = math.floor(left) - margin, math.floor(top) - margin
        right, bottom = left + region.width_px * step, top + region.height_px * step
        cover = Region(
            x_px,
            y_px,
            math.ceil(right) + margin - x_px,
            math.ceil(bottom) + margin - y_px,
        )
        pixels = self._read_padded(index, cover)
        box = (left - x_px, top - y_px, right - x_px, bottom - y_px)
        return np.asarray(Image.fromarray(pixels).resize(region.size, filter_, box=box))

    def _read_padded(self, index: int, region: Region) -> Pixels:
        """Read level pixels; beyond the edge the last row or column is repeated.

        Repeated, not filled with background: an edge pixel that is partly outside keeps its
        color, and regions that end at different distances from the edge agree.
        """
        size = self.levels[index].size
        x_px, n_columns, pad_x = _clamp(region.x_px, region.width_px, size.width_px)
        y_px, n_rows, pad_y = _clamp(region.y_px, region.height_px, size.height_px)
        pixels = self._reader.read(index, Region(x_px, y_px, n_columns, n_rows))
        if (n_columns, n_rows) == region.size:
            return pixels
        return np.pad(pixels, (pad_y, pad_x, (0, 0)), mode="edge")

    def _check_brightfield(self) -> None:
        """Refuse fluorescence: black ground, and nowhere the grey of glass or pale tissue."""
        index = len(self.levels) - 1
        size = self.levels[index].size
        probes = []
        for block in range(PROBE_GRID * PROBE_GRID):
            row, column = divmod(block, PROBE_GRID)
            width_px, height_px = min(PROBE_PX, size.width_px), min(PROBE_PX, size.height_px)
            x_px = (size.width_px - width_px) * column // (PROBE_GRID - 1)
            y_px = (size.height_px - height_px) * row // (PROBE_GRID - 1)
            pixels = self._reader.read(index, Region(x_px, y_px, width_px, height_px))
            probes.append(pixels.reshape(-1, 3))
        grey = np.concatenate(probes)
        dark_fraction = float((grey.max(axis=1) < DARK_GREY).mean())
        pale_fraction = float((grey.min(axis=1) >= GLASS_GREY).mean())
        if dark_fraction > 0.3 and pale_fraction < 0.001:
            raise SlideError(
                f"Slide {self.path} is not brightfield: {dark_fraction:.0%} of it is black and no "
                "glass is seen, as in fluorescence.",
                hint="Only H&E in transmitted light can be translated.",
            )


def _doubt_mpp(asked_mpp: float, mpp_in_file: float | None) -> Iterator[str]:
    if mpp_in_file and not 1.0 / MPP_DOUBT <= asked_mpp / mpp_in_file <= MPP_DOUBT:
        yield (
            f"Pixels of {asked_mpp:.3g} um were asked for, the file says {mpp_in_file:.3g} um: "
            "nuclei will look that much too large or too small to the model, if the file is right."
        )


def _notes(facts: SlideFacts, has_transform: bool) -> Iterator[str]:
    if facts.missing_pieces:
        yield (
            f"{facts.missing_pieces} tiles of the largest level are missing in the slide: they are "
            "read from a smaller level, or as background."
        )
    if facts.icc is not None and not has_transform:
        yield "The slide's color profile cannot be used: its colors stay raw."


def _check_extent(path: Path, size_l0: Size, mpp_l0: float) -> None:
    """Refuse a slide that no microscope could hold: its size or its pixel size is wrong."""
    width_mm, height_mm = (side_px * mpp_l0 / 1e3 for side_px in size_l0)
    if max(width_mm, height_mm) > LARGEST_SIDE_MM:
        raise SlideError(
            f"Slide {path} would be {width_mm:.0f} x {height_mm:.0f} mm large, {size_l0} of "
            f"{mpp_l0:.4g} um.",
            hint="If its pixel size is wrong, give the true one: --mpp 0.25",
        )


def _clamp(start: int, length: int, side: int) -> tuple[int, int, tuple[int, int]]:
    """Clamp a span to 0..side, keeping at least one pixel: start, length, what to pad."""
    first = min(max(start, 0), side - 1)
    n_inside = max(min(start + length, side), first + 1) - first
    before = min(max(0, first - start), length - n_inside)
    return first, n_inside, (before, length - n_inside - before)


def _blocks(size: Size, side_px: int) -> Iterator[Region]:
    for y_px in range(0, size.height_px, side_px):
        for x_px in range(0, size.width_px, side_px):
            width_px = min(side_px, size.width_px - x_px)
            yield Region(x_px, y_px, width_px, min(side_px, size.height_px - y_px))
