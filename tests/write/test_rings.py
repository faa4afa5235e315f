"""Rings are closed, simple, turn the right way and hold the mask's area."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from wsi_stain.write.rings import Polygon, ring_area, trace

Bools = npt.NDArray[np.bool_]
Points = npt.NDArray[np.float64]


def area(polygon: Polygon) -> float:
    return ring_area(polygon.outer) + sum(ring_area(hole) for hole in polygon.holes)


def crosses_itself(ring: Points) -> bool:
    """Look at all pairs of edges that share no point."""
    a, b = ring[:-1], ring[1:]
    n = len(a)

    def side(p: Points, q: Points, r: Points) -> Points:
        (px, py), (qx, qy), (rx, ry) = (np.moveaxis(point, -1, 0) for point in (p, q, r))
        return np.asarray((qx - px) * (ry - py) - (qy - py) * (rx - px))

    p, q, r, s = a[:, None], b[:, None], a[None], b[None]
    apart = (side(p, q, r) * side(p, q, s) < 0) & (side(r, s, p) * side(r, s, q) < 0)
    return bool(apart[np.triu_indices(n, 1)].any())


@settings(max_examples=60)
@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=14)))
def test_rings_are_sound_whatever_the_mask(mask: Bools) -> None:
    polygons = trace(mask)
    assert bool(polygons) == bool(mask.any())
    for polygon in polygons:
        for ring in (polygon.outer, *polygon.holes):
            assert np.array_equal(ring[0], ring[-1])
            assert len(np.unique(ring[:-1], axis=0)) == len(ring) - 1 >= 3
            assert not crosses_itself(ring)
        assert ring_area(polygon.outer) > 0
        assert all(ring_area(hole) < 0 for hole in polygon.holes)


@settings(max_examples=30)
@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=14)))
def test_no_pixel_is_lost(mask: Bools) -> None:
    # Pixels are added only where two touch at a corner.
    found = sum(polygon.area_px for polygon in trace(mask))
    assert mask.sum() <= found <= mask.size


@pytest.mark.parametrize("seed", range(3))
def test_area_is_the_masks_on_ragged_tissue(seed: int) -> None:
    noise = np.random.default_rng(seed).standard_normal((400, 500)).astype(np.float32)
    mask = np.asarray(cv2.GaussianBlur(noise, (0, 0), 6) > 0.0)
    polygons = trace(mask)
    assert sum(map(area, polygons)) == pytest.approx(mask.sum(), rel=0.002)
    assert sum(len(polygon.holes) for polygon in polygons) >= 1


def test_small_pieces_keep_their_area() -> None:
    mask = np.zeros((30, 30), bool)
    mask[3:6, 3:6] = mask[10, 10] = mask[20:22, 5:9] = True
    assert [round(area(polygon), 6) for polygon in trace(mask)] == [9.0, 1.0, 8.0]
    assert [polygon.area_px for polygon in trace(mask, least_px=5)] == [9, 8]


def test_hole_belongs_to_its_piece() -> None:
    mask = np.zeros((40, 80), bool)
    mask[5:35, 5:35] = mask[5:35, 45:75] = True
    mask[15:20, 50:60] = False
    left, right = trace(mask)
    assert (len(left.holes), len(right.holes)) == (0, 1)
    hole = right.holes[0]
    assert (hole.min(axis=0).tolist(), hole.max(axis=0).tolist()) == ([50.0, 15.0], [60.0, 20.0])


def test_slanting_border_is_straight() -> None:
    mask = np.tri(60, dtype=bool)
    [polygon] = trace(mask)
    assert len(polygon.outer) < 12
