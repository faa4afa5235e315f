"""Sizes, regions and scales: arithmetic between the slide's frame and the model's frame.

In: integers and floats. Out: integers and floats. Not here: images, files, settings.

Two frames are used everywhere. `_l0` is the slide's own full-resolution pixel grid, cropped to
the slide's bounds rectangle. `_out` is the grid of the virtual slide, at the model's pixel size.
One out pixel covers ``scale`` x ``scale`` level-0 pixels; pixel (0, 0) of both frames has the
same corner, so both pictures lie over each other in a viewer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["Region", "Scale", "Size", "choose_scale", "pyramid_sizes"]


class Size(NamedTuple):
    """Width and height of a picture, in pixels."""

    width_px: int
    height_px: int

    @property
    def area_px(self) -> int:
        """Number of pixels."""
        return self.width_px * self.height_px

    def __str__(self) -> str:
        return f"{self.width_px} x {self.height_px} px"


class Region(NamedTuple):
    """A rectangle of pixels: left, top, width, height. May reach over the picture's edge."""

    x_px: int
    y_px: int
    width_px: int
    height_px: int

    @property
    def right_px(self) -> int:
        """First column after the region."""
        return self.x_px + self.width_px

    @property
    def bottom_px(self) -> int:
        """First row after the region."""
        return self.y_px + self.height_px

    @property
    def size(self) -> Size:
        """Width and height."""
        return Size(self.width_px, self.height_px)

    def contains(self, other: Region) -> bool:
        """Tell whether `other` lies wholly inside."""
        return (
            self.x_px <= other.x_px
            and self.y_px <= other.y_px
            and other.right_px <= self.right_px
            and other.bottom_px <= self.bottom_px
        )

    def intersect(self, other: Region) -> Region:
        """Give the common part; width or height is 0 where there is none."""
        x_px, y_px = max(self.x_px, other.x_px), max(self.y_px, other.y_px)
        width_px = max(0, min(self.right_px, other.right_px) - x_px)
        height_px = max(0, min(self.bottom_px, other.bottom_px) - y_px)
        return Region(x_px, y_px, width_px, height_px)

    def touches_any(self, others: Iterable[Region]) -> bool:
        """Tell whether some pixel lies in one of the others, too."""
        return any(0 not in self.intersect(other).size for other in others)


class Scale(NamedTuple):
    """How the out frame lies over the level-0 frame.

    Attributes
    ----------
    factor
        Level-0 pixels per out pixel, the same in x and y.
    mpp_out
        Pixel size of the out frame, um/px: ``factor * mpp_l0`` exactly.
    size_out
        Size of the virtual slide, px: the last column and row may be partly empty.
    """

    factor: float
    mpp_out: float
    size_out: Size


def choose_scale(size_l0: Size, mpp_l0: float, mpp_model: float, tolerance: float) -> Scale:
    """Choose the out frame for a slide and a model.

    A whole factor keeps pixels sharp and frames exact, and a model trained with scale
    augmentation bears a small difference in pixel size. So the nearest whole factor is taken
    where it gives a pixel size within `tolerance` of the model's; else the ratio, to the nearest
    1/256: regions read apart then agree to the bit, and the pixel size differs by 0.2 % at most.

    Parameters
    ----------
    size_l0
        Slide size, level-0 px.
    mpp_l0, mpp_model
        Pixel sizes, um/px, both positive.
    tolerance
        Largest accepted relative difference to `mpp_model`, for example 0.1.

    Returns
    -------
    Scale
        Factor (a whole number, or about ``mpp_model / mpp_l0``), out pixel size and size.
    """
    exact = mpp_model / mpp_l0
    whole = max(1, round(exact))
    near = abs(whole / exact - 1.0) <= tolerance
    factor = float(whole) if near else max(1, round(256 * exact)) / 256
    size_out = Size(
        max(1, math.ceil(size_l0.width_px / factor - 1e-9)),
        max(1, math.ceil(size_l0.height_px / factor - 1e-9)),
    )
    return Scale(factor=factor, mpp_out=factor * mpp_l0, size_out=size_out)


def pyramid_sizes(size: Size, smallest_side_px: int = 1024) -> list[Size]:
    """List the level sizes of a pyramid: halve, rounding up, until the longer side is small.

    Parameters
    ----------
    size
        Size of level 0, px.
    smallest_side_px
        Stop when the longer side is at most this; at least three levels are made where the
        picture is larger than one pixel.

    Returns
    -------
    list of Size
        Level 0 first.
    """
    sizes = [size]
    while max(sizes[-1]) > smallest_side_px or (len(sizes) < 3 and max(sizes[-1]) > 1):
        width_px, height_px = sizes[-1]
        sizes.append(Size(-(-width_px // 2), -(-height_px // 2)))
    return sizes
