"""Spread over seeds: Welford's running sums give the plain standard deviation."""

from __future__ import annotations

import numpy as np
import pytest

from wsi_stain.stain.density import dab_od
from wsi_stain.stain.spread import OD_PER_LEVEL, DabSpread, spread_levels


@pytest.mark.parametrize("n", [2, 3, 7])
def test_spread_is_the_sample_sd(n: int) -> None:
    pictures = np.random.default_rng(n).integers(0, 256, (n, 9, 11, 3)).astype(np.uint8)
    spread = DabSpread()
    for picture in pictures:
        spread.add(picture)
    direct = np.stack([dab_od(picture) for picture in pictures]).std(axis=0, ddof=1)
    np.testing.assert_allclose(spread.sd(), direct, atol=1e-5)


def test_spread_is_zero_when_nothing_differs() -> None:
    spread = DabSpread()
    picture = np.random.default_rng(0).integers(0, 256, (9, 11, 3)).astype(np.uint8)
    for _ in range(3):
        spread.add(picture)
        assert not spread.sd().any()


def test_levels_round_and_end_at_255() -> None:
    sd = np.array([0.0, 0.4, 0.6, 254.6, 300.0], np.float32) * np.float32(OD_PER_LEVEL)
    assert spread_levels(sd).tolist() == [0, 0, 1, 255, 255]
