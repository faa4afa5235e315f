"""Optical density against closed forms, scikit-image and plain float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage.color import hdx_from_rgb, rgb_from_hdx, separate_stains

from wsi_stain.config.bundle import VEIL_OD
from wsi_stain.stain.density import (
    GLASS_OD,
    GLASS_REACH_PX,
    HDX,
    dab_od,
    glass_alpha,
    is_stained,
    lay_glass,
    od_to_rgb,
    project_od,
    render_od,
    rgb_to_od,
    unmix,
)

Rgb8 = npt.NDArray[np.uint8]
ALL_LEVELS = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
whites = st.tuples(*[st.floats(120.0, 255.0)] * 3)
pictures = hnp.arrays(np.uint8, st.tuples(st.integers(0, 9), st.integers(1, 7), st.just(3)))


def test_od_is_natural_log_over_white_when_levels_are_known() -> None:
    rgb = np.array([[200, 100, 50], [0, 1, 255]], np.uint8)
    expected = -np.log(np.array([[200, 100, 50], [1, 1, 255]]) / np.array([240.0, 230.0, 220.0]))
    np.testing.assert_allclose(rgb_to_od(rgb, (240, 230, 220)), expected, atol=1e-6)


@given(white=whites)
def test_od_and_back_is_identity_when_level_is_at_least_one(
    white: tuple[float, float, float],
) -> None:
    back = od_to_rgb(rgb_to_od(ALL_LEVELS, white), white)
    np.testing.assert_array_equal(back[1:], ALL_LEVELS[1:])
    assert back[0].tolist() == [1, 1, 1]


def test_od_to_rgb_rounds_to_nearest_and_clips() -> None:
    od = -np.log(np.array([[100.49, 100.51, 400.0]]) / 200.0)
    assert od_to_rgb(od, (200, 200, 200)).tolist() == [[100, 101, 255]]


@pytest.mark.parametrize("shape", [(3,), (5, 3), (4, 6, 3), (2, 4, 6, 3), (0, 3), (0, 4, 3)])
def test_every_function_keeps_the_leading_shape(shape: tuple[int, ...]) -> None:
    rgb = np.full(shape, 90, np.uint8)
    white = (240.0, 240.0, 240.0)
    assert rgb_to_od(rgb, white).shape == shape
    assert render_od(rgb, white, np.eye(3), white).shape == shape
    assert project_od(rgb, white, HDX[:2]).shape == (*shape[:-1], 2)
    assert dab_od(rgb).shape == shape[:-1]
    assert is_stained(rgb, white).shape == shape[:-1]
    assert glass_alpha(rgb, white, sigma_px=0.0).shape == shape[:-1]


@given(rgb=pictures, white=whites)
def test_fast_path_is_within_one_level_of_float64(
    rgb: Rgb8, white: tuple[float, float, float]
) -> None:
    od_map = np.array([[1.3, -0.4, 0.1], [0.05, 0.9, -0.2], [-0.3, 0.2, 1.1]])
    od = -np.log(np.maximum(rgb, 1).astype(np.float64) / np.array(white))
    exact = np.clip(np.rint(np.array([243.0, 240.0, 244.0]) * np.exp(-od @ od_map.T)), 0, 255)
    ours = render_od(rgb, white, od_map, (243.0, 240.0, 244.0))
    assert np.abs(ours.astype(int) - exact).max(initial=0) <= 1


def test_fast_path_gives_255_when_the_exponential_would_overflow_an_integer() -> None:
    steep = np.array([[1.0, -9.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    out = render_od(np.array([[200, 1, 200]], np.uint8), (240, 240, 240), steep, (240, 240, 240))
    assert out.tolist() == [[255, 1, 200]]


def test_fast_path_takes_views_when_memory_is_not_contiguous() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    white = (240.0, 240.0, 240.0)
    view = rgb[::2, ::-1]
    np.testing.assert_array_equal(
        render_od(view, white, HDX.T, white), render_od(view.copy(), white, HDX.T, white)
    )


def test_fast_path_joins_chunks_when_the_picture_is_larger_than_one() -> None:
    rgb = np.random.default_rng(1).integers(0, 256, (300, 250, 3), dtype=np.uint8)
    white = (240.0, 240.0, 240.0)
    whole = project_od(rgb, white, HDX)
    rows = np.stack([project_od(row, white, HDX) for row in rgb])
    np.testing.assert_array_equal(whole, rows)


@given(density=hnp.arrays(np.float64, (5, 2), elements=st.floats(0.0, 3.0)))
def test_unmix_finds_planted_densities(density: npt.NDArray[np.float64]) -> None:
    np.testing.assert_allclose(unmix(density @ HDX[:2], HDX[:2]), density, atol=1e-5)


def test_hdx_is_scikit_images() -> None:
    np.testing.assert_allclose(HDX, rgb_from_hdx, atol=1e-12)


def test_dab_od_is_six_times_scikit_images_when_not_clipped() -> None:
    rgb = np.random.default_rng(2).integers(1, 256, (40, 50, 3), dtype=np.uint8)
    theirs = separate_stains(rgb, hdx_from_rgb)[..., 1] * 6.0
    np.testing.assert_allclose(dab_od(rgb), np.maximum(theirs, 0.0), atol=2e-5)


def test_dab_od_reads_the_planted_amount_when_only_dab_is_there() -> None:
    amount = np.array([0.1, 0.4, 0.8])
    rgb = np.rint(255.0 * 10.0 ** -(amount[:, None] * HDX[1])).astype(np.uint8)
    np.testing.assert_allclose(dab_od(rgb), amount, atol=0.01)


def test_dab_od_softplus_reads_ln2_over_5_when_glass_is_empty() -> None:
    rgb = np.full((1, 3), 255, np.uint8)
    assert dab_od(rgb, "softplus")[0] == pytest.approx(np.log(2.0) / 5.0, rel=1e-6)


def test_glass_mask_is_one_below_the_limit_and_zero_past_the_ramp() -> None:
    white = (240.0, 240.0, 240.0)
    od = np.array([0.0, 0.05, 0.079, 0.13, 0.1801, 1.0])
    rgb = od_to_rgb(np.stack([od, od * 0, od * 0], axis=-1), white)
    alpha = glass_alpha(rgb, white, sigma_px=0.0)
    assert alpha[:2].tolist() == [1.0, 1.0]
    assert alpha[3] == pytest.approx(0.5, abs=0.1)
    assert alpha[-1] == 0.0


@pytest.mark.parametrize("he_od", [0.05, 0.10, 0.12, 0.18, 0.20, 0.30])
def test_pale_tissue_stays_tissue_and_glass_glass_when_glass_is_laid(he_od: float) -> None:
    """The fade crosses the OD that tells glass from tissue where the H&E itself crosses it."""
    white = (243.0, 243.0, 243.0)
    he = od_to_rgb(np.full((32, 32, 3), he_od), white)
    painted = od_to_rgb(np.broadcast_to(np.array(VEIL_OD), (32, 32, 3)), white)
    laid = lay_glass(painted, he, white, white)
    assert (is_stained(laid, white) == (he_od > GLASS_OD)).all()


def test_glass_mask_has_no_visible_step_when_the_stain_fades() -> None:
    # A ramp of single grey levels: neighbors may differ by one level of tissue at most by a tenth.
    levels = np.arange(255, 99, -1, dtype=np.uint8)
    alpha = glass_alpha(np.repeat(levels[:, None], 3, axis=1), (255.0,) * 3, sigma_px=0.0)
    assert (np.diff(alpha) <= 0.0).all()
    assert np.abs(np.diff(alpha)).max() < 0.1


def test_glass_mask_depends_only_on_its_reach() -> None:
    rgb = np.random.default_rng(3).integers(190, 245, (60, 60, 3), dtype=np.uint8)
    white = (244.0, 244.0, 244.0)
    cut = GLASS_REACH_PX
    part = glass_alpha(rgb[10:50, 10:50], white)[cut:-cut, cut:-cut]
    whole = glass_alpha(rgb, white)[10 + cut : 50 - cut, 10 + cut : 50 - cut]
    np.testing.assert_allclose(part, whole, atol=1e-6)
    stack = glass_alpha(np.stack([rgb, rgb[::-1]]), white)
    np.testing.assert_array_equal(stack[0], glass_alpha(rgb, white))


def test_glass_mask_ignores_single_noisy_pixels_in_pale_stroma() -> None:
    rgb = np.full((31, 31, 3), 180, np.uint8)
    rgb[15, 15] = 240
    assert glass_alpha(rgb, (240.0,) * 3)[15, 15] == 0.0
