"""Curves and light: what start images are drawn with.

Room 2 of 4. In: densities, knots, light per channel. Out: OD, grey levels. Not here: which curve.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from wsi_stain.config import Rgb

__all__ = ["as_deep", "follow_curve", "follow_curves", "merge_equal", "merge_light", "rise"]

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]
Rgb8 = NDArray[np.uint8]

_STEPS = 4096


def rise(values: Floats, begin: float, end: float) -> Floats:
    """Rise from 0 at `begin` to 1 at `end` on a smoothstep, whose slope is 0 at both.

    Parameters
    ----------
    values
        float32, any shape.

    Returns
    -------
    ndarray
        float32, same shape, 0..1.
    """
    ramp = np.clip((values - np.float32(begin)) / np.float32(end - begin), 0.0, 1.0)
    risen: Floats = ramp * ramp * (3.0 - 2.0 * ramp)
    return risen


def follow_curve(
    density: Floats, curve_in: tuple[float, ...], curve_out: tuple[float, ...]
) -> Floats:
    """Interpolate by a fine table: several times faster than ``np.interp`` per pixel.

    Parameters
    ----------
    density
        float32, any shape; beyond the knots the first and the last value hold.
    curve_in, curve_out
        Knots, ascending, and values there.

    Returns
    -------
    ndarray
        float32, same shape.
    """
    return follow_curves(density, curve_in, (curve_out,))[0]


def follow_curves(
    density: Floats, curve_in: tuple[float, ...], curves_out: Sequence[tuple[float, ...]]
) -> list[Floats]:
    """Interpolate several curves over the same knots, as `follow_curve` does one."""
    low, high = curve_in[0], curve_in[-1]
    steps = np.linspace(low, high, _STEPS)
    scale = (_STEPS - 1) / max(high - low, 1e-9)
    index = np.clip((density - low) * scale + 0.5, 0, _STEPS - 1).astype(np.int32)
    tables = [np.interp(steps, curve_in, values).astype(np.float32) for values in curves_out]
    # Of finite densities "clip" finds none to clip; to raise would cost a second buffer.
    return [np.take(table, index, mode="clip") for table in tables]


def as_deep(colors: Doubles, depth: Doubles) -> Doubles:
    """Scale colors, OD (n, 3), to a mean OD (n,); their hue stays."""
    scaled: Doubles = colors * (depth / colors.mean(axis=1))[:, None]
    return scaled


def merge_equal(knots: Doubles, values: Doubles) -> tuple[tuple[float, ...], Doubles]:
    """Merge equal knots, to the mean of what is to be there: many pixels share density 0.

    Parameters
    ----------
    knots
        float64 (n,).
    values
        float64 (n, k), one row a knot.

    Returns
    -------
    tuple
        Knots, strictly ascending, and their rows.
    """
    unique, place = np.unique(knots, return_inverse=True)
    counts = np.bincount(place)
    merged = [np.bincount(place, weights=column) / counts for column in values.T]
    return tuple(unique.tolist()), np.stack(merged, axis=1)


def merge_light(lights: list[Floats], white: Rgb) -> Rgb8:
    """Scale the light of each channel, 0..1, float32 (...), to grey levels, uint8 (..., 3)."""
    rows = [
        cv2.convertScaleAbs(light.reshape(1, -1), alpha=level)
        for light, level in zip(lights, white, strict=True)
    ]
    return np.asarray(cv2.merge(rows), dtype=np.uint8).reshape(*lights[0].shape, 3)
