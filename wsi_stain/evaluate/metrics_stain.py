"""Amount and hue of the brown: IOD, the strongest DAB, its distribution, its color.

In: uint8 RGB. Out: numbers. Not here: likeness of pictures (`metrics`), nuclei.

DAB OD is log10(255 / I) unmixed by the hdx matrix, clipped at 0 (`stain.density.dab_od`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsi_stain.errors import ConfigError
from wsi_stain.stain.density import HDX, POSITIVE_OD, dab_od, rgb_to_od
from wsi_stain.stain.separate import angle_deg
from wsi_stain.stain.tile_scores import strongest_mean

__all__ = [
    "POSITIVE_OD",
    "Hue",
    "dab_agreement",
    "dab_kl",
    "dab_p90",
    "dab_values",
    "hue_of_positives",
    "iod",
    "iod_deviation_percent",
]

Rgb8 = NDArray[np.uint8]
Doubles = NDArray[np.float64]
Definition = Literal["dab", "rgb", "fod"]
Mode = Literal["exact", "imagej"]

_FOD_POWER = 1.8
_FOD_FLOOR = 0.15
_KL_BINS = 256
_KL_EPSILON = 1e-10


class Hue(NamedTuple):
    """Color of the positive pixels.

    Attributes
    ----------
    angle_deg
        Angle between their mean OD and the DAB vector; None where nothing is positive.
    n_positive_px
        How many there are.
    """

    angle_deg: float | None
    n_positive_px: int


def iod(rgb: Rgb8, definition: Definition = "dab", mode: Mode = "exact") -> float:
    """Measure integrated optical density, the sum over pixels; divide by pixels for mIOD.

    Parameters
    ----------
    rgb
        uint8 (..., 3).
    definition
        "dab": DAB OD. "rgb": log10(255 / I) over all channels, I clamped to 1..255. "fod": the
        focal OD of ccitachi/PSPStain: DAB alone rebuilt to grey, ^1.8, values below 0.15 dropped.
    mode
        For "dab": "exact", or "imagej" through an 8-bit DAB picture, ``255 * 10**-OD`` rounded.

    Returns
    -------
    float
        log10 OD times pixels, 0 and up. Print definition and mode with it.
    """
    if definition == "rgb":
        return float(rgb_to_od(rgb, (255.0,) * 3).sum(dtype=np.float64)) / math.log(10.0)
    if definition == "fod":
        return float(_focal(dab_od(rgb)).sum())
    return float(dab_values(rgb, mode).sum(dtype=np.float64))


def dab_values(rgb: Rgb8, mode: Mode = "exact") -> Doubles:
    """Give what `iod` sums over, pixel by pixel.

    Parameters
    ----------
    rgb
        uint8 (..., 3).
    mode
        As for `iod`.

    Returns
    -------
    ndarray
        float64 (...), log10 OD, 0 and up.
    """
    dab = dab_od(rgb)
    return _through_8_bit(dab) if mode == "imagej" else dab.astype(np.float64)


def iod_deviation_percent(
    outputs: Sequence[Rgb8], references: Sequence[Rgb8], definition: Definition = "dab"
) -> float:
    """Compare the IOD of two whole sets: ``100 (out - ref) / ref`` of the sums.

    Raises
    ------
    ConfigError
        The sets differ in their number of pixels, or the reference has no IOD.
    """
    n_out, n_ref = (sum(im.size for im in side) for side in (outputs, references))
    total_ref = sum(iod(im, definition) for im in references)
    if n_out != n_ref or total_ref <= 0.0:
        raise ConfigError(
            f"IOD of {n_out // 3} output and {n_ref // 3} reference pixels (reference IOD "
            f"{total_ref:.3g}) cannot be compared; both sets need equal areas and some stain."
        )
    return 100.0 * (sum(iod(im, definition) for im in outputs) - total_ref) / total_ref


def dab_p90(rgb: Rgb8, clip: Literal["zero", "softplus"] = "zero") -> float:
    """Average the strongest tenth of the pixels' DAB OD.

    Parameters
    ----------
    rgb
        uint8 (..., 3), at least one pixel.
    clip
        "softplus" gives the numbers of facevoid/UNIStainNet (mode ``unistain``).

    Returns
    -------
    float
        log10 OD, 0 and up.
    """
    return strongest_mean(dab_od(rgb, clip))


def dab_agreement(outputs: Sequence[float], references: Sequence[float]) -> tuple[float, float]:
    """Compare per-image values: Pearson r (NaN where one side is constant) and mean |difference|.

    Parameters
    ----------
    outputs, references
        One value per image in the same order, at least two.
    """
    a, b = np.asarray(outputs, dtype=np.float64), np.asarray(references, dtype=np.float64)
    if a.shape != b.shape or a.size < 2:
        raise ConfigError(f"{a.size} and {b.size} values cannot be compared; 2 or more pairs can.")
    mae = float(np.mean(np.abs(a - b)))
    if np.ptp(a) == 0.0 or np.ptp(b) == 0.0:
        return math.nan, mae
    return float(np.corrcoef(a, b)[0, 1]), mae


def dab_kl(outputs: Sequence[Rgb8], references: Sequence[Rgb8]) -> float:
    """Measure KL(reference || output) of the DAB OD histograms of two sets, nats.

    256 bins from 0 to the larger maximum of the two, 1e-10 added to each share, renormalized.
    """
    pair = [np.concatenate([dab_od(im).ravel() for im in side]) for side in (outputs, references)]
    top = max(float(pair[0].max()), float(pair[1].max()), 1e-6)
    q, p = (_shares(values, top) for values in pair)
    return float(np.sum(p * np.log(p / q)))


def hue_of_positives(rgb: Rgb8, positive_od: float = POSITIVE_OD) -> Hue:
    """Measure how far the positive pixels' mean OD vector is turned away from DAB.

    Parameters
    ----------
    rgb
        uint8 (..., 3).
    positive_od
        log10 DAB OD above which a pixel is positive.

    Returns
    -------
    Hue
        Degrees and count.
    """
    positive = dab_od(rgb) > positive_od
    n = int(positive.sum())
    if n == 0:
        return Hue(None, 0)
    mean_od = rgb_to_od(rgb[positive], (255.0,) * 3).mean(axis=0, dtype=np.float64)
    return Hue(angle_deg(mean_od, HDX[1]), n)


def _focal(dab: NDArray[np.float32]) -> Doubles:
    alone = 10.0 ** (-dab[..., None].astype(np.float64) * HDX[1])
    grey = alone @ np.array([0.2125, 0.7154, 0.0721])
    ceiling = 10.0 ** (-math.exp(1.0 / _FOD_POWER))
    focal = np.maximum(-np.log10(grey + ceiling), 0.0) ** _FOD_POWER
    return np.where(focal < _FOD_FLOOR, 0.0, focal)


def _through_8_bit(dab: NDArray[np.float32]) -> Doubles:
    levels = np.rint(255.0 * 10.0 ** -dab.astype(np.float64))
    return np.log10(255.0 / np.where(levels == 0.0, 0.5, levels))


def _shares(values: NDArray[np.float32], top: float) -> Doubles:
    counts, _ = np.histogram(values, bins=_KL_BINS, range=(0.0, top))
    shares = counts / counts.sum() + _KL_EPSILON
    normalized: Doubles = shares / shares.sum()
    return normalized
