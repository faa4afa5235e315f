"""Read an OME-Zarr pyramid (NGFF 0.5, zarr v3) as a slide: what `--format ome-zarr` writes.

Room 1 of 4. In: a folder. Out: a `Backend`. Not here: other NGFF layouts (time, depth, labels).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from wsi_stain.errors import DAMAGE, SlideError, in_one_line
from wsi_stain.geometry import Region, Size
from wsi_stain.slides.missing import UNDECODABLE, Cell, cells_of, tile_error
from wsi_stain.slides.pixel_size import PixelSize
from wsi_stain.slides.slide_facts import (
    Level,
    Pixels,
    SlideFacts,
    check_sizes,
    true_downsample,
)

__all__ = ["ZarrBackend"]

AXES = ["c", "y", "x"]
MOST_ABSENT = 1_000_000  # pieces that may have no file: a lie may state any number


class ZarrBackend:
    """A folder ``*.ome.zarr`` with one RGB pyramid.

    Memory bound: the chunks under one region; nothing is kept. Pieces without a file are
    background, as the tiles that a TIFF leaves out: zarr would read its fill value, mostly black.

    Raises
    ------
    SlideError
        Damaged, of another version, or not 8-bit RGB with axes c, y, x.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.left_out: set[Cell] = set()
        try:
            group = zarr.open_group(path, mode="r", zarr_format=3)
            ome: Any = group.attrs["ome"]
            self._arrays, self.facts = _open_levels(path, group, ome)
            for level, array in enumerate(self._arrays):
                self.left_out.update(_absent(path, level, array))
            n_absent = sum(cell.level == 0 for cell in self.left_out)
            self.facts = replace(self.facts, missing_pieces=n_absent)
        except SlideError:
            raise
        except DAMAGE as error:
            raise SlideError(
                f"Slide {path} is no readable OME-Zarr 0.5: {in_one_line(error)}.",
                hint="Copy it again.",
            ) from error

    def read(self, level: int, region: Region) -> Pixels:
        """Read a region that lies inside a level, as uint8 (h, w, 3) RGB."""
        holes = [cell.region for cell in self.left_out if cell.level == level]
        try:
            if not region.touches_any(holes):
                return self._planes(level, region)
        except DAMAGE:
            pass  # chunk by chunk it shows which one
        out = np.empty((region.height_px, region.width_px, 3), np.uint8)
        chunk = self._arrays[level].chunks
        for cell in cells_of(level, region, Size(chunk[2], chunk[1])):
            part = region.intersect(cell.region)
            x_px, y_px = part.x_px - region.x_px, part.y_px - region.y_px
            place = out[y_px : y_px + part.height_px, x_px : x_px + part.width_px]
            if part.touches_any(holes):
                place[:] = self.facts.background
                continue
            try:
                place[:] = self._planes(level, part)
            except DAMAGE as error:
                raise tile_error(self._path, cell, UNDECODABLE, in_one_line(error)) from error
        return out

    def _planes(self, level: int, region: Region) -> Pixels:
        rows, columns = slice(region.y_px, region.bottom_px), slice(region.x_px, region.right_px)
        planes = np.asarray(self._arrays[level][:, rows, columns], np.uint8)
        return np.ascontiguousarray(np.moveaxis(planes, 0, -1))

    def close(self) -> None:
        """Do nothing: no file stays open."""


def _absent(folder: Path, level: int, array: zarr.Array[Any]) -> Iterator[Cell]:
    """List the pieces of a level, shards or chunks, that have no file."""
    depth, height_px, width_px = array.shards or array.chunks
    n_rows, n_columns = -(-array.shape[1] // height_px), -(-array.shape[2] // width_px)
    root = folder / array.path
    files = {file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()}
    if n_rows * n_columns > len(files) + MOST_ABSENT:
        raise ValueError(f"level {level} is {n_rows} x {n_columns} pieces in {len(files)} files")
    for row, column in np.ndindex(n_rows, n_columns):
        planes = range(-(-array.shape[0] // depth))
        if not all(array.metadata.encode_chunk_key((z, row, column)) in files for z in planes):
            place = Region(column * width_px, row * height_px, width_px, height_px)
            yield Cell(level, row, column, place)


def _open_levels(
    path: Path, group: zarr.Group, ome: Mapping[str, Any]
) -> tuple[list[zarr.Array[Any]], SlideFacts]:
    (multiscale,) = ome["multiscales"]
    arrays = [group[dataset["path"]] for dataset in multiscale["datasets"]]
    axes = [axis["name"] for axis in multiscale["axes"]]
    found = [array for array in arrays if isinstance(array, zarr.Array)]
    rgb = all(array.shape[0] == 3 and array.dtype == np.uint8 for array in found)
    if axes != AXES or len(found) != len(arrays) or not rgb:
        raise SlideError(
            f"Slide {path} is not 8-bit RGB with axes c, y, x: axes {', '.join(axes)}, "
            f"{found[0].dtype if found else 'no'} pixels."
        )
    sizes = [Size(array.shape[2], array.shape[1]) for array in found]
    check_sizes(path, sizes)
    scale = multiscale["datasets"][0]["coordinateTransformations"][0]["scale"]
    micrometer = [axis.get("unit") for axis in multiscale["axes"][1:]] == ["micrometer"] * 2
    mpp = [PixelSize("OME-Zarr scale", float(scale[2]), float(scale[1]))] if micrometer else []
    facts = SlideFacts(
        format="OME-Zarr",
        size_l0=sizes[0],
        origin_l0=(0, 0),
        levels=tuple(Level(size, true_downsample(sizes[0], size)) for size in sizes),
        pixel_sizes=tuple(mpp),
        objective_power=None,
        background=(255, 255, 255),
        icc=None,
    )
    return found, facts
