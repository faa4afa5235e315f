"""All metrics of one picture, by name.

In: what was painted, its H&E and, where there is one, its reference. Out: name to number, or
none where a metric has no value. Not here: what a metric means (`metrics` and its siblings).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from wsi_stain.config import Rgb
from wsi_stain.evaluate.metrics import (
    hist_correlation,
    psnr,
    sobel_ssim,
    ssim,
    vif_p,
    whitespace_error,
)
from wsi_stain.evaluate.metrics_nuclei import MAX_MPP, labelling_index
from wsi_stain.evaluate.metrics_stain import dab_p90, hue_of_positives, iod
from wsi_stain.evaluate.pairs import Subject

__all__ = ["PAIRED", "UNPAIRED", "Scores", "score_picture"]

Rgb8 = NDArray[np.uint8]
Scores = dict[str, float | None]

UNPAIRED = (
    "sobel_ssim",
    "white_error",
    "white_signed",
    "hue_deg",
    "positive_fraction",
    "labelling_percent",
    "n_nuclei",
    "dab_p90",
    "iod",
    "miod",
)
PAIRED = ("psnr", "ssim", "ssim_box11", "vif", "hist")
_SSIM_BOX_PX = 11
_VIF_MIN_PX = 41


def score_picture(painted: Rgb8, white: Rgb, subject: Subject, positive_od: float) -> Scores:
    """Measure one picture.

    Parameters
    ----------
    painted
        uint8 (h, w, 3), the subject's crop as some method painted it.
    white
        Its glass, grey levels.
    subject
        H&E, reference, whites, pixel sizes.
    positive_od
        DAB OD (log10) above which a pixel, or the mean of a nucleus, is positive.

    Returns
    -------
    dict
        `UNPAIRED`; with a reference also `PAIRED`, and the stain metrics of the reference itself
        as ``ref_<name>``. None where a metric has no value: no positive pixel, no nuclei, pixels
        of the file too large for nuclei, equal pictures (PSNR).
    """
    he = subject.cut(subject.he)
    space = whitespace_error(painted, he, white, subject.glass.rgb)
    # Enlarging the file's pixels makes no nuclei visible: the file's own size decides.
    mpp = subject.scale.mpp_out if subject.file.group.mpp <= MAX_MPP else None
    scores: Scores = {
        "sobel_ssim": sobel_ssim(painted, he),
        "white_error": space.error_fraction,
        "white_signed": space.signed_fraction,
        **_stain_scores(painted, white, mpp, positive_od),
    }
    if subject.reference is None or subject.reference_glass is None:
        return scores
    reference = subject.cut(subject.reference)
    theirs = _stain_scores(reference, subject.reference_glass.rgb, mpp, positive_od)
    return scores | _likeness(painted, reference) | {f"ref_{k}": v for k, v in theirs.items()}


def _stain_scores(rgb: Rgb8, white: Rgb, mpp: float | None, positive_od: float) -> Scores:
    n_px = rgb.shape[0] * rgb.shape[1]
    hue = hue_of_positives(rgb, positive_od)
    total = iod(rgb)
    index = None if mpp is None else labelling_index(rgb, mpp, positive_od, white)
    return {
        "hue_deg": hue.angle_deg,
        "positive_fraction": hue.n_positive_px / n_px,
        "labelling_percent": None if index is None else index.percent,
        "n_nuclei": None if index is None else float(index.n_nuclei),
        "dab_p90": dab_p90(rgb),
        "iod": total,
        "miod": total / n_px,
    }


def _likeness(painted: Rgb8, reference: Rgb8) -> Scores:
    ratio = psnr(painted, reference)
    large_enough = min(painted.shape[:2]) >= _VIF_MIN_PX
    return {
        "psnr": ratio if math.isfinite(ratio) else None,
        "ssim": ssim(painted, reference),
        "ssim_box11": ssim(painted, reference, _SSIM_BOX_PX),
        "vif": vif_p(painted, reference) if large_enough else None,
        "hist": hist_correlation(painted, reference),
    }
