"""The objects of a run: what translate and quantify both show over a picture.

Room 4 of 4. In: a finished picture, its tissue, the run's tiles. Out: features for `geojson`. Not
here: the format, scores.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from wsi_stain.config import BundleSpec
from wsi_stain.errors import OutputError
from wsi_stain.geometry import Region, Scale, Size
from wsi_stain.layout import RunFiles
from wsi_stain.slides.image import SlideSource
from wsi_stain.slides.mask import TissueMask
from wsi_stain.slides.missing import MissingTile, scaled
from wsi_stain.slides.plan import TileGrid
from wsi_stain.stain.density import HDX, POSITIVE_OD, project_od
from wsi_stain.write.geojson import (
    FLAGGED,
    MISSING,
    POSITIVE,
    TILE,
    TISSUE,
    Feature,
    box_feature,
    mask_features,
    write_geojson,
)
from wsi_stain.write.overview import choose_reduction
from wsi_stain.write.qupath import write_qupath_script

__all__ = [
    "TileRow",
    "annotate_run",
    "flagged_features",
    "grid_features",
    "missing_features",
    "positive_features",
    "read_flagged",
    "read_tiles",
    "tissue_features",
    "titled",
]

POSITIVE_UM = 1.0  # pixels on which positive regions are outlined, at least
SMALLEST_POSITIVE_UM2 = 12.0
MOST_POSITIVE = 50_000  # regions, the largest: some 30 MB in all
PLACE = ("tile", "x_px_out", "y_px_out", "size_px", "x_um", "y_um")
# Scores of a tile as QuPath's tables name them; others keep their own names.
SCORE_NAMES = {
    "structure": "Structure kept",
    "sobel_ssim": "Sobel-SSIM",
    "white_error": "White error",
    "dab_p90": "Strongest DAB OD",
    "dab_sd": "DAB OD sd over seeds",
}
LN_10 = 2.302585092994046


def annotate_run(
    files: RunFiles,
    mask: TissueMask,
    grid: TileGrid,
    spec: BundleSpec,
    fitted: Mapping[str, Any],
    missing: Iterable[MissingTile] = (),
) -> None:
    """Write what QuPath needs beside a finished pyramid: its objects, and the script.

    Parameters
    ----------
    files
        Of the run; the pyramid is there.
    mask, grid
        Tissue of the H&E, in its level 0; the run's tiles.
    spec
        Of the bundle: marker, stain vectors, white.
    fitted
        The numbers fitted on the slide, as the manifest holds them.
    missing
        Tiles of the slide that could not be read.

    Raises
    ------
    OutputError
        Not writable.
    """
    scale = grid.scale
    rows = read_tiles(files.tile_scores)
    with SlideSource.open(files.output, mpp=scale.mpp_out) as picture:
        features = itertools.chain(
            tissue_features(mask, scale.size_out, scale.factor, scale.mpp_out),
            positive_features(picture, spec.color.output_white),
            grid_features(grid, rows),
            flagged_features(rows, scale.size_out, scale.mpp_out),
            missing_features(missing, scale),
        )
        write_geojson(files.geojson, features)
    he_stain_od = fitted.get("stain", {}).get("stain_od") or ()
    he_white = fitted.get("white") or ()
    write_qupath_script(files.qupath, files.name, spec.marker, spec.color, he_stain_od, he_white)


def tissue_features(mask: TissueMask, size: Size, factor: float, mpp: float) -> Iterator[Feature]:
    """Outline the tissue.

    Parameters
    ----------
    mask
        Tissue of the H&E.
    size, mpp
        Of the picture: level-0 px, um/px.
    factor
        Level-0 px of the H&E per px of the picture; 1 where the mask is the picture's own.
    """
    yield from mask_features(mask.pixels, mask.downsample / factor, size, TISSUE, mpp=mpp)


def positive_features(
    source: SlideSource, white: npt.ArrayLike, positive_od: float = POSITIVE_OD
) -> Iterator[Feature]:
    """Outline where the picture is brown: mean DAB OD of about 1 um, more on a huge slide.

    Parameters
    ----------
    source
        The picture.
    white
        (3,) grey levels of its glass.
    positive_od
        log10 DAB OD.

    Notes
    -----
    Memory bound: a picture of 16 megapixels and its mask. Of more than 50,000 regions the smallest
    are left out.
    """
    step = max(choose_reduction(source.size_l0), round(POSITIVE_UM / source.mpp_l0))
    small = source.thumbnail(source.mpp_l0 * step)
    row = np.linalg.inv(HDX)[:, 1] / LN_10
    brown = np.concatenate(
        [
            project_od(small[y_px : y_px + 512], white, row[None])[..., 0] > positive_od
            for y_px in range(0, len(small), 512)
        ]
    )
    side_um = source.mpp_l0 * step
    least_px = _least_px(brown, max(1, round(SMALLEST_POSITIVE_UM2 / side_um**2)))
    yield from mask_features(
        brown, step, source.size_l0, POSITIVE, mpp=source.mpp_l0, least_px=least_px
    )


def _least_px(mask: npt.NDArray[np.bool_], least_px: int) -> int:
    """Raise the area of the smallest region until no more than `MOST_POSITIVE` are left."""
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    areas_px = np.sort(stats[1:, cv2.CC_STAT_AREA])[::-1]
    if len(areas_px) <= MOST_POSITIVE:
        return least_px
    return max(least_px, int(areas_px[MOST_POSITIVE]) + 1)


def grid_features(grid: TileGrid, rows: Iterable[TileRow] = ()) -> Iterator[Feature]:
    """Show the tiles of a run: the share of tissue of each, and its scores where it has some."""
    scores = {row.name: row.scores for row in rows}
    for index in range(grid.n_tiles):
        numbers = {"Tissue fraction": round(float(grid.tissue[index]), 4)}
        numbers |= titled(scores.get(str(index), {}))
        box = grid.region_out(index)
        yield box_feature(box, grid.scale.size_out, TILE, f"Tile {index}", numbers)


def missing_features(missing: Iterable[MissingTile], scale: Scale) -> Iterator[Feature]:
    """Show what is background because the slide's tiles could not be read."""
    for tile in missing:
        name = f"Level {tile.level}, row {tile.row}, column {tile.column}: {tile.reason}"
        box = scaled(tile.region_l0, 1.0 / scale.factor)
        yield box_feature(box, scale.size_out, MISSING, name, {})


