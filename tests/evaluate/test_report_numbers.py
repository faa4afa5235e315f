"""Doubts are found where they were planted, and only there; sums are sums."""

from __future__ import annotations

import numpy as np
import pytest

from wsi_stain.evaluate.metrics import Whitespace
from wsi_stain.evaluate.metrics_nuclei import LabellingIndex
from wsi_stain.evaluate.report_numbers import (
    FieldNumbers,
    Ruler,
    SlideNumbers,
    Whites,
    find_doubts,
    measure_field,
)
from wsi_stain.geometry import Region

WHITES = Whites(he=(243.0, 243.0, 244.0), ihc=(243.0, 243.0, 244.0))


def test_lost_and_invented_places_are_found_when_planted() -> None:
    he = np.full((250, 300, 3), 243, np.uint8)
    he[0:100, 0:200] = (200, 120, 170)
    ihc = he.copy()
    ihc[0:100, 100:200] = 243  # tissue gone
    ihc[200:250, 200:300] = (150, 100, 60)  # brown on glass, in a cell cut by the edge
    doubts, n_cells = find_doubts(he, ihc, WHITES, 100)
    assert n_cells == 9
    assert doubts == [
        (Region(100, 0, 100, 100), "lost"),
        (Region(200, 200, 100, 50), "invented"),
    ]


def test_no_place_is_doubted_when_pictures_agree_or_stain_is_pale() -> None:
    he = np.full((200, 200, 3), 243, np.uint8)
    he[40:160, 40:160] = (200, 120, 170)
    pale = np.where((he < 240).any(axis=-1, keepdims=True), 225, 243).repeat(3, -1)
    assert find_doubts(he, he, WHITES, 64)[0] == []
    assert find_doubts(he, pale.astype(np.uint8), WHITES, 64)[0] == []


def field(labelling: LabellingIndex | None, n_tissue_px: int, n_positive_px: int) -> FieldNumbers:
    return FieldNumbers(
        Region(0, 0, 9, 9),
        labelling,
        n_tissue_px,
        n_positive_px,
        0.2,
        Whitespace(0.1, 0.05, 0.2),
        0.6,
    )


def test_areas_and_nuclei_are_pooled_when_summarized() -> None:
    numbers = SlideNumbers.of(
        [
            field(LabellingIndex(50.0, 2, 1), 100, 50),
            field(LabellingIndex(0.0, 8, 0), 300, 0),
            field(LabellingIndex(None, 0, 0), 0, 0),
        ]
    )
    assert numbers.labelling == LabellingIndex(10.0, 10, 1)
    assert numbers.positive_fraction == pytest.approx(0.125)
    assert numbers.whitespace_error == pytest.approx(0.1)


def test_nothing_is_claimed_when_nothing_can_be_measured() -> None:
    numbers = SlideNumbers.of([field(None, 0, 0)])
    assert numbers.labelling is None
    assert numbers.positive_fraction is None


def test_nuclei_are_not_counted_when_pixels_are_large() -> None:
    picture = np.full((64, 64, 3), 200, np.uint8)
    region = Region(0, 0, 64, 64)
    for ruler, counts in (
        (Ruler(WHITES, 1.0, 1.0), False),
        (Ruler(WHITES, 0.5, 1.0), False),
        (Ruler(WHITES, 0.5, 0.5), True),
    ):
        found = measure_field(picture, picture, region, ruler).labelling
        assert (found is not None) is counts
