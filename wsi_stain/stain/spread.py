"""How far noise seeds disagree about the brown: sd of DAB OD, pixel by pixel.

Room 2 of 4. In: pictures of one place, one a seed. Out: their spread, and its grey levels. Not
here: who makes the pictures.

The spread tells how much of the result is chance. The bias of the model is not in it: where it
errs in the same way with every seed, the spread is small.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsi_stain.stain.density import dab_od

__all__ = ["OD_PER_LEVEL", "DabSpread", "spread_levels"]

Floats = NDArray[np.float32]
Rgb8 = NDArray[np.uint8]

OD_PER_LEVEL = 0.005  # log10 DAB OD per grey level of the uncertainty pyramid


class DabSpread:
    """Running mean and squares of DAB OD, picture by picture.

    Memory bound: two float32 pictures, whatever the number of seeds.

    Notes
    -----
    Welford, "Note on a method for calculating corrected sums of squares and products",
    Technometrics 1962.
    """

    def __init__(self) -> None:
        self._n = 0
        self._mean = np.zeros(0, np.float32)
        self._squares = np.zeros(0, np.float32)

    def add(self, rgb: Rgb8) -> None:
        """Take in the picture of one more seed, uint8 (..., 3), all of one shape."""
        dab = dab_od(rgb)
        if self._n == 0:
            self._mean, self._squares = np.zeros_like(dab), np.zeros_like(dab)
        self._n += 1
        off = dab - self._mean
        self._mean += off / np.float32(self._n)
        self._squares += off * (dab - self._mean)

    def sd(self) -> Floats:
        """Give the sample sd (n - 1), float32 (...), log10 OD; 0 for fewer than two pictures."""
        sd: Floats = np.sqrt(self._squares / np.float32(max(1, self._n - 1)))
        return sd


def spread_levels(sd: Floats) -> NDArray[np.uint8]:
    """Turn sd of DAB OD into grey levels of `OD_PER_LEVEL`, uint8; 1.275 and more are 255."""
    levels = np.minimum(np.rint(sd / np.float32(OD_PER_LEVEL)), np.float32(255.0))
    return np.asarray(levels, np.uint8)
