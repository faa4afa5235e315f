"""What a backend says about a slide, and what any backend must do.

Room 1 of 4. In: nothing. Out: the messages between `image` and its backends. Not here: files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from wsi_stain.errors import SlideError
from wsi_stain.geometry import Region, Size
from wsi_stain.slides.missing import Cell
from wsi_stain.slides.pixel_size import PixelSize

__all__ = [
    "ONE_THREAD_PX",
    "Backend",
    "Level",
    "Pixels",
    "SlideFacts",
    "check_sizes",
    "true_downsample",
]

Pixels = npt.NDArray[np.uint8]
LARGEST_SIDE_PX = 2**31 - 1
# OpenCV splits larger results over threads of its own, which spin on the cores that ours need.
ONE_THREAD_PX = 2**16


class Level(NamedTuple):
    """One level of a pyramid: its whole size, px, and level-0 px per level px."""

    size: Size
    downsample: float


@dataclass(frozen=True)
class SlideFacts:
    """What the file says.

    Attributes
    ----------
    format
        For a person: "aperio", "hamamatsu", "OME-TIFF" ...
    size_l0, origin_l0
        The slide's bounds rectangle in its full level-0 grid, px; the whole grid where the file
        names no bounds.
    levels
        Largest first; sizes are those of the whole grid.
    pixel_sizes
        Candidates, most trusted first.
    objective_power
        Nominal magnification, or `None`.
    background
        RGB of where nothing was scanned, 0..255.
    icc
        Color profile, or `None`; empty where there is one that cannot be parsed.
    missing_pieces
        Tiles of the largest level that the file leaves out.
    """

    format: str
    size_l0: Size
    origin_l0: tuple[int, int]
    levels: tuple[Level, ...]
    pixel_sizes: tuple[PixelSize, ...]
    objective_power: float | None
    background: tuple[int, int, int]
    icc: bytes | None
    missing_pieces: int = 0


class Backend(Protocol):
    """A library that reads slides, opened on one file.

    Attributes
    ----------
    facts
        What the file says.
    left_out
        Tiles that are not decoded but read as background; whoever reads adds to it.
    """

    facts: SlideFacts
    left_out: set[Cell]

    def read(self, level: int, region: Region) -> Pixels:
        """Read a region that lies inside a level's whole grid, as uint8 (h, w, 3) RGB.

        Raises
        ------
        TileError
            A tile that is not left out cannot be read.
        SlideError
            Nothing can be read.
        """
        ...

    def close(self) -> None:
        """Give the file back."""
        ...


def true_downsample(size_l0: Size, size: Size) -> float:
    """Find by how much a level is reduced.

    A scanner halves and rounds the size, so the ratio of sizes is 2.0005 where 2 is meant; over a
    wide slide the difference would move pixels. A whole number that explains both sides within
    one pixel is taken, else the ratio.
    """
    ratio = (size_l0.width_px / size.width_px + size_l0.height_px / size.height_px) / 2
    whole = max(1, round(ratio))
    explained = all(
        abs(side_l0 / whole - side) < 1.0 for side_l0, side in zip(size_l0, size, strict=True)
    )
    return float(whole) if explained else ratio


def check_sizes(path: Path, sizes: list[Size]) -> None:
    """Refuse levels without pixels, or with sides that no slide has.

    Raises
    ------
    SlideError
        A side below 1 or above 2^31 - 1 px.
    """
    for size in sizes:
        if not all(1 <= side_px <= LARGEST_SIDE_PX for side_px in size):
            raise SlideError(f"Slide {path} is damaged: a level of {size} cannot be.")
