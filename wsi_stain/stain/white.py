"""The white of the glass: what the scanner shows where nothing absorbs.

Room 2 of 4. In: a thumbnail or sampled pixels. Out: a `WhitePoint`. Not here: tissue masks.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wsi_stain.config import Rgb, Settings
from wsi_stain.stain.density import as_rgb

__all__ = ["WhitePoint", "estimate_white"]

_LUMA = np.array([0.299, 0.587, 0.114])
_MIN_LUMA = 190  # darker than this no scanner shows glass
_MAX_SPREAD = 24  # tinted glass is less colorful than this, eosin more
_MIN_FRACTION = 0.01  # of all pixels: below, the white is not measured but taken over
_PEAK_SHARE = 0.2  # a peak counts as glass from this share of the highest on
_HALF_WIDTH = 3  # grey levels around the peak that are the same glass
_FOOT = 10  # so many levels darker, a sharp peak is over
_MIN_SHARPNESS = 3.0


class WhitePoint(Settings, frozen=True, kw_only=True):
    """The white that was found, and how.

    Attributes
    ----------
    rgb
        Grey levels of the glass.
    origin
        "glass": measured. "background": too little glass was seen and the file's own background
        color was taken over.
    glass_fraction
        Share of the pixels that showed this glass; 0 where the background was taken.
    """

    rgb: Rgb
    origin: Literal["glass", "background"]
    glass_fraction: float


def estimate_white(pixels: NDArray[np.uint8], background: ArrayLike) -> WhitePoint:
    """Estimate the white of the glass.

    Glass is the brightest sizeable peak among bright and nearly colorless pixels; its white is the
    median of each channel there. Pixels that equal `background` exactly are left out where there
    is other glass: scanners paint unscanned areas with it.

    Parameters
    ----------
    pixels
        uint8 (..., 3), a thumbnail or a sample of the whole slide.
    background
        (3,) grey levels that the file states for unscanned areas.

    Returns
    -------
    WhitePoint
        Measured, or the background where no sharp peak holds 1 % of the pixels.
    """
    flat = pixels.reshape(-1, 3)
    stated = np.asarray(background, dtype=np.float64)
    neutral = flat[np.ptp(flat.astype(np.int16), axis=1) <= _MAX_SPREAD]
    scanned = neutral[(neutral != np.rint(stated)).any(axis=1)]
    luma = np.rint(scanned @ _LUMA).astype(np.int64)
    bright = luma[luma >= _MIN_LUMA]
    below_peak = (_brightest_peak(bright) if len(bright) else 255) - luma
    glass = scanned[np.abs(below_peak) <= _HALF_WIDTH]
    share = len(glass) / max(len(flat), 1)
    # Pale tissue is bright too, but spread over many levels; glass is one level.
    foot = np.count_nonzero(np.abs(below_peak - _FOOT) <= _HALF_WIDTH)
    if share < _MIN_FRACTION or len(glass) < _MIN_SHARPNESS * foot:
        return WhitePoint(rgb=as_rgb(stated), origin="background", glass_fraction=0.0)
    return WhitePoint(rgb=as_rgb(np.median(glass, axis=0)), origin="glass", glass_fraction=share)


def _brightest_peak(luma: NDArray[np.int64]) -> int:
    """Find the brightest luma around which a sizeable share of the highest peak lies."""
    counts = np.bincount(luma, minlength=256).astype(np.float64)
    smooth = np.convolve(counts, np.ones(2 * _HALF_WIDTH + 1), mode="same")
    top = int(np.flatnonzero(smooth >= _PEAK_SHARE * smooth.max()).max())
    # From there climb down to the top of that peak.
    while top > 0 and smooth[top - 1] > smooth[top]:
        top -= 1
    return top
