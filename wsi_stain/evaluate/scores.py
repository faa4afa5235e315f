"""All metrics of one picture, by name.

In: what was painted, its H&E and, where there is one, its reference. Out: name to number, or
none where a metric has no value. Not here: what a metric means (`metrics` and its siblings).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from wsi_stain.config import Rgb
from wsi_stain.errors import ConfigError
from wsi_stain.evaluate.metrics import (
    hist_correlation,
    psnr,
    sobel_ssim,
    ssim,
    vif_p,
    whitespace_error,
)
from wsi_stain.evaluate.metrics_nuclei import MAX_MPP, labelling_index
from wsi_stain.evaluate.metrics_seam import BorderLines, seam_ratio
from wsi_stain.evaluate.metrics_spread import rank_error
from wsi_stain.evaluate.metrics_stain import dab_p90, hue_of_positives, iod
from wsi_stain.evaluate.paint import Painted
from wsi_stain.evaluate.pairs import Subject
from wsi_stain.stain.density import is_stained

__all__ = ["MAKING", "PAIRED", "UNPAIRED", "Scores", "score_making", "score_picture"]

Rgb8 = NDArray[np.uint8]
Scores = dict[str, float | None]

UNPAIRED = (
    "sobel_ssim",
    "white_error",
    "white_signed",
    "white_he",
    "hue_deg",
    "positive_fraction",
    "labelling_percent",
    "n_nuclei",
    "dab_p90",
    "iod",
    "miod",
)
MAKING = ("white_error_bare", "seam_ratio", "seam_ratio_he", "dab_sd", "sd_error_rho")
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
        "white_he": space.he_fraction,
        **_stain_scores(painted, white, mpp, positive_od),
    }
    if subject.reference is None or subject.reference_glass is None:
        return scores
    reference = subject.cut(subject.reference)
    theirs = _stain_scores(reference, subject.reference_glass.rgb, mpp, positive_od)
    return scores | _likeness(painted, reference) | {f"ref_{k}": v for k, v in theirs.items()}


def score_making(painted: Painted, white: Rgb, subject: Subject) -> Scores:
    """Measure what is lost once the picture is a file: its making.

    Parameters
    ----------
    painted
        As a painter gave it.
    white
        Its glass, grey levels.
    subject
        H&E, whites, an aligned reference where there is one.

    Returns
    -------
    dict
        `MAKING`. White error before glass is laid; seam ratio over tissue, mean of two sets of
        lines, and that of the H&E at the same lines, none for a single tile: read them together,
        since nuclei lie on some lines and not on others. With several seeds the mean sd of DAB OD
        over tissue, and on aligned pairs its rank correlation with the error, see `rank_error`.
    """
    he = subject.cut(subject.he)
    tissue = is_stained(he, subject.glass.rgb)
    space = whitespace_error(painted.bare, he, white, subject.glass.rgb)
    sd, rho = None, None
    if painted.sd is not None and tissue.any():
        sd = float(painted.sd[tissue].mean())
        if subject.reference is not None and subject.file.group.aligned:
            reference = subject.cut(subject.reference)
            rho = rank_error(painted.sd, painted.picture, reference, tissue)
    return {
        "white_error_bare": space.error_fraction,
        "seam_ratio": _seam_ratio(painted.picture, painted.seams, tissue),
        "seam_ratio_he": _seam_ratio(he, painted.seams, tissue),
        "dab_sd": sd,
        "sd_error_rho": rho,
    }


def _seam_ratio(
    picture: Rgb8, seams: tuple[BorderLines, ...], tissue: NDArray[np.bool_]
) -> float | None:
    try:
        ratios = [seam_ratio(picture, lines, tissue, avoid=seams).ratio for lines in seams]
    except ConfigError:  # no tissue on the borders, or a flat picture: there is no ratio
        return None
    return float(np.mean(ratios)) if ratios else None


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
