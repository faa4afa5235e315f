"""Labelling index: which share of the nuclei is brown, and how two sets of indices agree.

In: uint8 RGB of IHC, real or virtual, at 0.5 um/px or finer. Out: counts, percent, agreement.
Not here: pixel metrics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray
from skimage.feature import peak_local_max
from skimage.filters import threshold_otsu
from skimage.segmentation import watershed

from wsi_stain.errors import ConfigError
from wsi_stain.evaluate.metrics_stain import POSITIVE_OD
from wsi_stain.stain.density import HDX, project_od

__all__ = ["IndexAgreement", "LabellingIndex", "find_nuclei", "index_agreement", "labelling_index"]

Rgb8 = NDArray[np.uint8]
Floats = NDArray[np.float32]
Labels = NDArray[np.int32]

RADIUS_UM = 3.5  # a small tumor nucleus; the filter answers to about half and double of it
MIN_AREA_UM2 = 8.0
MIN_CONTRAST_OD = 0.08  # log10 OD: below, a split of background noise is no nucleus
_CAP_OD = 0.35
MAX_MPP = 0.55  # nominal 0.5 um/px of many scanners reaches 0.52
TIERS_PERCENT = (5.0, 30.0)
_SATURATED = (255.0, 255.0, 255.0)


class LabellingIndex(NamedTuple):
    """Share of positive nuclei.

    Attributes
    ----------
    percent
        100 x positive / all; None without nuclei.
    n_nuclei, n_positive
        Counts.
    """

    percent: float | None
    n_nuclei: int
    n_positive: int


class IndexAgreement(NamedTuple):
    """How two series of labelling indices agree.

    Attributes
    ----------
    mae
        Mean absolute difference, percentage points.
    r
        Pearson; NaN where one side is constant.
    icc
        ICC(2,1): two-way random effects, absolute agreement, single rater.
    tier_agreement
        Share of equal tiers (under 5, 5 to 30, over 30 %).
    kappa
        Cohen's, unweighted, on the tiers; 1 where both are constant and equal.
    """

    mae: float
    r: float
    icc: float
    tier_agreement: float
    kappa: float


def labelling_index(
    rgb: Rgb8, mpp: float, positive_od: float = POSITIVE_OD, white: ArrayLike = _SATURATED
) -> LabellingIndex:
    """Count nuclei and the positive ones among them.

    Parameters
    ----------
    rgb
        uint8 (h, w, 3).
    mpp
        Pixel size, um/px, at most 0.55.
    positive_od
        A nucleus is positive where its mean DAB OD (log10) is above: set it on training IHC.
    white
        (3,) grey levels of the glass. A yellow or grey glass taken for 255 reads as DAB: on raw
        fields of one laboratory every blue nucleus was then "positive".

    Returns
    -------
    LabellingIndex
        Percent and counts.

    Raises
    ------
    ConfigError
        Pixels too large to see nuclei.
    """
    labels = find_nuclei(rgb, mpp, white)
    n = int(labels.max(initial=0))
    if n == 0:
        return LabellingIndex(None, 0, 0)
    flat = labels.ravel()
    dab = _densities(rgb, white)[..., 1].ravel()
    sums = np.bincount(flat, weights=dab, minlength=n + 1)[1:]
    areas = np.bincount(flat, minlength=n + 1)[1:]
    n_positive = int((sums / areas > positive_od).sum())
    return LabellingIndex(100.0 * n_positive / n, n, n_positive)


def find_nuclei(rgb: Rgb8, mpp: float, white: ArrayLike = _SATURATED) -> Labels:
    """Segment nuclei: peaks of the Laplacian of Gaussian on H + DAB, grown by watershed.

    Parameters
    ----------
    rgb
        uint8 (h, w, 3).
    mpp
        Pixel size, um/px.
    white
        (3,) grey levels of the glass.

    Returns
    -------
    ndarray
        int32 (h, w): 0 outside, 1..n inside, no gaps.
    """
    if not 0.0 < mpp <= MAX_MPP:
        raise ConfigError(
            f"Nuclei cannot be counted at {mpp:g} um/px; {MAX_MPP} or less is needed.",
            hint="Run the labelling index on native resolution only.",
        )
    stain = np.ascontiguousarray(_densities(rgb, white).sum(axis=-1))
    radius_px = RADIUS_UM / mpp
    calm = cv2.GaussianBlur(stain, (0, 0), max(0.5, 0.2 * radius_px))
    mask = _foreground(np.asarray(calm, dtype=np.float32))
    if not mask.any():
        return np.zeros(mask.shape, np.int32)
    # A disk of radius r answers most to a Gaussian of r / sqrt(2).
    smooth = cv2.GaussianBlur(stain, (0, 0), radius_px / math.sqrt(2.0))
    response = -cv2.Laplacian(smooth, cv2.CV_32F)
    peaks = peak_local_max(  # type: ignore[no-untyped-call]
        response,
        min_distance=max(1, round(0.7 * radius_px)),
        threshold_abs=0.0,
        labels=mask.astype(np.int32),
        exclude_border=False,
    )
    markers = np.zeros(mask.shape, np.int32)
    markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    labels = watershed(-response, markers, mask=mask)  # type: ignore[no-untyped-call]
    return _drop_small(np.asarray(labels, dtype=np.int32), MIN_AREA_UM2 / mpp**2)


def index_agreement(outputs: Sequence[float], references: Sequence[float]) -> IndexAgreement:
    """Compare labelling indices of output and reference, image by image.

    Parameters
    ----------
    outputs, references
        Percent, same order, at least two.
    """
    a, b = np.asarray(outputs, dtype=np.float64), np.asarray(references, dtype=np.float64)
    if a.shape != b.shape or a.size < 2:
        raise ConfigError(f"{a.size} and {b.size} indices cannot be compared; 2 or more pairs can.")
    tiers = [np.digitize(side, TIERS_PERCENT) for side in (a, b)]
    agreement = float(np.mean(tiers[0] == tiers[1]))
    shares = [np.bincount(tier, minlength=3) / a.size for tier in tiers]
    chance = float(shares[0] @ shares[1])
    constant = np.ptp(a) == 0.0 or np.ptp(b) == 0.0
    return IndexAgreement(
        mae=float(np.mean(np.abs(a - b))),
        r=math.nan if constant else float(np.corrcoef(a, b)[0, 1]),
        icc=_icc(np.stack([a, b], axis=1)),
        tier_agreement=agreement,
        kappa=1.0 if chance == 1.0 else (agreement - chance) / (1.0 - chance),
    )


def _densities(rgb: Rgb8, white: ArrayLike) -> Floats:
    """Unmix hematoxylin and DAB: float32 (h, w, 2), log10 OD, 0 and up."""
    rows = np.linalg.inv(HDX)[:, :2].T / math.log(10.0)
    return np.maximum(project_od(rgb, white, rows), 0.0)


def _foreground(stain: Floats) -> NDArray[np.bool_]:
    """Split nuclei from background by Otsu, unless the two classes hardly differ."""
    if float(np.ptp(stain)) == 0.0:
        return np.zeros(stain.shape, bool)
    # Without the cap, black-brown nuclei are one class and blue ones fall to the background.
    capped = np.minimum(stain, np.median(stain) + _CAP_OD)
    split = float(threshold_otsu(capped))  # type: ignore[no-untyped-call]
    dark = capped > split
    if not dark.any():
        return dark
    contrast = float(capped[dark].mean() - capped[~dark].mean())
    return dark if contrast >= MIN_CONTRAST_OD else np.zeros(stain.shape, bool)


def _drop_small(labels: Labels, min_area_px: float) -> Labels:
    areas = np.bincount(labels.ravel())
    keep = areas >= min_area_px
    keep[0] = False
    renumbered = np.where(keep, np.cumsum(keep), 0).astype(np.int32)
    return renumbered[labels]


def _icc(table: NDArray[np.float64]) -> float:
    """Compute ICC(2,1) of an (n, k) table (Shrout and Fleiss 1979)."""
    n, k = table.shape
    grand = table.mean()
    rows, columns = table.mean(axis=1), table.mean(axis=0)
    ms_rows = k * float(((rows - grand) ** 2).sum()) / (n - 1)
    ms_columns = n * float(((columns - grand) ** 2).sum()) / (k - 1)
    rest = table - rows[:, None] - columns[None, :] + grand
    ms_rest = float((rest**2).sum()) / ((n - 1) * (k - 1))
    scale = ms_rows + (k - 1) * ms_rest + k * (ms_columns - ms_rest) / n
    return (ms_rows - ms_rest) / scale if scale > 0.0 else 1.0
