"""Labelling index on planted nuclei; agreement against closed forms."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from wsi_stain.errors import ConfigError
from wsi_stain.evaluate.metrics_nuclei import (
    REACH_UM,
    find_nuclei,
    index_agreement,
    labelling_index,
)
from wsi_stain.stain.density import HDX

Rgb8 = npt.NDArray[np.uint8]
MPP = 0.5


def _field(n_blue: int, n_brown: int, mpp: float = MPP, spacing_um: float = 12.0) -> Rgb8:
    """Draw round nuclei of 3.5 um radius on a grid, the brown ones first, with noise."""
    rng = np.random.default_rng(0)
    side = math.ceil(math.sqrt(n_blue + n_brown))
    size_px = round((side + 1) * spacing_um / mpp)
    density = np.zeros((size_px, size_px, 2))
    for i in range(n_blue + n_brown):
        x, y = ((1 + k) * spacing_um / mpp for k in (i % side, i // side))
        layer = np.zeros((size_px, size_px))
        cv2.circle(layer, (round(x), round(y)), round(3.5 / mpp), 1.0, -1)
        density[..., int(i < n_brown)] += cv2.GaussianBlur(layer, (0, 0), 0.5 / mpp)
    od = density * (0.35, 0.5) @ HDX[:2] + 0.03
    levels = 255 * 10.0**-od + rng.normal(0, 2, (size_px, size_px, 3))
    picture: Rgb8 = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
    return picture


@pytest.mark.parametrize("mpp", [0.25, 0.5])
@pytest.mark.parametrize(("n_blue", "n_brown"), [(36, 0), (27, 9), (0, 25), (18, 18)])
def test_planted_nuclei_are_counted(n_blue: int, n_brown: int, mpp: float) -> None:
    result = labelling_index(_field(n_blue, n_brown, mpp), mpp)
    assert result.n_nuclei == n_blue + n_brown
    assert result.n_positive == n_brown
    assert result.percent == pytest.approx(100 * n_brown / (n_blue + n_brown))


def test_touching_nuclei_are_split() -> None:
    field = _field(25, 0, spacing_um=7.0)
    assert labelling_index(field, MPP).n_nuclei == pytest.approx(25, abs=1)


def test_nuclei_lie_where_they_were_drawn() -> None:
    nuclei = find_nuclei(_field(20, 5), MPP)
    places = {(round(x / 24), round(y / 24)) for x, y in nuclei.xy_px.tolist()}
    assert places == {(1 + i % 5, 1 + i // 5) for i in range(25)}
    assert np.abs(nuclei.xy_px % 24 - 12).min() >= 11  # within a pixel of the grid's corners
    assert set(nuclei.radius_um.tolist()) <= {3.0, 4.0}


@pytest.mark.parametrize("od", [0.04, 0.6])
@pytest.mark.parametrize("radius_um", [3.0, 5.0, 7.0])
def test_nucleus_is_one_when_large_pale_or_black(radius_um: float, od: float) -> None:
    rng = np.random.default_rng(2)
    layer = np.zeros((200, 200))
    for x, y in ((50, 50), (150, 60), (100, 150)):
        cv2.ellipse(
            layer, (x, y), (round(2.2 * radius_um), round(1.8 * radius_um)), 30, 0, 360, 1.0, -1
        )
    lumps = 1.0 + 0.3 * cv2.GaussianBlur(rng.standard_normal((200, 200)), (0, 0), 2) * 6
    density = od * cv2.GaussianBlur(layer, (0, 0), 1.0) * np.clip(lumps, 0.4, 1.6)
    levels = 240 * 10.0 ** -(density[..., None] * HDX[0] / HDX[0][0])
    picture = np.clip(levels + rng.normal(0, 1.5, levels.shape), 0, 255).astype(np.uint8)
    nuclei = find_nuclei(picture, MPP, (240.0, 240.0, 240.0))
    assert len(nuclei.radius_um) == 3
    assert (nuclei.dab_od < 0.05).all()


def test_nuclei_are_the_same_when_seen_in_a_block() -> None:
    field = _field(90, 54)
    margin_px = round(REACH_UM / MPP)
    whole = find_nuclei(field, MPP)
    x_px, y_px, side_px = 100, 96, 96
    part = find_nuclei(
        field[
            y_px - margin_px : y_px + side_px + margin_px,
            x_px - margin_px : x_px + side_px + margin_px,
        ],
        MPP,
    )
    offset = np.array([x_px, y_px]) - margin_px
    inside = (whole.xy_px >= (x_px, y_px)) & (whole.xy_px < (x_px + side_px, y_px + side_px))
    here = sorted(map(tuple, whole.xy_px[inside.all(axis=1)].tolist()))
    moved = part.xy_px + offset
    again = (moved >= (x_px, y_px)) & (moved < (x_px + side_px, y_px + side_px))
    assert len(here) >= 12
    assert sorted(map(tuple, moved[again.all(axis=1)].tolist())) == here


def test_haze_of_the_ground_is_not_stain() -> None:
    field = _field(25, 0)
    beige = np.array([1.0, 0.93, 0.84])
    hazy = np.rint(field * beige).astype(np.uint8)
    assert labelling_index(hazy, MPP).percent == 0.0


@pytest.mark.parametrize("level", [255, 200])
def test_empty_or_noisy_background_has_no_nuclei(level: int) -> None:
    rng = np.random.default_rng(1)
    noise = np.clip(level + rng.normal(0, 3, (200, 200, 3)), 0, 255).astype(np.uint8)
    assert labelling_index(noise, MPP) == (None, 0, 0)
    assert labelling_index(np.full((64, 64, 3), level, np.uint8), MPP) == (None, 0, 0)


def test_threshold_decides_what_is_positive() -> None:
    field = _field(27, 9)
    assert labelling_index(field, MPP, positive_od=5.0).n_positive == 0
    assert labelling_index(field, MPP, positive_od=-1.0).percent == 100.0


@pytest.mark.parametrize("mpp", [1.0, 0.0, -0.5])
def test_unsuited_pixel_size_is_refused(mpp: float) -> None:
    with pytest.raises(ConfigError, match="cannot be counted"):
        labelling_index(np.zeros((32, 32, 3), np.uint8), mpp)


def test_agreement_is_perfect_for_equal_series() -> None:
    found = index_agreement([1.0, 10.0, 50.0, 80.0], [1.0, 10.0, 50.0, 80.0])
    assert found == pytest.approx((0.0, 1.0, 1.0, 1.0, 1.0))


def test_agreement_matches_shrout_and_fleiss() -> None:
    # Raters 1 and 2 of the table in Shrout and Fleiss 1979 (six targets).
    table = np.array([[9, 2], [6, 1], [8, 4], [7, 1], [10, 5], [6, 2]], dtype=float)
    n, k = table.shape
    rows, cols, grand = table.mean(1), table.mean(0), table.mean()
    msr = k * ((rows - grand) ** 2).sum() / (n - 1)
    msc = n * ((cols - grand) ** 2).sum() / (k - 1)
    mse = ((table - rows[:, None] - cols + grand) ** 2).sum() / ((n - 1) * (k - 1))
    expected = (msr - mse) / (msr + (k - 1) * mse + k * (msc - mse) / n)
    found = index_agreement(table[:, 0].tolist(), table[:, 1].tolist())
    assert found.icc == pytest.approx(expected)
    assert found.icc < 0.3 < found.r  # a constant offset costs agreement, not correlation


def test_kappa_is_zero_when_agreement_is_chance() -> None:
    found = index_agreement([1.0, 1.0, 50.0, 50.0], [1.0, 50.0, 1.0, 50.0])
    assert found.tier_agreement == 0.5
    assert found.kappa == pytest.approx(0.0)


def test_tiers_split_at_5_and_30_percent() -> None:
    found = index_agreement([4.9, 5.0, 30.0, 29.9], [0.0, 20.0, 90.0, 10.0])
    assert found.tier_agreement == 1.0
    with pytest.raises(ConfigError):
        index_agreement([1.0], [1.0])


# Tumor nuclei that the annotators of BCData and SHIDC-B-Ki-67 marked: positive, negative.
ANNOTATED = {
    "bcdata/bcdata_00": (32, 106),
    "bcdata/bcdata_01": (19, 90),
    "bcdata/bcdata_05": (56, 56),
    "bcdata/bcdata_10": (45, 53),
    "bcdata/bcdata_12": (70, 82),
    "bcdata/bcdata_15": (122, 143),
    "bcdata/bcdata_19": (58, 19),
    "bcdata/bcdata_21": (30, 93),
    "bcdata/bcdata_24": (55, 89),
    "shidc_ki67/p1_0299_1": (50, 239),
    "shidc_ki67/p1_0313_1": (7, 151),
    "shidc_ki67/p1_0317_10": (13, 164),
    "shidc_ki67/p2_0191_1": (33, 133),
    "shidc_ki67/p2_0198_2": (18, 79),
}


@pytest.mark.slide
def test_index_is_near_the_annotators(shared_data: Path) -> None:
    differences = []
    for name, (n_positive, n_negative) in ANNOTATED.items():
        bgr = cv2.imread(str(shared_data / "ihc" / f"{name}.jpg"))
        assert bgr is not None
        rgb = np.ascontiguousarray(bgr[:, :, ::-1]).astype(np.uint8)
        white = np.percentile(rgb.reshape(-1, 3), 98, axis=0)
        found = labelling_index(rgb, MPP, white=white).percent
        assert found is not None
        differences.append(found - 100.0 * n_positive / (n_positive + n_negative))
    assert np.abs(differences).mean() < 8.0
    assert abs(float(np.mean(differences))) < 5.0
    assert np.abs(differences).max() < 20.0


@pytest.mark.slide
def test_real_ki67_field_has_plausible_nuclei(shared_data: Path) -> None:
    bgr = cv2.imread(str(shared_data / "ihc" / "ki67_rouland" / "1309620-A2-5.jpg"))
    assert bgr is not None
    rgb = np.ascontiguousarray(bgr[:, :, ::-1]).astype(np.uint8)
    white = np.percentile(rgb.reshape(-1, 3), 98, axis=0)
    result = labelling_index(rgb, MPP, white=white)
    area_mm2 = rgb.shape[0] * rgb.shape[1] * MPP**2 / 1e6
    assert 800 < result.n_nuclei / area_mm2 < 15_000
    assert result.percent is not None
    assert 30.0 < result.percent < 90.0
    # The grey of this field, taken for stain, would make nearly all of them positive.
    raw = labelling_index(rgb, MPP)
    assert raw.percent is not None
    assert raw.percent > result.percent
