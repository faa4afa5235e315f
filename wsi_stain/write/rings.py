"""Outlines of a mask as polygons: closed rings with holes, whose area is the mask's.

In: bool (h, w). Out: rings in mask px. Not here: file formats, frames.

A boundary runs along pixel edges. The middles of its edges are joined, so that a slanting border
is straight and not a staircase; the area then differs by half a pixel per ring, and a small piece
without holes is enlarged by just that. Points that lie within a third of a pixel of the line
between their neighbors are left out. Parts of the boundary lie at least 0.7 px from each other,
so no ring crosses itself or another of its piece.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np
import numpy.typing as npt

__all__ = ["Polygon", "ring_area", "trace"]

Bools = npt.NDArray[np.bool_]
Points = npt.NDArray[np.float64]

TOLERANCE_PX = 0.33
SMALL_PX = 400  # half a pixel is more than 0.1 % of what is smaller
# Direction 0..3 is right, down, left, up: its step, and the pixel on its right hand, seen from
# the corner where the edge begins (y down, so the right hand is inside and outer rings run
# clockwise on the screen).
STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))
NO_EDGE = 255
_HALF_STEPS = 0.5 * np.array(STEPS, np.float32)


@dataclass(frozen=True, eq=False)
class Polygon:
    """One piece of a mask.

    Attributes
    ----------
    outer
        float64 (n, 2), x and y, mask px; the first point is repeated at the end.
    holes
        The same for each hole, turning the other way.
    area_px
        Pixels of the piece, as the mask counts them.
    """

    outer: Points
    holes: tuple[Points, ...]
    area_px: int


def trace(mask: Bools, least_px: int = 1) -> list[Polygon]:
    """Find the pieces of a mask and their outlines.

    Parameters
    ----------
    mask
        bool (h, w).
    least_px
        Smaller pieces are left out.

    Returns
    -------
    list of Polygon
        In reading order of the first pixel. Where two pixels touch at a corner only, the pixel
        on their left is joined to them: rings must not touch themselves.
    """
    clean = _without_corner_contacts(mask)
    n_labels, labels, stats, _ = cv2.connectedComponentsWithStats(
        clean.astype(np.uint8), connectivity=4
    )
    # Before the walk: on a picture full of specks it would be for them.
    clean &= (stats[:, cv2.CC_STAT_AREA] >= least_px)[labels]
    outers: dict[int, Points] = {}
    holes: dict[int, list[Points]] = {label: [] for label in range(n_labels)}
    for label, ring in _rings(clean, np.asarray(labels, np.int32)):
        if ring_area(ring) > 0:
            outers[label] = ring
        else:
            holes[label].append(ring)
    areas_px = {label: int(stats[label, cv2.CC_STAT_AREA]) for label in outers}
    return [
        Polygon(
            outer if holes[label] else _to_area(outer, areas_px[label]),
            tuple(holes[label]),
            areas_px[label],
        )
        for label, outer in sorted(outers.items())
    ]


def ring_area(ring: Points) -> float:
    """Give the area of a closed ring; positive where it turns clockwise on the screen (y down)."""
    x, y = ring[:-1].T
    x_next, y_next = ring[1:].T
    return float(np.dot(x, y_next) - np.dot(x_next, y)) / 2.0


def _to_area(ring: Points, area_px: int) -> Points:
    """Enlarge the ring of a small piece about its middle, so that it has the piece's area."""
    if area_px >= SMALL_PX:
        return ring
    middle = ring[:-1].mean(axis=0)
    enlarged: Points = middle + (ring - middle) * np.sqrt(area_px / ring_area(ring))
    return enlarged


def _without_corner_contacts(mask: Bools) -> Bools:
    """Fill one pixel wherever two touch at a corner only, until none do."""
    clean = mask.copy()
    while True:
        nw, ne = clean[:-1, :-1], clean[:-1, 1:]
        sw, se = clean[1:, :-1], clean[1:, 1:]
        falling = nw & se & ~ne & ~sw
        rising = ne & sw & ~nw & ~se
        if not (falling.any() or rising.any()):
            return clean
        sw |= falling
        nw |= rising


def _rings(clean: Bools, labels: npt.NDArray[np.int32]) -> Iterator[tuple[int, Points]]:
    """Walk along all boundaries: the label inside, and the ring.

    All of them are walked before the first is given: numpy is slow on thousands of small arrays.
    """
    stride = clean.shape[1] + 1
    path = _edges(clean)
    starts = np.flatnonzero(np.frombuffer(path, np.uint8) != NO_EDGE)
    hops = [dx + dy * stride for dx, dy in STEPS]
    corners, turns, ends = array("q"), bytearray(), [0]
    for start in starts.tolist():
        at = start
        while (direction := path[at]) != NO_EDGE:
            corners.append(at)
            turns.append(direction)
            path[at] = NO_EDGE
            at += hops[direction]
        if len(turns) > ends[-1]:
            ends.append(len(turns))
    middles = _middles(corners, turns, stride)
    for first, end in pairwise(ends):
        label = _label_inside(labels, corners[first], turns[first], stride)
        yield label, _ring(middles[first:end])


def _edges(clean: Bools) -> bytearray:
    """Give the direction of the one edge that leaves each corner; a byte each, row by row."""
    height_px, width_px = clean.shape
    padded = np.pad(clean, 1)
    inside = padded[1:-1, 1:-1]
    path: bytearray = bytearray([NO_EDGE]) * ((height_px + 1) * (width_px + 1))
    follow = np.frombuffer(path, np.uint8).reshape(height_px + 1, width_px + 1)
    for direction, (outside, dx, dy) in enumerate(
        (
            (padded[:-2, 1:-1], 0, 0),  # edge above a pixel, walked to the right
            (padded[1:-1, 2:], 1, 0),  # edge on its right, downward
            (padded[2:, 1:-1], 1, 1),  # edge below, to the left
            (padded[1:-1, :-2], 0, 1),  # edge on its left, upward
        )
    ):
        follow[dy : dy + height_px, dx : dx + width_px][inside & ~outside] = direction
    return path


def _label_inside(labels: npt.NDArray[np.int32], corner: int, direction: int, stride: int) -> int:
    """Give the label of the pixel on the right hand of an edge."""
    y, x = divmod(corner, stride)
    dx, dy = ((0, 0), (-1, 0), (-1, -1), (0, -1))[direction]
    return int(labels[y + dy, x + dx])


def _middles(corners: array[int], turns: bytearray, stride: int) -> npt.NDArray[np.float32]:
    """Give the middles of edges, x and y, float32 (n, 2)."""
    y, x = np.divmod(np.frombuffer(corners, np.int64), stride)
    middles = _HALF_STEPS[np.frombuffer(turns, np.uint8)]
    middles[:, 0] += x
    middles[:, 1] += y
    return middles


def _ring(middles: npt.NDArray[np.float32]) -> Points:
    """Leave out of a closed line what lies on a line between its neighbors, and close the ring."""
    simple = cv2.approxPolyDP(middles[:, None], TOLERANCE_PX, True)[:, 0]
    # Of a ring of one or two pixels the simplification may leave a line.
    kept = simple if len(simple) >= 3 else middles
    ring = np.empty((len(kept) + 1, 2), np.float64)
    ring[:-1] = kept
    ring[-1] = kept[0]
    return ring
