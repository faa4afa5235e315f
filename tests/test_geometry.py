"""Geometry: regions, the two frames, pyramid sizes."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_stain.geometry import Region, Size, choose_scale, pyramid_sizes

REGIONS = st.builds(
    Region,
    st.integers(-500, 500),
    st.integers(-500, 500),
    st.integers(0, 400),
    st.integers(0, 400),
)


@given(REGIONS, REGIONS)
def test_intersection_is_inside_both_and_symmetric(a: Region, b: Region) -> None:
    both = a.intersect(b)
    assert both.size == b.intersect(a).size
    if both.size.area_px:
        assert a.contains(both)
        assert b.contains(both)


@given(
    st.integers(1, 200_000),
    st.integers(1, 200_000),
    st.floats(0.1, 2.0),
    st.floats(0.25, 4.0),
)
def test_out_frame_covers_the_slide_with_less_than_a_pixel_to_spare(
    width_px: int, height_px: int, mpp_l0: float, mpp_model: float
) -> None:
    scale = choose_scale(Size(width_px, height_px), mpp_l0, mpp_model, 0.1)
    for out_px, l0_px in zip(scale.size_out, (width_px, height_px), strict=True):
        covered = out_px * scale.factor
        assert covered >= l0_px - 1e-6 * l0_px
        assert covered < l0_px + scale.factor + 1e-6 * l0_px
    assert math.isclose(scale.mpp_out, scale.factor * mpp_l0)


@pytest.mark.parametrize(
    ("mpp_l0", "factor"),
    [(0.499, 1.0), (0.253, 2.0), (0.25, 2.0), (0.46, 1.0), (0.3461, 0.5 / 0.3461), (0.12, 4.0)],
)
def test_whole_factor_is_taken_only_where_it_comes_near(mpp_l0: float, factor: float) -> None:
    assert choose_scale(Size(1000, 1000), mpp_l0, 0.5, 0.1).factor == pytest.approx(
        factor, rel=2e-3
    )


@given(st.integers(1, 300_000), st.integers(1, 300_000))
def test_pyramid_halves_rounding_up_and_ends_small(width_px: int, height_px: int) -> None:
    sizes = pyramid_sizes(Size(width_px, height_px))
    assert sizes[0] == (width_px, height_px)
    assert max(sizes[-1]) <= 1024
    for upper, lower in itertools.pairwise(sizes):
        assert lower == (math.ceil(upper[0] / 2), math.ceil(upper[1] / 2))
    if max(width_px, height_px) > 2:
        assert len(sizes) >= 3
