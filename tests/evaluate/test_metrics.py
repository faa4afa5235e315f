"""Likeness metrics: closed forms, identities, planted differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_stain.errors import ConfigError
from wsi_stain.evaluate.metrics import (
    hist_correlation,
    hist_pooled,
    luma,
    psnr,
    sobel_ssim,
    ssim,
    vif_p,
    whitespace_error,
)

Rgb8 = npt.NDArray[np.uint8]
PIQ_MIXED = 0.5442794076735247
PIQ_OTHER = 0.011718927800909874


def _textured(seed: int, side_px: int = 96) -> Rgb8:
    rng = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(rng.standard_normal((side_px, side_px, 3)), (0, 0), 2.0)
    picture: Rgb8 = np.clip(150 + 150 * noise, 0, 255).astype(np.uint8)
    return picture


@given(shift=st.integers(1, 60))
def test_psnr_is_the_closed_form_when_all_pixels_shift(shift: int) -> None:
    a = np.full((8, 9, 3), 100, np.uint8)
    expected = 20.0 * math.log10(255.0 / shift)
    assert psnr(a + np.uint8(shift), a) == pytest.approx(expected, abs=1e-9)


def test_psnr_pools_one_error_over_all_channels() -> None:
    a = np.full((4, 4, 3), 100, np.uint8)
    b = a.copy()
    b[..., 0] += 30
    assert psnr(a, b) == pytest.approx(10 * math.log10(255**2 / 300.0), abs=1e-9)
    assert psnr(a, a) == math.inf


def test_identity_scores_one() -> None:
    a = _textured(0)
    assert ssim(a, a) == pytest.approx(1.0)
    assert ssim(a, a, window_px=11) == pytest.approx(1.0)
    assert sobel_ssim(a, a) == pytest.approx(1.0)
    assert vif_p(a, a) == pytest.approx(1.0, abs=1e-6)
    assert hist_correlation(a, a) == pytest.approx(1.0)


def test_ssim_is_the_luminance_term_when_both_are_flat() -> None:
    a, b = np.full((20, 20, 3), 100, np.uint8), np.full((20, 20, 3), 150, np.uint8)
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    assert ssim(a, b) == pytest.approx(expected, abs=1e-6)


def test_sobel_ssim_ignores_offset_and_polarity_but_not_shifted_edges() -> None:
    a = (_textured(1) // 2 + 40).astype(np.uint8)
    assert sobel_ssim(a + np.uint8(30), a) == pytest.approx(1.0, abs=1e-3)
    assert sobel_ssim(255 - a, a) == pytest.approx(1.0, abs=1e-6)
    assert sobel_ssim(np.roll(a, 9, axis=1), a) < 0.5


def test_vif_exceeds_one_when_contrast_is_raised() -> None:
    reference = (_textured(2) // 3 + 80).astype(np.uint8)
    lower = (reference // 2 + 60).astype(np.uint8)
    higher = (reference.astype(int) * 2 - 130).clip(0, 255).astype(np.uint8)
    assert 0.3 < vif_p(lower, reference) < 0.8
    assert vif_p(higher, reference) > 1.1


def test_vif_falls_with_noise_and_is_not_symmetric() -> None:
    rng = np.random.default_rng(3)
    a = _textured(3)
    noisy = [np.clip(a + rng.normal(0, sd, a.shape), 0, 255).astype(np.uint8) for sd in (3, 12, 40)]
    values = [vif_p(n, a) for n in noisy]
    assert values == sorted(values, reverse=True)
    assert vif_p(noisy[2], a) != pytest.approx(vif_p(a, noisy[2]), rel=0.05)


def test_vif_matches_recorded_values_of_piq() -> None:
    # piq 0.8.0, vif_p(output, reference, data_range=255) in float64.
    output, reference = _textured(4, 64), _textured(5, 64)
    mixed = ((output.astype(int) + 3 * reference.astype(int)) // 4).astype(np.uint8)
    assert vif_p(mixed, reference) == pytest.approx(PIQ_MIXED, rel=1e-9)
    assert vif_p(output, reference) == pytest.approx(PIQ_OTHER, rel=1e-9)


def test_hist_correlation_is_pearson_of_counts() -> None:
    a = np.zeros((4, 4, 3), np.uint8)
    b = a.copy()
    b[:2] = 200  # half of the pixels elsewhere
    counts_a, counts_b = np.zeros(256), np.zeros(256)
    counts_a[0] = 16
    counts_b[[0, 200]] = 8
    expected = np.corrcoef(counts_a, counts_b)[0, 1]
    assert hist_correlation(a, b) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000))
def test_hist_correlation_is_opencvs(seed: int) -> None:
    a, b = _textured(seed, 32), _textured(seed + 1, 32)
    theirs = [
        cv2.compareHist(
            cv2.calcHist([a], [c], None, [256], [0, 256]),
            cv2.calcHist([b], [c], None, [256], [0, 256]),
            cv2.HISTCMP_CORREL,
        )
        for c in range(3)
    ]
    assert hist_correlation(a, b) == pytest.approx(float(np.mean(theirs)), abs=1e-6)


def test_pooled_histogram_sees_only_the_set() -> None:
    a, b = _textured(6), _textured(7)
    assert hist_pooled([a, b], [b, a]) == pytest.approx(1.0)
    assert hist_correlation(a, b) < 1.0
    with pytest.raises(ConfigError):
        hist_pooled([], [a])


def test_whitespace_error_counts_both_ways() -> None:
    he = np.full((10, 10, 3), 240, np.uint8)
    he[:4] = 100  # 40 % tissue
    out = np.full((10, 10, 3), 240, np.uint8)
    out[2:5] = 100  # 20 px of tissue lost, 10 px of glass stained
    result = whitespace_error(out, he, (240,) * 3, (240,) * 3)
    assert result.error_fraction == pytest.approx(0.30)
    assert result.signed_fraction == pytest.approx(0.10)
    assert result.he_fraction == pytest.approx(0.60)


def test_luma_is_bt601() -> None:
    assert luma(np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)) == pytest.approx(
        [76.245, 149.685, 29.07]
    )


@pytest.mark.parametrize("metric", [psnr, ssim, sobel_ssim, vif_p])
def test_unequal_pictures_are_refused(metric: Callable[..., float]) -> None:
    with pytest.raises(ConfigError, match="cannot be compared"):
        metric(np.zeros((64, 64, 3), np.uint8), np.zeros((64, 65, 3), np.uint8))
    with pytest.raises(ConfigError, match="cannot be compared"):
        metric(np.zeros((64, 64, 3)), np.zeros((64, 64, 3)))


def test_small_pictures_are_refused() -> None:
    with pytest.raises(ConfigError, match="41 px are needed"):
        vif_p(np.zeros((40, 60, 3), np.uint8), np.zeros((40, 60, 3), np.uint8))
