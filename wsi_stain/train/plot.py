"""Line charts as pictures, for curves and measures: no plotting library for two charts.

In: named lines of points. Out: an image. Not here: what the numbers mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

__all__ = ["Axes", "Band", "draw_lines"]

Points = Sequence[tuple[float, float]]

WIDTH_PX, HEIGHT_PX = 960, 560
LEFT_PX, TOP_PX, RIGHT_PX, BOTTOM_PX = 76, 44, 716, 500
FONT_PX, TITLE_PX = 15, 18
INK, GRID, PAPER = (40, 40, 40), (225, 225, 225), (255, 255, 255)
# Okabe and Ito: told apart by eyes that confuse red and green.
COLORS = (
    (0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115),
    (0, 114, 178), (213, 94, 0), (204, 121, 167), (120, 120, 120),
)  # fmt: skip
MOST_LINES = len(COLORS)


@dataclass(frozen=True)
class Axes:
    """What stands around a chart; `log_y` draws decades, and leaves out what is not positive."""

    title: str
    x_label: str
    y_label: str
    log_y: bool = False


@dataclass(frozen=True)
class Band:
    """An interval drawn behind the line of the same name: (x, low, high)."""

    points: Sequence[tuple[float, float, float]]


@dataclass(frozen=True)
class _Frame:
    """Where values lie in the picture."""

    x: tuple[float, float]
    y: tuple[float, float]
    log_y: bool

    def place(self, x: float, y: float) -> tuple[float, float]:
        height = math.log10(y) if self.log_y else y
        return (
            LEFT_PX + (x - self.x[0]) / (self.x[1] - self.x[0]) * (RIGHT_PX - LEFT_PX),
            BOTTOM_PX - (height - self.y[0]) / (self.y[1] - self.y[0]) * (BOTTOM_PX - TOP_PX),
        )


def draw_lines(
    lines: Mapping[str, Points], axes: Axes, bands: Mapping[str, Band] | None = None
) -> Image.Image:
    """Draw a line chart with a legend.

    Parameters
    ----------
    lines
        Name to points (x, y), drawn in this order; at most 8 different colors.
    axes
        Words, and whether y is logarithmic.
    bands
        Intervals around lines, by name.

    Returns
    -------
    PIL.Image.Image
        RGB, 960 x 560 px. Empty axes where no line has a point.
    """
    bands = bands or {}
    drawn = {name: _visible(points, axes.log_y) for name, points in lines.items()}
    spans = [(x, y) for band in bands.values() for x, low, high in band.points for y in (low, high)]
    everything = [*(point for points in drawn.values() for point in points)]
    everything += _visible(spans, axes.log_y)
    frame = _frame(everything, axes.log_y)
    image = Image.new("RGB", (WIDTH_PX, HEIGHT_PX), PAPER)
    draw = ImageDraw.Draw(image, "RGBA")
    _draw_axes(draw, frame, axes)
    for i, (name, points) in enumerate(drawn.items()):
        color = COLORS[i % MOST_LINES]
        if name in bands:
            _draw_band(draw, frame, bands[name], color)
        places = [frame.place(*point) for point in points]
        if len(places) > 1:
            draw.line(places, fill=color, width=3, joint="curve")
        for x_px, y_px in places:
            draw.ellipse((x_px - 3, y_px - 3, x_px + 3, y_px + 3), fill=color)
        _draw_name(draw, i, name, points, color)
    return image


def _visible(points: Points, log_y: bool) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(y) and (y > 0.0 or not log_y)]


def _frame(points: Points, log_y: bool) -> _Frame:
    xs = [x for x, _ in points] or [0.0, 1.0]
    ys = [math.log10(y) if log_y else y for _, y in points] or [0.0, 1.0]
    if log_y:
        low, high = float(math.floor(min(ys))), float(math.ceil(max(ys)))
    else:
        margin = 0.05 * (max(ys) - min(ys))
        low, high = min(0.0, min(ys) - margin), max(ys) + margin
    x_low = min(0.0, min(xs))
    return _Frame((x_low, max(max(xs), x_low + 1.0)), (low, max(high, low + 1e-6)), log_y)


def _draw_axes(draw: ImageDraw.ImageDraw, frame: _Frame, axes: Axes) -> None:
    font = _font(FONT_PX)
    for value in _ticks(*frame.x):
        x_px = frame.place(value, 1.0)[0]
        draw.line((x_px, TOP_PX, x_px, BOTTOM_PX), fill=GRID)
        draw.text((x_px, BOTTOM_PX + 8), f"{value:,.6g}", fill=INK, font=font, anchor="ma")
    for height in _heights(frame):
        y_px = frame.place(frame.x[0], height)[1]
        draw.line((LEFT_PX, y_px, RIGHT_PX, y_px), fill=GRID)
        draw.text((LEFT_PX - 8, y_px), f"{height:.4g}", fill=INK, font=font, anchor="rm")
    draw.rectangle((LEFT_PX, TOP_PX, RIGHT_PX, BOTTOM_PX), outline=INK)
    draw.text((LEFT_PX, 10), axes.title, fill=INK, font=_font(TITLE_PX))
    draw.text(
        ((LEFT_PX + RIGHT_PX) / 2, HEIGHT_PX - 8), axes.x_label, fill=INK, font=font, anchor="md"
    )
    draw.text((RIGHT_PX + 14, 14), axes.y_label, fill=INK, font=font)


def _heights(frame: _Frame) -> Iterable[float]:
    if not frame.log_y:
        return _ticks(*frame.y)
    return [10.0**decade for decade in range(round(frame.y[0]), round(frame.y[1]) + 1)]


def _ticks(low: float, high: float) -> Iterable[float]:
    """Give 3 to 8 round numbers in a span."""
    rough = (high - low) / 6
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _draw_band(
    draw: ImageDraw.ImageDraw, frame: _Frame, band: Band, color: tuple[int, int, int]
) -> None:
    upper = [frame.place(x, high) for x, _, high in band.points]
    lower = [frame.place(x, low) for x, low, _ in band.points]
    if len(upper) > 1:
        draw.polygon([*upper, *reversed(lower)], fill=(*color, 50))


def _draw_name(
    draw: ImageDraw.ImageDraw, i: int, name: str, points: Points, color: tuple[int, int, int]
) -> None:
    y_px = TOP_PX + 10 + 24 * i
    last = f"  {points[-1][1]:.3g}" if points else ""
    draw.line((RIGHT_PX + 14, y_px, RIGHT_PX + 38, y_px), fill=color, width=4)
    draw.text((RIGHT_PX + 46, y_px), name + last, fill=INK, font=_font(FONT_PX), anchor="lm")


def _font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size_px)
