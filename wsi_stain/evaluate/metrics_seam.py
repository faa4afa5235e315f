"""Seams: are tile borders rougher than the tissue beside them?

In: stitched pixels before JPEG, the places of the borders. Out: ratios. Not here: stitching.

Definition: EVALUATION, section 3. JPEG blocks are seams of their own, so measure before encoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from wsi_stain.errors import ConfigError
from wsi_stain.evaluate.metrics import luma

__all__ = [
    "BorderLines",
    "SeamRatio",
    "flat_regions",
    "overlap_disagreement",
    "seam_ratio",
    "worst_seam_ratio",
]

Rgb8 = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Doubles = NDArray[np.float64]

_CLEAR_PX = 4


@dataclass(frozen=True)
class BorderLines:
    """One set of border lines: a border at c lies between pixels c - 1 and c.

    Attributes
    ----------
    columns, rows
        Places of vertical and horizontal borders, px.
    stride_px
        Distance of tiles: control lines lie a third and two thirds of it further.
    """

    columns: tuple[int, ...]
    rows: tuple[int, ...]
    stride_px: int


class SeamRatio(NamedTuple):
    """Result of `seam_ratio`.

    Attributes
    ----------
    ratio
        Mean step across borders over mean step across control lines; 1 is seamless.
    p95_ratio
        95th percentile over single borders of their mean step over the control mean.
    border_step, control_step
        The two means, grey levels.
    n_border_px
        Pixel pairs measured on borders.
    """

    ratio: float
    p95_ratio: float
    border_step: float
    control_step: float
    n_border_px: int


def seam_ratio(
    rgb: Rgb8,
    lines: BorderLines,
    tissue: Mask | None = None,
    avoid: Sequence[BorderLines] = (),
) -> SeamRatio:
    """Compare the luma step across tile borders with that across lines inside the tiles.

    Parameters
    ----------
    rgb
        uint8 (h, w, 3), stitched.
    lines
        The borders to judge.
    tissue
        bool (h, w): a pair counts where both its pixels are tissue. All pixels where not given.
    avoid
        Other sets that control lines keep 4 px clear of.

    Returns
    -------
    SeamRatio
        Vertical and horizontal pairs pooled.

    Raises
    ------
    ConfigError
        No border or no control line crosses tissue, or the picture is perfectly flat.
    """
    grey = luma(rgb)
    mask = np.ones(grey.shape, bool) if tissue is None else tissue
    controls = _controls(lines, (lines, *avoid))
    borders = _steps(grey, mask, lines.columns, lines.rows)
    inside = _steps(grey, mask, *controls)
    n_border, n_inside = (int(sum(step.size for step in steps)) for steps in (borders, inside))
    control_step = float(np.concatenate(inside).mean()) if n_inside else 0.0
    if n_border == 0 or control_step == 0.0:
        raise ConfigError(
            f"A seam ratio needs tissue on borders ({n_border} pairs) and structure on control "
            f"lines ({n_inside} pairs, mean step {control_step:.3g})."
        )
    border_step = float(np.concatenate(borders).mean())
    singles = [float(step.mean()) / control_step for step in borders if step.size]
    return SeamRatio(
        ratio=border_step / control_step,
        p95_ratio=float(np.percentile(singles, 95)),
        border_step=border_step,
        control_step=control_step,
        n_border_px=n_border,
    )


def worst_seam_ratio(
    rgb: Rgb8, sets: Sequence[BorderLines], tissue: Mask | None = None
) -> SeamRatio:
    """Judge several sets of lines (tile edges, ramp edges) and give the one farthest from 1."""
    results = [seam_ratio(rgb, lines, tissue, avoid=sets) for lines in sets]
    return max(results, key=lambda result: abs(result.ratio - 1.0))


def flat_regions(he: Rgb8, limit_levels: float = 4.0, window_px: int = 32) -> Mask:
    """Find where seams are seen: local sd of the H&E's luma below a few grey levels.

    Returns
    -------
    ndarray
        bool (h, w).
    """
    grey = luma(he)
    window = (window_px, window_px)
    mean, square = cv2.blur(grey, window), cv2.blur(grey * grey, window)
    flat: Mask = np.maximum(square - mean**2, 0.0) < limit_levels**2
    return flat


def overlap_disagreement(a: Rgb8, b: Rgb8) -> float:
    """Average |a - b| of two tiles on their overlap, over pixels and channels, grey levels."""
    if a.shape != b.shape or a.size == 0:
        raise ConfigError(f"Overlaps of {a.shape} and {b.shape} cannot be compared.")
    return float(np.mean(np.abs(a.astype(np.int16) - b.astype(np.int16))))


def _controls(
    lines: BorderLines, avoid: Sequence[BorderLines]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    shifts = (round(lines.stride_px / 3), round(2 * lines.stride_px / 3))
    taken_columns = np.array([c for other in avoid for c in other.columns], dtype=np.int64)
    taken_rows = np.array([r for other in avoid for r in other.rows], dtype=np.int64)
    return (
        _clear_of([c + s for c in lines.columns for s in shifts], taken_columns),
        _clear_of([r + s for r in lines.rows for s in shifts], taken_rows),
    )


def _clear_of(places: list[int], taken: NDArray[np.int64]) -> tuple[int, ...]:
    return tuple(p for p in places if np.abs(taken - p).min(initial=1 << 30) >= _CLEAR_PX)


def _steps(grey: Doubles, mask: Mask, columns: Sequence[int], rows: Sequence[int]) -> list[Doubles]:
    """Measure |step| across each line where both sides are tissue; lines off the picture drop."""
    height_px, width_px = grey.shape
    vertical = [
        np.abs(grey[:, c] - grey[:, c - 1])[mask[:, c] & mask[:, c - 1]]
        for c in columns
        if 0 < c < width_px
    ]
    horizontal = [
        np.abs(grey[r] - grey[r - 1])[mask[r] & mask[r - 1]] for r in rows if 0 < r < height_px
    ]
    return vertical + horizontal
