"""The spread over noise seeds as a second pyramid, pixel on pixel with the picture.

Room 4 of 4. In: a tile grid, a function that reads a tile's levels. Out: a lossless OME-TIFF. Not
here: how the spread is made (`stain/spread`).

Grey as RGB: the one form that QuPath, Bio-Formats and OpenSlide all open as a pyramid. Lossless,
since levels are numbers: JPEG would move them by one or two. Where tiles overlap, the spread is the
weighted mean of theirs; that of the feathered picture itself is a little smaller.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from msgspec import structs

from wsi_stain.config import WriteConfig
from wsi_stain.stain.spread import OD_PER_LEVEL
from wsi_stain.write.stitch import Placement, ReadTile, stitch_bands
from wsi_stain.write.tiff import DESCRIPTION, PyramidFacts, write_pyramid

__all__ = ["write_uncertainty"]


def write_uncertainty(
    path: Path, grid: Placement, read_levels: ReadTile, spec: WriteConfig, *, name: str, seeds: int
) -> PyramidFacts:
    """Write the uncertainty pyramid.

    Memory bound: that of `stitch_bands` and of `write_pyramid`.

    Parameters
    ----------
    path
        Output, ``*_uncertainty.ome.tiff``.
    grid
        Where the tiles lie.
    read_levels
        Gives tile i, uint8 (tile_px, tile_px, 1): sd of DAB OD in `OD_PER_LEVEL`.
    spec
        Tile side, and whether an existing file may be replaced.
    name
        Written into the OME-XML, with the meaning of a grey level.
    seeds
        How many there were.

    Raises
    ------
    OutputError
        As `write_pyramid`.
    """

    def read_grey(index: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        return np.repeat(read_levels(index), 3, axis=-1)

    return write_pyramid(
        path,
        grid.scale.size_out,
        stitch_bands(grid, read_grey, (0, 0, 0)),
        grid.scale.mpp_out,
        structs.replace(spec, format="ome-tiff", lossless=True),
        name=name,
        description=f"{DESCRIPTION}; standard deviation of DAB optical density (log10) over "
        f"{seeds} noise seeds, {OD_PER_LEVEL:g} per grey level",
    )
