"""Seams: none in stationary noise, a planted step is found."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from wsi_stain.errors import ConfigError
from wsi_stain.evaluate.metrics_seam import (
    BorderLines,
    flat_regions,
    overlap_disagreement,
    seam_ratio,
    worst_seam_ratio,
)

Rgb8 = npt.NDArray[np.uint8]
STRIDE_PX = 128
PLACES = tuple(range(STRIDE_PX, 2048, STRIDE_PX))
LINES = BorderLines(columns=PLACES, rows=PLACES, stride_px=STRIDE_PX)


@pytest.fixture(scope="module")
def noise() -> Rgb8:
    """Grey stationary noise, uint8 (2048, 2048, 3): a step of 9 levels between any neighbors."""
    rng = np.random.default_rng(0)
    grey = np.clip(np.rint(rng.normal(150, 8, (2048, 2048))), 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def _step(picture: Rgb8, levels: int) -> Rgb8:
    """Raise every other column of tiles."""
    raised = (np.arange(picture.shape[1]) // STRIDE_PX) % 2 == 1
    stepped: Rgb8 = picture + (levels * raised).astype(np.uint8)[None, :, None]
    return stepped


def test_stationary_noise_has_ratio_one(noise: Rgb8) -> None:
    result = seam_ratio(noise, LINES)
    assert result.ratio == pytest.approx(1.0, abs=0.01)
    assert result.control_step == pytest.approx(8 * 2 / np.sqrt(np.pi), rel=0.01)
    assert result.n_border_px == 2 * 15 * 2048


def test_planted_step_of_two_levels_raises_the_ratio() -> None:
    smooth = np.full((512, 512, 3), 150, np.uint8)
    rng = np.random.default_rng(1)
    smooth += rng.integers(0, 3, (512, 512, 1), dtype=np.uint8)
    lines = BorderLines(columns=(128, 256, 384), rows=(), stride_px=128)
    assert seam_ratio(smooth, lines).ratio == pytest.approx(1.0, abs=0.1)
    assert seam_ratio(_step(smooth, 2), lines).ratio > 2.0


def test_ratio_is_the_closed_form_on_a_planted_ramp() -> None:
    ramp = np.repeat(np.arange(200, dtype=np.uint8)[None, :, None], 3, axis=2)
    picture = np.repeat(ramp, 40, axis=0)
    picture[:, 100:] += 4  # step of 5 instead of 1 at 100
    result = seam_ratio(picture, BorderLines(columns=(100,), rows=(), stride_px=60))
    assert result.ratio == pytest.approx(5.0)
    assert result.p95_ratio == pytest.approx(5.0)


def test_only_pairs_inside_tissue_count(noise: Rgb8) -> None:
    broken = noise[:512, :512].copy()
    broken[:256, 128:] = np.minimum(broken[:256, 128:].astype(int) + 40, 255).astype(np.uint8)
    tissue = np.zeros((512, 512), bool)
    tissue[260:] = True
    lines = BorderLines(columns=(128,), rows=(), stride_px=128)
    assert seam_ratio(broken, lines).ratio > 2.0
    assert seam_ratio(broken, lines, tissue).ratio == pytest.approx(1.0, abs=0.15)
    assert seam_ratio(broken, lines, tissue).n_border_px == 252


def test_control_lines_keep_clear_of_other_sets(noise: Rgb8) -> None:
    picture = noise[:, :512].copy()
    picture[:, 171:] = np.minimum(picture[:, 171:].astype(int) + 60, 255).astype(np.uint8)
    lines = BorderLines(columns=(128, 256), rows=(), stride_px=128)
    ramps = BorderLines(columns=(171,), rows=(), stride_px=128)
    assert seam_ratio(picture, lines).ratio < 0.9  # a control line at 171 is spoiled
    assert seam_ratio(picture, lines, avoid=[ramps]).ratio == pytest.approx(1.0, abs=0.05)


def test_worst_set_is_reported(noise: Rgb8) -> None:
    picture = noise.copy()
    picture[:, 288:] = np.minimum(picture[:, 288:].astype(int) + 30, 255).astype(np.uint8)
    edges = BorderLines(columns=(256,), rows=(), stride_px=128)
    ramps = BorderLines(columns=(288,), rows=(), stride_px=128)
    assert worst_seam_ratio(picture, [edges, ramps]) == seam_ratio(picture, ramps, avoid=[edges])


def test_no_border_on_tissue_is_refused(noise: Rgb8) -> None:
    with pytest.raises(ConfigError, match="needs tissue on borders"):
        seam_ratio(noise, LINES, np.zeros((2048, 2048), bool))
    with pytest.raises(ConfigError, match="needs tissue on borders"):
        seam_ratio(np.full((300, 300, 3), 9, np.uint8), LINES)


def test_flat_regions_are_where_the_picture_is_calm(noise: Rgb8) -> None:
    picture = noise[:200, :200].copy()
    picture[:, :100] = 140
    flat = flat_regions(picture)
    assert flat[:, :80].all()
    assert not flat[:, 120:].any()


def test_overlap_disagreement_is_the_mean_difference() -> None:
    a = np.full((4, 5, 3), 100, np.uint8)
    b = a.copy()
    b[..., 1] = 94
    assert overlap_disagreement(a, b) == pytest.approx(2.0)
    with pytest.raises(ConfigError):
        overlap_disagreement(a, b[:2])
