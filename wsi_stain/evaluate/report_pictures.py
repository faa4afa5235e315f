"""Pictures that a page can show from disk: tiles, outlines, overlays.

In: uint8 RGB, masks. Out: files, SVG paths. Not here: pages, numbers.

A browser lets a page on disk show image files, but not fetch a tile index: so tiles are plain
JPEG files whose names follow from level, column and row.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from wsi_stain.errors import OutputError
from wsi_stain.evaluate.ground import Uncertainty
from wsi_stain.evaluate.metrics_nuclei import stain_densities
from wsi_stain.evaluate.metrics_stain import POSITIVE_OD
from wsi_stain.write.levels import halve

__all__ = [
    "SPREAD_FULL_OD",
    "TILE_PX",
    "level_count",
    "outline_paths",
    "positive_overlay",
    "spread_overlay",
    "write_jpeg",
    "write_png",
    "write_tiles",
]

Rgb8 = NDArray[np.uint8]
Bools = NDArray[np.bool_]

TILE_PX = 512
QUALITY = 86
OVERLAY_MAX_PX = 2_000_000
OVERLAY_RGB = (0, 200, 83)  # neither in H&E nor in H-DAB
SPREAD_RGB = (255, 221, 0)  # purple, pink, blue and brown are the stains themselves
SPREAD_FULL_OD = 0.1  # sd of DAB OD that is drawn opaque
BAND_PX = 512
OUTLINE_MAX_POINTS = 20_000


def level_count(height_px: int, width_px: int) -> int:
    """Count the levels that halve a picture until it fits into one tile."""
    return max(0, (max(height_px, width_px) - 1).bit_length() - (TILE_PX - 1).bit_length()) + 1


def write_tiles(picture: Rgb8, folder: Path) -> int:
    """Write a picture as tiles, ``<level>/<column>_<row>.jpg``, level 0 the smallest.

    Parameters
    ----------
    picture
        uint8 (h, w, 3).
    folder
        Where to; made.

    Returns
    -------
    int
        Number of levels.
    """
    n_levels = level_count(*picture.shape[:2])
    for level in reversed(range(n_levels)):
        place = folder / str(level)
        place.mkdir(parents=True)
        for y_px in range(0, picture.shape[0], TILE_PX):
            for x_px in range(0, picture.shape[1], TILE_PX):
                tile = picture[y_px : y_px + TILE_PX, x_px : x_px + TILE_PX]
                write_jpeg(place / f"{x_px // TILE_PX}_{y_px // TILE_PX}.jpg", tile)
        picture = halve(picture)
    return n_levels


def write_jpeg(path: Path, pixels: Rgb8) -> None:
    """Write uint8 (h, w, 3) RGB."""
    _write(path, cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])


def write_png(path: Path, rgba: Rgb8) -> None:
    """Write uint8 (h, w, 4) RGBA."""
    _write(path, cv2.cvtColor(rgba, cv2.COLOR_RGBA2BGRA), [])


def positive_overlay(ihc: Rgb8, white: ArrayLike) -> tuple[Rgb8, int]:
    """Draw where DAB OD is above `POSITIVE_OD`; opacity is the share of positive pixels.

    Parameters
    ----------
    ihc
        uint8 (h, w, 3).
    white
        (3,) grey levels of its glass.

    Returns
    -------
    tuple
        uint8 (h', w', 4) RGBA of at most 2 megapixels, and picture px per overlay px.
    """
    height_px, width_px = ihc.shape[:2]
    step = 1
    while -(-height_px // step) * -(-width_px // step) > OVERLAY_MAX_PX:
        step *= 2
    rgba = np.empty((-(-height_px // step), -(-width_px // step), 4), np.uint8)
    rgba[..., :3] = OVERLAY_RGB
    band_px = max(BAND_PX, step)
    for y_px in range(0, height_px, band_px):
        band = ihc[y_px : y_px + band_px]
        positive = stain_densities(band, white)[..., 1] > POSITIVE_OD
        pad = [(0, -side_px % step) for side_px in positive.shape]
        cells = np.pad(positive, pad).astype(np.float32)
        size = (cells.shape[1] // step, cells.shape[0] // step)
        share = np.asarray(cv2.resize(cells, size, interpolation=cv2.INTER_AREA))
        rgba[y_px // step : y_px // step + len(share), :, 3] = np.rint(255 * share)
    return rgba, step


def spread_overlay(uncertainty: Uncertainty) -> tuple[Rgb8, float]:
    """Draw where noise seeds disagree; opacity is the sd of DAB OD, 0.1 and more opaque.

    Returns
    -------
    tuple
        uint8 (h, w, 4) RGBA of at most 2 megapixels, and picture px per overlay px.
    """
    sd, step = uncertainty.overview(OVERLAY_MAX_PX)
    rgba = np.empty((*sd.shape, 4), np.uint8)
    rgba[..., :3] = SPREAD_RGB
    rgba[..., 3] = np.rint(255.0 * np.minimum(sd / SPREAD_FULL_OD, 1.0))
    return rgba, step


def outline_paths(mask: Bools, scale: float) -> list[str]:
    """Draw the outlines of a mask, holes too, as SVG path data.

    Parameters
    ----------
    mask
        bool (h, w).
    scale
        Px of the drawing per mask px.

    Returns
    -------
    list of str
        Closed paths; made simpler until they have at most 20,000 points together.
    """
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    found = [np.asarray(contour, np.int32) for contour in contours]
    tolerance_px = 0.6
    simple = _simplify(found, tolerance_px)
    while sum(len(contour) for contour in simple) > OUTLINE_MAX_POINTS:
        tolerance_px *= 1.5
        simple = _simplify(found, tolerance_px)
    return [_path((contour.reshape(-1, 2).astype(np.float64) + 0.5) * scale) for contour in simple]


def _simplify(
    contours: Sequence[NDArray[np.int32]], tolerance_px: float
) -> list[NDArray[np.int32]]:
    simple = [np.asarray(cv2.approxPolyDP(c, tolerance_px, True), np.int32) for c in contours]
    return [contour for contour in simple if len(contour) >= 3]


def _path(points: NDArray[np.float64]) -> str:
    return "M" + "L".join(f"{x:.0f} {y:.0f}" for x, y in points) + "Z"


def _write(path: Path, pixels: cv2.typing.MatLike, options: list[int]) -> None:
    done, data = cv2.imencode(path.suffix, pixels, options)
    if not done:
        raise OutputError(f"{path} cannot be encoded: {pixels.shape} {pixels.dtype}.")
    path.write_bytes(data.tobytes())
