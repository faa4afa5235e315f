"""Baselines that a method must beat, and the interval that says whether it did.

In: pictures, or per-image values with their slide. Out: null pictures, means with intervals.
Not here: metrics.

EVALUATION, section 4: beat `null_recolor` on stain axes and `null_blur` on structure axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from wsi_stain.errors import ConfigError
from wsi_stain.evaluate.metrics import psnr
from wsi_stain.stain.density import od_to_rgb, rgb_to_od

__all__ = [
    "Interval",
    "OdAffine",
    "bootstrap_interval",
    "choose_blur_px",
    "fit_recolor",
    "null_blur",
    "null_mean",
    "null_recolor",
]

Rgb8 = NDArray[np.uint8]
Doubles = NDArray[np.float64]

_MIN_GROUPS = 5


class OdAffine(NamedTuple):
    """One affine OD map of a slide: ``od_out = matrix @ od + offset``.

    Attributes
    ----------
    matrix, offset
        float64 (3, 3) and (3,).
    white, target_white
        (3,) grey levels of the glass, before and after.
    """

    matrix: Doubles
    offset: Doubles
    white: Doubles
    target_white: Doubles


class Interval(NamedTuple):
    """A mean over images with its interval.

    Attributes
    ----------
    mean
        Over all images.
    low, high
        Percentile bootstrap, resampled by group; None with under 5 groups: list them all instead.
    n_images, n_groups
        What it rests on.
    """

    mean: float
    low: float | None
    high: float | None
    n_images: int
    n_groups: int


def fit_recolor(
    he_pixels: Rgb8, ihc_pixels: Rgb8, white: ArrayLike, target_white: ArrayLike
) -> OdAffine:
    """Fit the map that gives the slide the IHC's mean and covariance of OD, and nothing by place.

    It is the optimal transport map between the two Gaussians, the least movement that does so.

    Parameters
    ----------
    he_pixels, ihc_pixels
        uint8 (n, 3), tissue of the slide and of the training IHC, at least 4 each.
    white, target_white
        (3,) grey levels of their glass.

    Returns
    -------
    OdAffine
        One map for the whole slide.

    References
    ----------
    Olkin and Pukelsheim, "The distance between two random vectors with given dispersion
    matrices", 1982.
    """
    source = rgb_to_od(he_pixels, white).astype(np.float64)
    target = rgb_to_od(ihc_pixels, target_white).astype(np.float64)
    ridge = 1e-9 * np.eye(3)  # one flat color has no inverse
    root = _root(np.cov(source.T) + ridge)
    inverse = np.linalg.inv(root)
    matrix = inverse @ _root(root @ (np.cov(target.T) + ridge) @ root) @ inverse
    return OdAffine(
        matrix=matrix,
        offset=target.mean(axis=0) - matrix @ source.mean(axis=0),
        white=np.asarray(white, dtype=np.float64),
        target_white=np.asarray(target_white, dtype=np.float64),
    )


def null_recolor(he: Rgb8, recolor: OdAffine) -> Rgb8:
    """Recolor the H&E by one slide-level OD map: the baseline for stain axes.

    Parameters
    ----------
    he
        uint8 (..., 3).
    recolor
        From `fit_recolor`.

    Returns
    -------
    ndarray
        uint8, same shape.
    """
    od = rgb_to_od(he, recolor.white).astype(np.float64)
    return od_to_rgb(od @ recolor.matrix.T + recolor.offset, recolor.target_white)


def null_blur(picture: Rgb8, sigma_px: float) -> Rgb8:
    """Blur a recolored H&E: the baseline for structure axes; ``sigma_px=0`` changes nothing."""
    if sigma_px == 0.0:
        return picture.copy()
    blurred: Rgb8 = np.asarray(
        cv2.GaussianBlur(picture, (0, 0), sigma_px, borderType=cv2.BORDER_REFLECT_101),
        dtype=np.uint8,
    )
    return blurred


def choose_blur_px(
    recolored: Sequence[Rgb8],
    references: Sequence[Rgb8],
    sigmas_px: Sequence[float] = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0),
) -> float:
    """Choose the blur with the best mean PSNR on training pairs."""
    if not recolored or len(recolored) != len(references):
        raise ConfigError(f"{len(recolored)} pictures and {len(references)} references: no pairs.")

    def mean_psnr(sigma_px: float) -> float:
        pairs = zip(recolored, references, strict=True)
        return float(np.mean([psnr(null_blur(a, sigma_px), b) for a, b in pairs]))

    return max(sigmas_px, key=mean_psnr)


def null_mean(shape: tuple[int, ...], ihc_pixels: Rgb8) -> Rgb8:
    """Paint the training IHC's mean color everywhere: uint8 of `shape`, (..., 3)."""
    color = np.rint(ihc_pixels.reshape(-1, 3).mean(axis=0)).astype(np.uint8)
    return np.broadcast_to(color, shape).copy()


def bootstrap_interval(
    values: Sequence[float],
    groups: Sequence[str],
    rng: np.random.Generator,
    level: float = 0.95,
    rounds: int = 2000,
) -> Interval:
    """Give a mean over images and its percentile interval, resampled by slide or patient.

    Parameters
    ----------
    values
        One per image, finite.
    groups
        Slide or patient of each image: images of one slide are not independent.
    rng
        Source of the resampling.
    level
        Coverage.
    rounds
        Number of resamples.

    Returns
    -------
    Interval
        Without bounds where there are under 5 groups.

    Raises
    ------
    ConfigError
        Nothing to average, unequal lengths, or a value that is not finite.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0 or data.size != len(groups) or not np.isfinite(data).all():
        raise ConfigError(
            f"{data.size} values for {len(groups)} groups: an interval needs as many finite values "
            "as group names, and at least one."
        )
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < _MIN_GROUPS:
        return Interval(float(data.mean()), None, None, data.size, len(names))
    sums, counts = np.bincount(member, weights=data), np.bincount(member)
    picks = rng.integers(len(names), size=(rounds, len(names)))
    means = sums[picks].sum(axis=1) / counts[picks].sum(axis=1)
    tail = 50.0 * (1.0 - level)
    low, high = np.percentile(means, [tail, 100.0 - tail])
    return Interval(float(data.mean()), float(low), float(high), data.size, len(names))


def _root(matrix: Doubles) -> Doubles:
    """Take the symmetric square root of a positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    root: Doubles = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    return root
