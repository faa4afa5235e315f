"""The hot spot is found where it was planted, and shrinks with the tissue."""

from __future__ import annotations

import math

import numpy as np
import pytest

from wsi_stain.evaluate.cells import CellTable
from wsi_stain.evaluate.hotspot import find_hot_spot

CELL_UM, PX_UM = 32.0, 0.5
FULL_PX = (CELL_UM / PX_UM) ** 2


def table(side: int, *, hot: tuple[int, int] | None, tissue: int = 0) -> CellTable:
    """Tissue everywhere, or a square of `tissue` cells; one nucleus a cell, 9 around `hot`."""
    found = CellTable.empty(side, side)
    part = np.s_[: tissue or side, : tissue or side]
    found.tissue_px[part] = FULL_PX
    found.nuclei[part] = 10
    found.positive[part] = 1
    if hot is not None:
        rows, columns = np.mgrid[:side, :side]
        found.positive[np.hypot(rows - hot[0], columns - hot[1]) < 6] = 9
    return found


def test_spot_lies_where_it_was_planted() -> None:
    area_mm2 = math.pi * (5.5 * CELL_UM / 1e3) ** 2
    spot = find_hot_spot(table(60, hot=(40, 12)), CELL_UM, PX_UM, area_mm2)
    assert spot is not None
    assert spot.center_xy_um == (12.5 * CELL_UM, 40.5 * CELL_UM)
    assert spot.positive_per_mm2 == pytest.approx(9 / (CELL_UM / 1e3) ** 2)
    assert spot.n_positive == pytest.approx(0.9 * spot.n_nuclei)
    assert spot.positive_per_mm2 == pytest.approx(spot.n_positive / spot.tissue_mm2, rel=1e-3)
    assert spot.area_mm2 == pytest.approx(area_mm2, rel=0.1)


def test_count_is_that_of_the_cells_inside_when_large() -> None:
    spot = find_hot_spot(table(80, hot=(30, 50)), CELL_UM, PX_UM, 1.0)
    assert spot is not None
    rows, columns = np.mgrid[:80, :80]
    x, y = (at / CELL_UM - 0.5 for at in spot.center_xy_um)
    inside = np.hypot(rows - y, columns - x) <= math.sqrt(1e6 / math.pi) / CELL_UM
    assert spot.n_nuclei == 10 * inside.sum()
    assert spot.n_positive == table(80, hot=(30, 50)).positive[inside].sum()


def test_spot_shrinks_until_it_is_tissue() -> None:
    found = table(60, hot=None, tissue=14)
    spot = find_hot_spot(found, CELL_UM, PX_UM, 1.0)
    assert spot is not None
    assert 0.1 < spot.area_mm2 < 0.3
    assert spot.positive_per_mm2 == pytest.approx(1 / (CELL_UM / 1e3) ** 2)


def test_spot_is_no_cold_place_because_only_there_a_circle_fits() -> None:
    found = table(60, hot=None, tissue=14)
    found.positive[:] = 0
    strip = np.s_[6:9, 14:50]
    found.tissue_px[strip] = FULL_PX
    found.positive[strip] = 5
    spot = find_hot_spot(found, CELL_UM, PX_UM, 1.0)
    assert spot is not None
    assert spot.center_xy_um[0] > 14 * CELL_UM
    assert spot.positive_per_mm2 == pytest.approx(5 / (CELL_UM / 1e3) ** 2)


def test_no_spot_without_positives_or_tissue() -> None:
    found = table(20, hot=None)
    found.positive[:] = 0
    assert find_hot_spot(found, CELL_UM, PX_UM, 1.0) is None
    assert find_hot_spot(table(20, hot=None, tissue=1), CELL_UM, PX_UM, 1.0) is None
