"""Likeness of two pictures: pixels, structure, information, histograms.

In: uint8 RGB of a virtual stain and of its reference. Out: numbers. Not here: stain amounts
(`metrics_stain`), nuclei (`metrics_nuclei`), seams (`metrics_seam`), baselines (`metrics_null`).

Definitions follow EVALUATION, section 1, and are versioned: change one, raise `METRIC_VERSION`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray
from skimage.metrics import structural_similarity

from wsi_stain.errors import ConfigError
from wsi_stain.stain import tile_scores
from wsi_stain.stain.density import GLASS_OD, is_stained

__all__ = [
    "METRIC_VERSION",
    "Whitespace",
    "hist_correlation",
    "hist_pooled",
    "luma",
    "psnr",
    "sobel_ssim",
    "ssim",
    "vif_p",
    "whitespace_error",
]

METRIC_VERSION = 4  # 2: nuclei by blob response; 3: bare white error, seams, spread; 4: white area

Rgb8 = NDArray[np.uint8]
Doubles = NDArray[np.float64]

_LUMA = np.array([0.299, 0.587, 0.114])
_VIF_MIN_PX = 41
_VIF_NOISE = 2.0
_TINY = 1e-8


class Whitespace(NamedTuple):
    """How the white areas of output and H&E differ, as fractions of all pixels.

    Attributes
    ----------
    error_fraction
        White in exactly one of the two, 0..1.
    signed_fraction
        White share of the output minus that of the H&E, -1..1.
    he_fraction
        White share of the H&E, 0..1.
    """

    error_fraction: float
    signed_fraction: float
    he_fraction: float


def luma(rgb: Rgb8) -> Doubles:
    """Weigh RGB to luma (BT.601): float64 (...), 0..255, not rounded."""
    weighted: Doubles = rgb.astype(np.float64) @ _LUMA
    return weighted


def psnr(output: Rgb8, reference: Rgb8) -> float:
    """Measure the peak signal-to-noise ratio, range 255, one MSE over all pixels and channels.

    Parameters
    ----------
    output, reference
        uint8 (h, w, 3), equal shapes.

    Returns
    -------
    float
        dB; infinite for equal pictures.
    """
    _check_pair(output, reference)
    mse = float(np.mean((output.astype(np.float64) - reference.astype(np.float64)) ** 2))
    return math.inf if mse == 0.0 else 10.0 * math.log10(255.0**2 / mse)


def ssim(output: Rgb8, reference: Rgb8, window_px: int = 7) -> float:
    """Measure structural similarity: scikit-image's, RGB, range 255, uniform window.

    Parameters
    ----------
    output, reference
        uint8 (h, w, 3), equal shapes.
    window_px
        7 as in the scripts of BCI and ASP; 11 is the tables' ``ssim_box11``.

    Returns
    -------
    float
        Mean over pixels and channels, -1..1.
    """
    _check_pair(output, reference, window_px)
    return float(
        structural_similarity(  # type: ignore[no-untyped-call]
            output, reference, win_size=window_px, channel_axis=-1, data_range=255
        )
    )


def sobel_ssim(output: Rgb8, he: Rgb8) -> float:
    """Measure whether the H&E's edges are kept: SSIM of Sobel magnitudes, no reference needed.

    Both pictures in grey, area-averaged to 256 x 256 px, each magnitude scaled to 0..1 by its own
    largest. Identity gives 1, so read it with IOD.

    Parameters
    ----------
    output, he
        uint8 (h, w, 3), equal shapes.

    Returns
    -------
    float
        -1..1.
    """
    _check_pair(output, he)
    return tile_scores.sobel_ssim(output, he)


def vif_p(output: Rgb8, reference: Rgb8) -> float:
    """Measure pixel-domain visual information fidelity on luma 0..255.

    Four scales, Gaussian windows of 17, 9, 5 and 3 px with sigma a fifth of that, noise variance
    2, as ``piq.vif_p(output, reference)``. Not symmetric; may exceed 1.

    Parameters
    ----------
    output, reference
        uint8 (h, w, 3), equal shapes, at least 41 px on each side.

    Returns
    -------
    float
        0 and up; 1 for equal pictures.

    References
    ----------
    Sheikh and Bovik, "Image information and visual quality", IEEE TIP 2006.
    """
    _check_pair(output, reference, _VIF_MIN_PX)
    x, y = luma(output), luma(reference)
    kept, present = 0.0, 0.0
    for scale in range(4):
        window_px = 2 ** (4 - scale) + 1
        if scale > 0:
            x, y = _blur_valid(x, window_px)[::2, ::2], _blur_valid(y, window_px)[::2, ::2]
        scale_kept, scale_present = _information(x, y, window_px)
        kept += scale_kept
        present += scale_present
    return (kept + _TINY) / (present + _TINY)


def hist_correlation(output: Rgb8, reference: Rgb8) -> float:
    """Correlate color histograms: Pearson over 256 counts, mean of the three channels.

    Parameters
    ----------
    output, reference
        uint8 (h, w, 3); sizes may differ.

    Returns
    -------
    float
        -1..1 (OpenCV's HISTCMP_CORREL per channel).
    """
    return hist_pooled([output], [reference])


def hist_pooled(outputs: Sequence[Rgb8], references: Sequence[Rgb8]) -> float:
    """Correlate color histograms of two whole sets, as `hist_correlation` does for one pair."""
    if not outputs or not references:
        raise ConfigError("A pooled histogram needs at least one picture on each side.")
    pair = _histograms(outputs), _histograms(references)
    return float(np.mean([_pearson(pair[0][c], pair[1][c]) for c in range(3)]))


def whitespace_error(
    output: Rgb8, he: Rgb8, output_white: ArrayLike, he_white: ArrayLike
) -> Whitespace:
    """Measure whether glass and lumina stay open: white is OD < 0.15 in all channels.

    Parameters
    ----------
    output, he
        uint8 (h, w, 3), equal shapes.
    output_white, he_white
        (3,) grey levels of each picture's glass.

    Returns
    -------
    Whitespace
        Unsigned, signed, and what the H&E has.
    """
    _check_pair(output, he)
    ours = ~is_stained(output, output_white, GLASS_OD)
    theirs = ~is_stained(he, he_white, GLASS_OD)
    return Whitespace(
        error_fraction=float(np.mean(ours != theirs)),
        signed_fraction=float(ours.mean() - theirs.mean()),
        he_fraction=float(theirs.mean()),
    )


def _check_pair(a: NDArray[Any], b: NDArray[Any], min_px: int = 1) -> None:
    if a.shape != b.shape or a.ndim != 3 or a.shape[2] != 3 or a.dtype != np.uint8:
        raise ConfigError(
            f"Pictures of {a.shape} {a.dtype} and {b.shape} {b.dtype} cannot be compared; both "
            "must be uint8 (h, w, 3) of one size."
        )
    if min(a.shape[:2]) < min_px:
        raise ConfigError(f"A picture of {a.shape[:2]} px is too small; {min_px} px are needed.")


def _blur_valid(picture: Doubles, window_px: int) -> Doubles:
    blurred = np.asarray(cv2.GaussianBlur(picture, (window_px, window_px), window_px / 5.0))
    margin = window_px // 2
    return blurred[margin:-margin, margin:-margin].astype(np.float64, copy=False)


def _information(x: Doubles, y: Doubles, window_px: int) -> tuple[float, float]:
    """Sum the information that x keeps of y, and that y has, at one scale."""
    mean_x, mean_y = _blur_valid(x, window_px), _blur_valid(y, window_px)
    var_x = np.maximum(_blur_valid(x * x, window_px) - mean_x**2, 0.0)
    var_y = np.maximum(_blur_valid(y * y, window_px) - mean_y**2, 0.0)
    cov = _blur_valid(x * y, window_px) - mean_x * mean_y
    gain = cov / (var_y + _TINY)
    rest = var_x - gain * cov
    flat_x, flat_y = var_x < _TINY, var_y < _TINY
    rest = np.where(flat_y, var_x, rest)
    rest = np.where(flat_x, 0.0, rest)
    var_y = np.where(flat_y, 0.0, var_y)
    gain = np.where(flat_x | flat_y, 0.0, gain)
    # A negative gain is no fidelity: all of x is then noise.
    rest = np.maximum(np.where(gain >= 0.0, rest, var_x), _TINY)
    gain = np.maximum(gain, 0.0)
    kept = np.log10(1.0 + gain**2 * var_y / (rest + _VIF_NOISE))
    return float(kept.sum()), float(np.log10(1.0 + var_y / _VIF_NOISE).sum())


def _histograms(pictures: Sequence[Rgb8]) -> Doubles:
    total = np.zeros((3, 256))
    for picture in pictures:
        flat = picture.reshape(-1, 3)
        total += np.stack([np.bincount(flat[:, c], minlength=256) for c in range(3)])
    return total


def _pearson(a: Doubles, b: Doubles) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    # Two perfectly even histograms are alike; one even and one uneven share nothing.
    return float(a @ b) / scale if scale > 0.0 else float(np.array_equal(a, b))
