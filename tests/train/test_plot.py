"""Line charts: points lie where the axes say, bands behind their lines, logs drop what is <= 0."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from wsi_stain.train.plot import COLORS, HEIGHT_PX, WIDTH_PX, Axes, Band, draw_lines

AXES = Axes("title", "x", "y")


def _places(picture: Image.Image, color: tuple[int, int, int]) -> tuple[float, float]:
    """Middle of the pixels of a color inside the plot, x and y."""
    pixels = np.asarray(picture)[44:501, 76:717]
    rows, columns = np.nonzero(np.all(pixels == color, axis=2))
    return float(columns.mean()), float(rows.mean())


def test_points_lie_where_the_axes_say() -> None:
    lines = {"ends": [(0.0, 0.0), (10.0, 1.0)], "low": [(5.0, 0.1)], "high": [(5.0, 0.9)]}
    picture = draw_lines(lines, AXES)
    assert picture.size == (WIDTH_PX, HEIGHT_PX)
    (x_low, y_low), (x_high, y_high) = (_places(picture, COLORS[i]) for i in (1, 2))
    assert x_low == pytest.approx(320, abs=1)
    assert x_high == pytest.approx(320, abs=1)
    assert y_low > y_high  # y grows upward
    assert (y_low - y_high) / 456 == pytest.approx(0.8 / 1.1, abs=0.01)  # 5 % above and below


def test_decades_are_even_when_logarithmic() -> None:
    lines = {"a": [(1.0, 0.01)], "b": [(1.0, 0.1)], "c": [(1.0, 1.0)], "d": [(0.0, 0.0)]}
    picture = draw_lines(lines, Axes("title", "x", "y", log_y=True))
    ys = [_places(picture, COLORS[i])[1] for i in range(3)]
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=1.5)
    assert not np.any(np.all(np.asarray(picture)[44:501, 76:717] == COLORS[3], axis=2))


def test_band_lies_behind_its_line() -> None:
    lines = {"a": [(0.0, 1.0), (1.0, 1.0)]}
    plain = np.asarray(draw_lines(lines, AXES)).astype(int)
    banded = draw_lines(lines, AXES, {"a": Band([(0.0, 0.5, 1.5), (1.0, 0.5, 1.5)])})
    colored = np.asarray(banded).astype(int)
    assert colored[44:501, 76:717].sum() < plain[44:501, 76:717].sum()


@pytest.mark.parametrize("points", [[], [(1.0, float("nan"))]])
def test_chart_without_points_is_empty_axes(points: list[tuple[float, float]]) -> None:
    picture = np.asarray(draw_lines({"a": points}, AXES))
    assert picture.std() > 0
