"""Stain vectors and codes against planted truth."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from wsi_stain.stain.density import rgb_to_od
from wsi_stain.stain.separate import angle_deg, macenko_vectors, sparse_codes, sparse_vectors

Doubles = npt.NDArray[np.float64]
Plant = Callable[..., npt.NDArray[np.uint8]]
START = np.array([[0.651, 0.701, 0.290], [0.216, 0.801, 0.558]])
START /= np.linalg.norm(START, axis=1, keepdims=True)
PLANTED = [
    np.array([[0.72, 0.62, 0.31], [0.16, 0.91, 0.37]]),
    np.array([[0.55, 0.74, 0.38], [0.18, 0.88, 0.44]]),
]


@pytest.mark.parametrize("planted", PLANTED)
def test_macenko_finds_planted_stains(planted: Doubles, plant_tissue: Plant) -> None:
    od = rgb_to_od(plant_tissue(planted), (243, 241, 244))
    found = macenko_vectors(od[od.min(axis=1) > 0.15])
    assert [angle_deg(a, b) < 3.0 for a, b in zip(found, planted, strict=True)] == [True, True]


@pytest.mark.parametrize("planted", PLANTED)
def test_sparse_fit_finds_planted_stains(planted: Doubles, plant_tissue: Plant) -> None:
    od = rgb_to_od(plant_tissue(planted), (243, 241, 244))
    found = sparse_vectors(od[od.max(axis=1) > 0.15], START, penalty=0.02)
    assert max(angle_deg(a, b) for a, b in zip(found, planted, strict=True)) < 3.0
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-12)
    assert (found >= 0.0).all()


def _objective(points: Doubles, codes: Doubles, rows: Doubles, penalty: float) -> Doubles:
    value: Doubles = 0.5 * ((points - codes @ rows) ** 2).sum(axis=1) + penalty * codes.sum(axis=1)
    return value


@given(points=hnp.arrays(np.float64, (6, 3), elements=st.floats(0.0, 3.0)))
def test_sparse_codes_beat_a_fine_grid(points: Doubles) -> None:
    codes = sparse_codes(points, START, 0.1)
    best = _objective(points, codes, START, 0.1)
    assert (codes >= 0.0).all()
    grid = np.stack(np.meshgrid(np.linspace(0, 4, 41), np.linspace(0, 4, 41)), -1).reshape(-1, 2)
    for point, value in zip(points, best, strict=True):
        tried = _objective(np.broadcast_to(point, (len(grid), 3)), grid, START, 0.1)
        assert value <= tried.min() + 1e-9


def test_sparse_fit_lowers_the_objective(plant_tissue: Plant) -> None:
    od = rgb_to_od(plant_tissue(PLANTED[0]), (243, 241, 244)).astype(np.float64)
    before = _objective(od, sparse_codes(od, START, 0.1), START, 0.1).sum()
    rows = sparse_vectors(od, START, max_rounds=1)
    after = _objective(od, sparse_codes(od, rows, 0.1), rows, 0.1).sum()
    assert after < before


def test_sparse_fit_keeps_a_row_that_nothing_uses() -> None:
    only = np.outer(np.linspace(0.5, 2.0, 500), START[1])
    found = sparse_vectors(only, START)
    assert angle_deg(found[0], START[0]) < 1e-6
    assert angle_deg(found[1], START[1]) < 1e-3


def test_angle_is_right_for_known_vectors() -> None:
    assert angle_deg(np.array([1.0, 0, 0]), np.array([0, 2.0, 0])) == pytest.approx(90.0)
    assert angle_deg(np.array([1.0, 1, 0]), np.array([3.0, 0, 0])) == pytest.approx(45.0)
