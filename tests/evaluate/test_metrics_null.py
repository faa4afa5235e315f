"""Null rows and intervals."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from wsi_stain.errors import ConfigError
from wsi_stain.evaluate.metrics import psnr, sobel_ssim
from wsi_stain.evaluate.metrics_null import (
    bootstrap_interval,
    choose_blur_px,
    fit_recolor,
    null_blur,
    null_mean,
    null_recolor,
)
from wsi_stain.stain.density import rgb_to_od

Rgb8 = npt.NDArray[np.uint8]
WHITE = (240.0, 240.0, 240.0)


def _tissue(seed: int, stains: npt.ArrayLike, n: int = 40_000) -> Rgb8:
    rng = np.random.default_rng(seed)
    od = rng.normal((0.6, 0.5), (0.15, 0.1), (n, 2)) @ np.asarray(stains)
    pixels: Rgb8 = np.clip(np.rint(240 * np.exp(-od)), 1, 255).astype(np.uint8)
    return pixels


HE = _tissue(0, [[0.65, 0.70, 0.29], [0.22, 0.80, 0.56]])
IHC = _tissue(1, [[0.62, 0.69, 0.37], [0.27, 0.54, 0.80]])


def test_recolor_reaches_mean_and_covariance_of_the_ihc() -> None:
    moved = null_recolor(HE, fit_recolor(HE, IHC, WHITE, WHITE))
    a, b = rgb_to_od(moved, WHITE), rgb_to_od(IHC, WHITE)
    np.testing.assert_allclose(a.mean(axis=0), b.mean(axis=0), atol=0.003)
    np.testing.assert_allclose(np.cov(a.T), np.cov(b.T), atol=0.0015)


def test_recolor_is_identity_when_both_sides_are_equal() -> None:
    recolor = fit_recolor(HE, HE, WHITE, WHITE)
    np.testing.assert_allclose(recolor.matrix, np.eye(3), atol=1e-6)
    np.testing.assert_array_equal(null_recolor(HE, recolor), HE)


def test_recolor_of_one_flat_color_is_finite() -> None:
    flat = np.full((100, 3), 130, np.uint8)
    recolor = fit_recolor(flat, IHC, WHITE, WHITE)
    assert np.isfinite(recolor.matrix).all()


def test_blur_keeps_the_mean_and_loses_structure() -> None:
    picture = np.repeat(
        np.random.default_rng(2).integers(60, 200, (128, 128, 1), dtype=np.uint8), 3, axis=2
    )
    blurred = null_blur(picture, 3.0)
    assert blurred.mean() == pytest.approx(picture.mean(), abs=0.7)
    assert sobel_ssim(blurred, picture) < 0.8
    np.testing.assert_array_equal(null_blur(picture, 0.0), picture)


def test_blur_is_chosen_by_psnr() -> None:
    rng = np.random.default_rng(3)
    sharp = [np.full((64, 64, 3), 128, np.uint8) for _ in range(2)]
    noisy = [np.clip(s + rng.normal(0, 20, s.shape), 0, 255).astype(np.uint8) for s in sharp]
    assert choose_blur_px(noisy, sharp, (0.0, 1.0, 4.0)) == 4.0
    assert choose_blur_px(noisy, noisy, (0.0, 1.0, 4.0)) == 0.0
    with pytest.raises(ConfigError):
        choose_blur_px([], [])


def test_null_mean_is_the_best_constant() -> None:
    reference = IHC.reshape(200, 200, 3)
    ours = null_mean(reference.shape, IHC)
    assert ours.shape == reference.shape
    others = [np.full_like(reference, level) for level in (90, 120, 150, 180)]
    assert psnr(ours, reference) > max(psnr(other, reference) for other in others)


def test_interval_has_its_coverage_and_counts() -> None:
    hits = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        slides = rng.normal(0.0, 1.0, 20)
        values = np.repeat(slides, 5) + rng.normal(0.0, 0.1, 100)
        names = [f"s{i}" for i in np.repeat(np.arange(20), 5)]
        found = bootstrap_interval(values.tolist(), names, rng, rounds=400)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 0.0 <= found.high
    assert (found.n_images, found.n_groups) == (100, 20)
    assert 85 <= hits <= 99  # percentile intervals of 20 slides are a little narrow


def test_interval_by_slide_is_wider_than_by_image() -> None:
    rng = np.random.default_rng(1)
    values = np.repeat(rng.normal(size=10), 30).tolist()
    slides = [str(i) for i in np.repeat(np.arange(10), 30)]
    by_slide = bootstrap_interval(values, slides, np.random.default_rng(0))
    by_image = bootstrap_interval(values, [str(i) for i in range(300)], np.random.default_rng(0))
    assert by_slide.low is not None
    assert by_slide.high is not None
    assert by_image.low is not None
    assert by_image.high is not None
    assert by_slide.high - by_slide.low > 3 * (by_image.high - by_image.low)


def test_interval_is_left_out_below_five_slides() -> None:
    found = bootstrap_interval([1.0, 2.0, 3.0, 6.0], list("abcc"), np.random.default_rng(0))
    assert found == (3.0, None, None, 4, 3)


@pytest.mark.parametrize(
    ("values", "groups"), [([], []), ([1.0], ["a", "b"]), ([float("nan")], ["a"])]
)
def test_interval_of_nothing_is_refused(values: list[float], groups: list[str]) -> None:
    with pytest.raises(ConfigError, match="an interval needs"):
        bootstrap_interval(values, groups, np.random.default_rng(0))
