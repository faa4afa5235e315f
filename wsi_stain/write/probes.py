"""Looks at some pixels of a pyramid, whatever its format: do the levels agree, is stain there?

Room 4 of 4. In: readers of levels, what the file should show. Out: problems, one line each. Not
here: opening files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from wsi_stain.geometry import Region, Size
from wsi_stain.write import checks
from wsi_stain.write.levels import halve

__all__ = [
    "PROBE_LIMIT",
    "Expected",
    "LevelPixels",
    "Validation",
    "check_content",
    "check_levels_agree",
    "difference",
    "probes",
]

Pixels = npt.NDArray[np.uint8]

PROBE_PX = 64  # side of the region that is compared between readers and levels
BLOCK_PX = 16
# Of block means, grey levels. JPEG is off by 0.6 (quality 90) to 8 (quality 1), another place in
# tissue by 20 and more.
PROBE_LIMIT = 9.0


@dataclass(frozen=True)
class Expected:
    """What the file should show; `None` and empty mean: not known.

    Attributes
    ----------
    size
        Size of level 0, px.
    mpp_out
        Pixel size, um/px.
    tissue
        Regions of level 0, px, that are mostly tissue.
    glass
        Regions of level 0, px, that are bare glass.
    white
        Color of glass, 0..255.
    """

    size: Size | None = None
    mpp_out: float | None = None
    tissue: tuple[Region, ...] = ()
    glass: tuple[Region, ...] = ()
    white: tuple[float, float, float] = (255.0, 255.0, 255.0)


@dataclass(frozen=True)
class Validation:
    """Verdict on a file.

    Attributes
    ----------
    ok
        No problem was found.
    problems
        One line each.
    facts
        What was seen, ready for JSON.
    """

    ok: bool
    problems: tuple[str, ...]
    facts: dict[str, Any]


class LevelPixels(Protocol):
    """One level of a pyramid whose regions can be read."""

    @property
    def size(self) -> Size:
        """Size, px."""
        ...

    def region(self, region: Region) -> Pixels:
        """Read a region, clipped to the level, uint8 (h, w, 3)."""
        ...


def check_levels_agree(levels: Sequence[LevelPixels]) -> Iterator[str]:
    """Check that each level shows the mean of the one below, at a few places."""
    for number, (below, level) in enumerate(pairwise(levels), start=1):
        for probe in probes(level.size):
            double = Region(*(2 * value for value in probe))
            seen, true = level.region(probe), halve(below.region(double))
            off = difference(seen, true)
            if off > PROBE_LIMIT:
                yield (
                    f"level {number} does not show level {number - 1} at x {probe.x_px}, "
                    f"y {probe.y_px}: mean difference {off:.0f} grey levels"
                )
                break


def check_content(level: LevelPixels, asked: Expected, facts: dict[str, Any]) -> Iterator[str]:
    """Check that tissue shows stain and glass does not."""
    facts["tissue_regions"], facts["glass_regions"] = len(asked.tissue), len(asked.glass)
    for region in asked.tissue:
        yield from checks.check_tissue(region, level.region(region), asked.white)
    for region in asked.glass:
        yield from checks.check_glass(region, level.region(region), asked.white)


def probes(size: Size) -> list[Region]:
    """Give small regions on the diagonal of a level, inside of it."""
    side_px = min(PROBE_PX, *size)
    return [
        Region(
            int((size.width_px - side_px) * share),
            int((size.height_px - side_px) * share),
            side_px,
            side_px,
        )
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]


def difference(left: Pixels, right: Pixels) -> float:
    """Compare two pictures by the means of small blocks, which JPEG keeps; grey levels."""
    if left.shape != right.shape:
        return 255.0
    rows, columns = (range(0, side_px, BLOCK_PX) for side_px in left.shape[:2])
    off = left.astype(np.float64) - right
    blocks = np.add.reduceat(np.add.reduceat(off, rows, axis=0), columns, axis=1)
    return float(np.abs(blocks).sum() / off.size)
