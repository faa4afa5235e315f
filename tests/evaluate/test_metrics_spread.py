"""Rank correlation of spread and error: order alone counts, ties share their rank."""

from __future__ import annotations

import numpy as np
import pytest

from wsi_stain.evaluate.metrics_spread import rank_error, spearman


def test_spearman_sees_order_alone() -> None:
    a = np.array([0.1, 0.2, 0.5, 0.9])
    assert spearman(a, np.exp(9 * a)) == pytest.approx(1.0)
    assert spearman(a, -(a**3)) == pytest.approx(-1.0)
    assert spearman(a, np.ones(4)) is None


def test_spearman_gives_ties_their_mean_rank() -> None:
    # Ranks 1.5, 1.5, 3 and 1, 2, 3: r = 1.5 / sqrt(1.5 * 2).
    found = spearman(np.array([5.0, 5.0, 7.0]), np.array([1.0, 2.0, 3.0]))
    assert found == pytest.approx(1.5 / np.sqrt(3.0))


def test_rank_error_is_near_zero_for_chance_and_none_for_little_tissue() -> None:
    rng = np.random.default_rng(0)
    output, reference = rng.integers(0, 256, (2, 400, 400, 3)).astype(np.uint8)
    sd = rng.random((400, 400), np.float32)
    tissue = np.ones((400, 400), bool)
    found = rank_error(sd, output, reference, tissue)
    assert found is not None
    assert abs(found) < 0.08
    tissue[16:] = False
    tissue[:, 64:] = False
    assert rank_error(sd, output, reference, tissue) is None
