"""H&E is doubted where an IHC should be, and the other way round, by hue alone."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from wsi_stain.stain.density import HDX, od_to_rgb
from wsi_stain.stain.doubt import doubt_he, doubt_ihc

WHITE = (243.0, 243.0, 244.0)
HEMATOXYLIN, DAB = HDX[0], HDX[1]
EOSIN = np.array([0.07, 0.99, 0.11])


def pixels(*stains: NDArray[np.float64], n: int = 500) -> NDArray[np.uint8]:
    strengths = np.linspace(0.8, 1.6, n)[:, None]
    return np.concatenate([od_to_rgb(strengths * stain, WHITE) for stain in stains])


@pytest.mark.parametrize(
    ("seen", "is_he"),
    [
        (pixels(HEMATOXYLIN, EOSIN), True),
        (pixels(HEMATOXYLIN, DAB), False),
        (pixels(HEMATOXYLIN, HEMATOXYLIN), False),  # an IHC without a positive pixel
    ],
)
def test_each_is_taken_for_what_it_is(seen: NDArray[np.uint8], is_he: bool) -> None:
    assert bool(doubt_ihc(seen, WHITE)) == is_he
    assert bool(doubt_he(seen, WHITE)) == (not is_he)


def test_nothing_is_said_of_few_or_pale_pixels() -> None:
    few, pale = pixels(EOSIN, n=50), pixels(0.1 * EOSIN)
    for seen in (few, pale):
        assert doubt_he(seen, WHITE) == doubt_ihc(seen, WHITE) == ()
