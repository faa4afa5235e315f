"""Is the spread over seeds honest: is it large where the brown is wrong?

In: spread, output and an aligned reference. Out: a rank correlation. Not here: the spread itself.

Rank correlation asks for order alone: doubt need not equal error, but should rise with it.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from wsi_stain.stain.density import dab_od

__all__ = ["rank_error", "spearman"]

Doubles = NDArray[np.float64]
Rgb8 = NDArray[np.uint8]

CELL_PX = 8  # registration of aligned sections is good to a few px
MIN_CELLS = 20


def rank_error(
    sd: NDArray[np.float32], output: Rgb8, reference: Rgb8, tissue: NDArray[np.bool_]
) -> float | None:
    r"""Correlate sd of DAB OD with \|DAB error\| by rank, over cells of 8 px with tissue.

    Parameters
    ----------
    sd
        float32 (h, w).
    output, reference
        uint8 (h, w, 3), aligned.
    tissue
        bool (h, w); a cell counts where half of it is tissue.

    Returns
    -------
    float
        -1..1; None with fewer than 20 cells, or where all are alike.
    """
    error = np.abs(_cells(dab_od(output)) - _cells(dab_od(reference)))
    counted = _cells(tissue.astype(np.float32)) >= 0.5
    if np.count_nonzero(counted) < MIN_CELLS:
        return None
    return spearman(_cells(sd)[counted], error[counted])


def spearman(a: NDArray[Any], b: NDArray[Any]) -> float | None:
    """Correlate ranks, ties at their mean rank; None where one side is constant or empty."""
    if a.size == 0:
        return None
    x, y = (_ranks(values) for values in (a, b))
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0.0 else None


def _ranks(values: NDArray[Any]) -> Doubles:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean_rank: Doubles = last - (counts - 1) / 2.0
    return mean_rank[place]


def _cells(values: NDArray[np.float32]) -> Doubles:
    """Average over cells; what fills none at the right and the bottom is left out."""
    height, width = (side // CELL_PX for side in values.shape)
    inner = np.ascontiguousarray(values[: height * CELL_PX, : width * CELL_PX])
    small = cv2.resize(inner, (width, height), interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.float64)
