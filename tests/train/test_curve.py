"""The curve: what its lines say of flatness and of a rise, and that a damaged line is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from wsi_stain.errors import ConfigError
from wsi_stain.train.curve import Curve, Row, gain


def _curve(folder: Path, stage: str, name: str, values: list[float]) -> Curve:
    curve = Curve(folder, stage)
    for i, value in enumerate(values):
        curve.add(Row(100 * (i + 1), float(i), 0.5, {name: value}))
    return curve


@pytest.mark.parametrize(
    ("stage", "name", "sign"),
    [("score", "eps_mse_10", -1.0), ("mine", "nats_10", 1.0), ("refine", "sure_10", 1.0),
     ("refine", "nats_10", -1.0)],
)  # fmt: skip
def test_gain_knows_which_way_is_better(stage: str, name: str, sign: float) -> None:
    before, after = (Row(n, 0.0, None, {name: value}) for n, value in ((1, 2.0), (2, 2.5)))
    assert gain(before, after, stage) == pytest.approx(sign * 0.25)


def test_sharpness_and_brown_of_a_student_are_neither_better_nor_worse() -> None:
    before = Row(1, 0.0, None, {"grey": 2.0, "sharpness": 0.5, "dab": 0.1, "dab_teacher": 0.2})
    after = Row(2, 0.0, None, {"grey": 1.0, "sharpness": 1.0, "dab": 0.2, "dab_teacher": 0.2})
    assert gain(before, after, "distill") == pytest.approx(0.5)


def test_gain_is_the_mean_over_numbers() -> None:
    before = Row(1, 0.0, None, {"a": 1.0, "b": 2.0})
    after = Row(2, 0.0, None, {"a": 0.5, "b": 2.0})
    assert gain(before, after, "score") == pytest.approx(0.25)


def test_curve_is_flat_only_when_the_last_measures_gain_too_little(tmp_path: Path) -> None:
    falling = _curve(tmp_path, "score", "mse", [1.0, 0.9, 0.8, 0.7])
    assert not falling.is_flat(0.02, 3)
    flat = _curve(tmp_path, "score", "mse", [1.0, 0.5, 0.499, 0.4985, 0.498])
    assert flat.is_flat(0.02, 3)
    assert not flat.is_flat(0.02, 4)  # reaches back to the large gain
    assert not flat.is_flat(0.02, 5)  # too few measures
    assert not flat.is_flat(0.0, 3)  # never asked for


def test_rise_names_the_best_measure_when_two_later_ones_are_worse(tmp_path: Path) -> None:
    assert _curve(tmp_path, "score", "mse", [1.0, 0.5, 0.51, 0.49]).rise() is None
    assert _curve(tmp_path, "score", "mse", [1.0, 0.5, 0.52]).rise() is None  # one is chance
    best = _curve(tmp_path, "score", "mse", [1.0, 0.5, 0.52, 0.53]).rise()
    assert best is not None
    assert best.samples == 200
    rising_nats = _curve(tmp_path, "mine", "nats_10", [1.0, 0.5, 0.52, 0.53]).rise()
    assert rising_nats is not None
    assert rising_nats.samples == 100


def test_curve_goes_on_from_its_log_without_the_lost_stretch(tmp_path: Path) -> None:
    written = _curve(tmp_path, "score", "mse", [1.0, 0.9, 0.8])
    written.add(Row(300, 9.0, None, {"mse": 0.8}))  # the last measure of a run repeats itself
    read = Curve.read(tmp_path, "score", samples=300)
    assert [row.samples for row in read.rows] == [100, 200, 300]
    assert read.rows[-1].loss == 0.5
    assert [row.samples for row in Curve.read(tmp_path, "score", samples=250).rows] == [100, 200]
    assert Curve.read(tmp_path / "none", "score", 0).rows == []


@pytest.mark.parametrize("line", ["{", '{"samples": 1}', "[]", '{"samples": 1, "x": 2}'])
def test_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    _curve(tmp_path, "score", "mse", [1.0])
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ConfigError, match="line 2 is damaged"):
        Curve.read(tmp_path, "score", 100)


def test_picture_shows_a_line_per_number(tmp_path: Path) -> None:
    _curve(tmp_path, "score", "mse", [1.0, 0.1])
    with Image.open(tmp_path / "curve.png") as picture:
        colors = {color for _, color in picture.convert("RGB").getcolors(2**20) or []}
    assert {(0, 0, 0), (230, 159, 0)} <= colors
