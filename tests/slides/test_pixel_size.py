"""Which pixel size is believed."""

from __future__ import annotations

from pathlib import Path

import pytest

from wsi_stain.errors import ConfigError, MppUnknownError
from wsi_stain.slides.pixel_size import PixelSize, from_power, from_resolution, settle

PATH = Path("a.svs")


def test_settle_takes_first_sane_candidate_when_earlier_is_absurd() -> None:
    found = [PixelSize("tiff", 0.00499, 0.00499), PixelSize("aperio.MPP", 0.25, 0.25)]
    assert settle(PATH, found, None) == (0.25, "aperio.MPP", 0.25)


def test_settle_prefers_user_and_keeps_files_word_when_both_speak() -> None:
    assert settle(PATH, [PixelSize("t", 0.25, 0.25)], 0.5) == (0.5, "user", 0.25)
    assert settle(PATH, [], 0.5) == (0.5, "user", None)


def test_settle_names_rejected_number_and_flag_when_nothing_is_sane() -> None:
    with pytest.raises(MppUnknownError, match=r"0\.00499 um/px by tiff") as caught:
        settle(PATH, [PixelSize("tiff", 0.00499, 0.00499)], None)
    assert "--mpp" in caught.value.hint
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(("x_um", "y_um", "fine"), [(0.5, 0.52, True), (0.5, 0.53, False)])
def test_settle_refuses_when_pixels_are_not_square(x_um: float, y_um: float, fine: bool) -> None:
    found = [PixelSize("t", x_um, y_um)]
    if fine:
        assert settle(PATH, found, None)[0] == pytest.approx((x_um * y_um) ** 0.5)
    else:
        with pytest.raises(MppUnknownError, match="not square"):
            settle(PATH, found, None)


@pytest.mark.parametrize("mpp", [0.0, 0.049, 20.1, -1.0, float("nan"), float("inf")])
def test_settle_refuses_user_when_value_is_absurd(mpp: float) -> None:
    with pytest.raises(ConfigError):
        settle(PATH, [PixelSize("t", 0.5, 0.5)], mpp)


def test_from_resolution_converts_when_unit_is_known() -> None:
    assert from_resolution("t", 20000.0, 20000.0, "CENTIMETER")[0].x_um == pytest.approx(0.5)
    assert from_resolution("t", 50800.0, 50800.0, "inch")[0].x_um == pytest.approx(0.5)
    assert from_resolution("t", 72.0, 72.0, "inch")[0].is_sane is False
    assert from_resolution("t", 1.0, 1.0, "none") == []
    assert from_resolution("t", 0.0, 1.0, "inch") == []


def test_from_power_guesses_when_objective_is_known() -> None:
    assert from_power(20.0)[0].x_um == 0.5
    assert from_power(None) == []
