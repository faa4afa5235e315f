"""Separation of two stains: which two optical-density vectors explain the tissue's color.

Room 2 of 4. In: optical density of stained pixels. Out: two unit vectors. Not here: references,
rendering.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["angle_deg", "macenko_vectors", "sparse_codes", "sparse_vectors"]

Doubles = NDArray[np.float64]


def macenko_vectors(od: NDArray[Any], tail_percent: float = 1.0) -> Doubles:
    """Find the extreme stain directions in the plane of largest variance.

    Parameters
    ----------
    od
        float (n, 3), natural-log OD of stained pixels.
    tail_percent
        Share of the pixels beyond each extreme angle.

    Returns
    -------
    ndarray
        float64 (2, 3), unit rows, 0 and up; first the one that absorbs more red, which in H&E is
        hematoxylin. Rows may coincide where there is only one stain.

    References
    ----------
    Macenko et al., "A method for normalizing histology slides for quantitative analysis",
    ISBI 2009.
    """
    points = np.asarray(od, dtype=np.float64)
    _, axes = np.linalg.eigh(np.cov(points.T))
    plane = axes[:, [2, 1]].T
    # Eigenvectors have no sign; OD is positive.
    plane *= np.where(plane.sum(axis=1, keepdims=True) < 0, -1.0, 1.0)
    u, v = (points @ plane.T).T
    low, high = np.percentile(np.arctan2(v, u), [tail_percent, 100.0 - tail_percent])
    pair = np.array([[np.cos(low), np.sin(low)], [np.cos(high), np.sin(high)]]) @ plane
    pair = np.maximum(pair, 0.0)
    pair /= np.linalg.norm(pair, axis=1, keepdims=True)
    ordered: Doubles = pair if pair[0, 0] > pair[1, 0] else pair[::-1].copy()
    return ordered


def sparse_vectors(
    od: NDArray[Any], start: NDArray[Any], penalty: float = 0.1, max_rounds: int = 100
) -> Doubles:
    """Learn two nonnegative stain vectors with sparse densities.

    Minimizes ``1/2 |od - c w|^2 + penalty * sum(c)`` over c >= 0 and unit rows w >= 0, in turn:
    the codes exactly, then the rows by least squares, clipped at 0 and rescaled.

    Parameters
    ----------
    od
        float (n, 3), natural-log OD of stained pixels.
    start
        (2, 3) unit rows to start from; their order is kept. The problem is not convex, so the
        start decides which solution is found.
    penalty
        OD units; 0.1 as published.
    max_rounds
        Stops earlier when no entry moves by more than 1e-4.

    Returns
    -------
    ndarray
        float64 (2, 3), unit rows. A row that no pixel uses stays as it started.

    References
    ----------
    Vahadane et al., "Structure-preserving color normalization and sparse stain separation for
    histological images", IEEE TMI 2016, equation 6.
    """
    points = np.maximum(np.asarray(od, dtype=np.float64), 0.0)
    rows = np.array(start, dtype=np.float64)
    for _ in range(max_rounds):
        previous = rows
        rows = _update_rows(points, sparse_codes(points, rows, penalty), rows)
        if np.abs(rows - previous).max() < 1e-4:
            break
    unit: Doubles = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def sparse_codes(points: Doubles, rows: Doubles, penalty: float) -> Doubles:
    """Solve the nonnegative lasso for two atoms exactly: both active, or the better single one.

    Parameters
    ----------
    points
        float64 (n, 3).
    rows
        float64 (2, 3), unit rows.
    penalty
        Weight of the sum of codes.

    Returns
    -------
    ndarray
        float64 (n, 2), 0 and up.
    """
    drive = points @ rows.T - penalty
    overlap = float(rows[0] @ rows[1])
    determinant = max(1.0 - overlap * overlap, 1e-12)
    both = (drive - overlap * drive[:, ::-1]) / determinant
    single = np.maximum(drive, 0.0)
    # One active atom lowers the objective by half the square of its code.
    single[np.arange(len(single)), np.argmin(single, axis=1)] = 0.0
    inside = (both > 0.0).all(axis=1, keepdims=True)
    return np.where(inside, both, single)


def angle_deg(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Measure the angle between two vectors, degrees, 0..180."""
    cosine = float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))
    return float(np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0))))


def _update_rows(points: Doubles, codes: Doubles, rows: Doubles) -> Doubles:
    """Move each row to its own minimum, nonnegative and no longer than 1, the other held fixed.

    Least squares followed by rescaling is no descent: the codes are shrunk by the penalty, and
    one row then runs to a pure color (seen on real slides: (1, 0, 0)).
    """
    gram, cross = codes.T @ codes, codes.T @ points
    fresh = rows.copy()
    for index in (0, 1):
        if gram[index, index] > 0.0:
            step = (cross[index] - gram[index] @ fresh) / gram[index, index]
            moved = np.maximum(fresh[index] + step, 0.0)
            fresh[index] = moved / max(float(np.linalg.norm(moved)), 1.0)
    return fresh