class TileRow(NamedTuple):
    """A line of a run's `tiles.csv`.

    Attributes
    ----------
    name, flags
        Which tile, and why a person should look at it; empty: no need to.
    box
        Its place, px of the picture; may reach over the edge.
    scores
        By name.
    """

    name: str
    flags: str
    box: Region
    scores: dict[str, float]


def flagged_features(rows: Iterable[TileRow], size: Size, mpp: float) -> Iterator[Feature]:
    """Show the flagged tiles of some: why, where in um, scores."""
    for row in rows:
        if row.flags:
            place = {"Left um": row.box.x_px * mpp, "Top um": row.box.y_px * mpp}
            numbers = {name: round(um, 1) for name, um in place.items()} | titled(row.scores)
            name = f"Tile {row.name}: {row.flags.replace(';', ', ')}"
            yield box_feature(row.box, size, FLAGGED, name, numbers)


def read_tiles(table: Path) -> list[TileRow]:
    """Read what a run says of its tiles; nothing where it wrote no table.

    Parameters
    ----------
    table
        The run's ``tiles.csv``: tile, x_px_out, y_px_out, size_px, scores ..., flags. Empty flags
        mean: nothing to look at.

    Raises
    ------
    OutputError
        The table is damaged.
    """
    if not table.is_file():
        return []
    found = []
    with table.open(encoding="utf-8", newline="") as stream:
        for number, row in enumerate(csv.DictReader(stream), start=2):
            try:
                found.append(_tile_row(row))
            except (KeyError, TypeError, ValueError) as error:
                raise OutputError(
                    f"{table}, line {number}, cannot be read: {error!r}.",
                    hint="Run wsi-stain translate again with --overwrite.",
                ) from error
    return found


def read_flagged(table: Path) -> list[TileRow]:
    """Read which tiles a run flagged, as `read_tiles` does."""
    return [row for row in read_tiles(table) if row.flags]


def _tile_row(row: dict[str, str]) -> TileRow:
    side_px = int(row["size_px"])
    box = Region(int(row["x_px_out"]), int(row["y_px_out"]), side_px, side_px)
    scores = {
        name: float(text) for name, text in row.items() if name not in (*PLACE, "flags") and text
    }
    return TileRow(row["tile"], row["flags"], box, scores)


def titled(scores: Mapping[str, float]) -> dict[str, float]:
    """Name scores for a person."""
    return {SCORE_NAMES.get(name, name): value for name, value in scores.items()}
