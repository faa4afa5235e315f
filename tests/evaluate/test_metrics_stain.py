"""Amounts of brown: ramps with a closed form, planted shares and hues."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from wsi_stain.errors import ConfigError
from wsi_stain.evaluate.metrics_stain import (
    dab_agreement,
    dab_kl,
    dab_p90,
    hue_of_positives,
    iod,
    iod_deviation_percent,
)
from wsi_stain.stain.density import HDX

Rgb8 = npt.NDArray[np.uint8]


def _brown(od: npt.ArrayLike) -> Rgb8:
    amount = np.asarray(od, dtype=np.float64)
    picture: Rgb8 = np.rint(255.0 * 10.0 ** -(amount[..., None] * HDX[1])).astype(np.uint8)
    return picture


RAMP = np.broadcast_to(np.linspace(0.0, 1.5, 600), (20, 600))


def test_iod_of_a_ramp_is_its_integral_in_both_modes() -> None:
    picture, truth = _brown(RAMP), float(RAMP.sum())
    exact, imagej = iod(picture), iod(picture, mode="imagej")
    assert exact == pytest.approx(truth, rel=0.01)
    assert imagej == pytest.approx(exact, rel=0.01)


def test_iod_imagej_reads_half_a_level_when_the_8_bit_picture_is_black() -> None:
    black = np.zeros((1, 1, 3), np.uint8)
    assert iod(black, mode="imagej") <= math.log10(255.0 / 0.5) + 1e-9


def test_iod_rgb_is_the_sum_over_channels() -> None:
    rgb = np.array([[[51, 255, 0]]], np.uint8)
    assert iod(rgb, "rgb") == pytest.approx(math.log10(5.0) + math.log10(255.0), rel=1e-6)


def test_iod_fod_drops_faint_dab_and_grows() -> None:
    ceiling = 10.0 ** (-math.exp(1 / 1.8))
    assert iod(_brown([[0.1]]), "fod") == 0.0
    value = iod(_brown([[0.9]]), "fod")
    grey = (10.0 ** -(0.9 * HDX[1])) @ np.array([0.2125, 0.7154, 0.0721])
    assert value == pytest.approx((-math.log10(grey + ceiling)) ** 1.8, rel=0.02)


def test_iod_deviation_is_of_the_sums() -> None:
    half, full = _brown(RAMP / 2), _brown(RAMP)
    assert iod_deviation_percent([half], [full]) == pytest.approx(-50.0, abs=1.0)
    assert iod_deviation_percent([half, full], [full, half]) == pytest.approx(0.0, abs=1e-9)


def test_iod_deviation_is_refused_when_areas_differ_or_nothing_is_brown() -> None:
    white = np.full((4, 4, 3), 255, np.uint8)
    with pytest.raises(ConfigError, match="cannot be compared"):
        iod_deviation_percent([white], [white])
    with pytest.raises(ConfigError, match="cannot be compared"):
        iod_deviation_percent([_brown([[0.5]])], [_brown([[0.5, 0.5]])])


def test_p90_is_the_mean_of_the_top_tenth() -> None:
    od = np.zeros((10, 10))
    od[0] = np.linspace(0.4, 0.8, 10)
    assert dab_p90(_brown(od)) == pytest.approx(0.6, abs=0.01)
    assert dab_p90(_brown(np.zeros((10, 10))), "softplus") == pytest.approx(
        math.log(2) / 5, abs=1e-6
    )


def test_agreement_finds_planted_correlation_and_offset() -> None:
    reference = [0.1, 0.2, 0.3, 0.4]
    r, mae = dab_agreement([value + 0.05 for value in reference], reference)
    assert r == pytest.approx(1.0)
    assert mae == pytest.approx(0.05)
    assert dab_agreement(reference[::-1], reference)[0] == pytest.approx(-1.0)
    assert math.isnan(dab_agreement([0.2] * 4, reference)[0])
    with pytest.raises(ConfigError):
        dab_agreement([1.0], [1.0])


def test_kl_is_zero_for_equal_sets_and_the_closed_form_for_two_bins() -> None:
    reference = _brown(np.repeat([0.0, 0.8], [50, 50])[None])
    output = _brown(np.repeat([0.0, 0.8], [90, 10])[None])
    assert dab_kl([reference], [reference]) == pytest.approx(0.0, abs=1e-12)
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert dab_kl([output], [reference]) == pytest.approx(expected, rel=1e-4)


def test_kl_is_direct_when_the_output_lacks_brown() -> None:
    brown, empty = _brown(np.repeat([0.0, 0.8], [50, 50])[None]), _brown(np.zeros((1, 100)))
    assert dab_kl([empty], [brown]) > 5.0  # all of the reference's brown is unexplained
    assert dab_kl([brown], [empty]) == pytest.approx(math.log(2.0), rel=1e-3)


def test_hue_is_the_planted_angle() -> None:
    pure = hue_of_positives(_brown(np.full((5, 5), 0.7)))
    assert pure.n_positive_px == 25
    assert pure.angle_deg == pytest.approx(0.0, abs=0.6)
    turned = 10.0 ** -(0.7 * HDX[1] + 0.35 * HDX[0])
    rgb = np.rint(255 * np.broadcast_to(turned, (5, 5, 3))).astype(np.uint8)
    mixture = 0.7 * HDX[1] + 0.35 * HDX[0]
    cosine = mixture @ HDX[1] / np.linalg.norm(mixture) / np.linalg.norm(HDX[1])
    found = hue_of_positives(rgb).angle_deg
    assert found == pytest.approx(math.degrees(math.acos(cosine)), abs=0.6)


def test_hue_is_absent_when_nothing_is_positive() -> None:
    assert hue_of_positives(np.full((5, 5, 3), 250, np.uint8)) == (None, 0)
