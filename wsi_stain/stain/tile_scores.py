"""How far a virtual tile may be relied on: is its structure that of its H&E, is its glass open?

Room 2 of 4. In: a tile of H&E, what the model made of it. Out: a few numbers. Not here: limits
(`config`), tables (`stages/tiles`), anything that needs a reference.

No score knows the truth: they find tiles whose nuclei, edges or white areas do not lie where those
of the H&E lie. Brown in the wrong nucleus is seen by none of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from wsi_stain.config import ColorReference
from wsi_stain.stain.density import dab_od, is_stained, project_od
from wsi_stain.stain.normalize import StainTransform

__all__ = ["SCORES_VERSION", "TileJudge", "TileScore", "sobel_ssim", "strongest_mean"]

SCORES_VERSION = 1  # part of a shard's key: other scores make it pending

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Rgb8 = NDArray[np.uint8]
Mask = NDArray[np.bool_]

NUCLEUS_SIGMA_UM = 1.0
MIN_TISSUE_FRACTION = 0.10  # with less, a tile's structure is that of a rim and of noise
MIN_NUCLEAR_SD = 0.08  # sd of the normalized hematoxylin density; below, there are no nuclei
DIGITS = 4
# A look at one value in so many tells below which share of them none of the strongest tenth lies.
_SAMPLED, _BELOW = 17, 0.87
_LUMA = np.array([[0.299, 0.587, 0.114]])
_SOBEL_SIDE_PX = 256
_SSIM_PX = 7
_SSIM_C1, _SSIM_C2 = 0.01**2, 0.03**2  # for values 0..1


class TileScore(NamedTuple):
    """What is said of one tile; None where a score has no value.

    Attributes
    ----------
    structure
        Pearson correlation over tissue of the H&E's hematoxylin with the virtual hematoxylin +
        DAB, both smoothed by a Gaussian of 1 um: -1..1. None without nuclei or tissue.
    sobel_ssim
        See `sobel_ssim`, -1..1. None without tissue.
    white_error
        Share of pixels that are white in only one of H&E and output, before glass is laid: 0..1.
    dab_p90
        Mean DAB OD (log10) of the strongest tenth of the pixels.
    dab_sd
        Mean over tissue of the sd of DAB OD over seeds; None for one seed or without tissue.
    """

    structure: float | None
    sobel_ssim: float | None
    white_error: float
    dab_p90: float
    dab_sd: float | None


@dataclass(frozen=True)
class TileJudge:
    """Scores the tiles of one slide.

    Attributes
    ----------
    stain
        The slide's normalization; its `white` is the slide's glass.
    color
        What the bundle's stain looks like.
    mpp_out
        Pixel size of the tiles, um/px.
    """

    stain: StainTransform
    color: ColorReference
    mpp_out: float

    def score(self, he: Rgb8, bare: Rgb8, ihc: Rgb8, sd: Floats | None = None) -> TileScore:
        """Score one tile.

        Parameters
        ----------
        he, bare, ihc
            uint8 (h, w, 3): H&E; output of the model; the same with glass laid over it.
        sd
            float32 (h, w), sd of DAB OD over seeds.
        """
        tissue = is_stained(he, self.stain.white)
        enough = bool(tissue.mean() >= MIN_TISSUE_FRACTION)
        ours = is_stained(bare, self.color.output_white)
        return TileScore(
            structure=_rounded(self._structure(he, ihc, tissue)) if enough else None,
            sobel_ssim=_rounded(sobel_ssim(ihc, he)) if enough else None,
            white_error=round(float(np.mean(ours != tissue)), DIGITS),
            dab_p90=round(strongest_mean(dab_od(ihc)), DIGITS),
            dab_sd=None if sd is None or not tissue.any() else _rounded(float(sd[tissue].mean())),
        )

    def _structure(self, he: Rgb8, ihc: Rgb8, tissue: Mask) -> float | None:
        nuclear = np.linalg.pinv(np.array(self.color.he_stain_od)).T[:1]
        either = np.linalg.pinv(np.array(self.color.stain_od)).T.sum(axis=0, keepdims=True)
        sigma_px = NUCLEUS_SIGMA_UM / self.mpp_out
        a = _smooth(self.stain.project(he, nuclear)[..., 0], sigma_px)[tissue]
        b = _smooth(project_od(ihc, self.color.output_white, either)[..., 0], sigma_px)[tissue]
        return _correlation(a, b)


def sobel_ssim(a: Rgb8, b: Rgb8) -> float:
    """Measure whether edges lie at the same places: SSIM of Sobel magnitudes.

    Both pictures in luma, area-averaged to 256 x 256 px, each magnitude scaled to 0..1 by its own
    largest. SSIM as scikit-image's: uniform window of 7 px, sample covariance, mean over the inner
    positions (Wang et al., IEEE TIP 2004).

    Parameters
    ----------
    a, b
        uint8 (h, w, 3), equal shapes.

    Returns
    -------
    float
        -1..1; 1 for equal pictures.
    """
    x, y = _sobel(a), _sobel(b)
    mean_x, mean_y = _box(x), _box(y)
    product, squares = mean_x * mean_y, mean_x * mean_x + mean_y * mean_y
    n = _SSIM_PX**2
    sample = n / (n - 1)
    cov = sample * (_box(x * y) - product)
    variances = sample * (_box(x * x + y * y) - squares)
    likeness = (2 * product + _SSIM_C1) * (2 * cov + _SSIM_C2)
    likeness /= (squares + _SSIM_C1) * (variances + _SSIM_C2)
    rim = _SSIM_PX // 2
    return float(likeness[rim:-rim, rim:-rim].mean())


def strongest_mean(values: NDArray[Any]) -> float:
    """Average the strongest tenth of finite values, at least one."""
    flat = values.ravel()
    count = max(1, round(0.1 * flat.size))
    # Only the candidates are ordered. Bytes have few densities: of many equal values a sort takes a
    # fifth of a partition's time.
    sample = np.sort(flat[::_SAMPLED])
    strong = flat[flat >= sample[int(_BELOW * len(sample))]]
    if len(strong) < count:
        strong = flat
    return float(np.sort(strong)[-count:].mean(dtype=np.float64))


def _sobel(rgb: Rgb8) -> Doubles:
    luma = cv2.transform(rgb.astype(np.float64), _LUMA)
    grey = cv2.resize(luma, (_SOBEL_SIDE_PX, _SOBEL_SIDE_PX), interpolation=cv2.INTER_AREA)
    magnitude = cv2.magnitude(
        cv2.Sobel(grey, cv2.CV_64F, 1, 0), cv2.Sobel(grey, cv2.CV_64F, 0, 1)
    ).astype(np.float64, copy=False)
    largest = float(magnitude.max())
    return magnitude / largest if largest > 0.0 else magnitude


def _box(values: Doubles) -> Doubles:
    return cv2.blur(values, (_SSIM_PX, _SSIM_PX)).astype(np.float64, copy=False)


def _smooth(density: Floats, sigma_px: float) -> Floats:
    return np.asarray(cv2.GaussianBlur(density, (0, 0), sigma_px), np.float32)


def _correlation(a: Floats, b: Floats) -> float | None:
    x, y = a - a.mean(dtype=np.float64), b - b.mean(dtype=np.float64)
    if float(np.sqrt(np.mean(x * x))) < MIN_NUCLEAR_SD:
        return None
    scale = float(np.sqrt((x @ x) * (y @ y)))
    # An even output over uneven nuclei keeps nothing of them.
    return float(x @ y) / scale if scale > 0.0 else 0.0


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, DIGITS)
