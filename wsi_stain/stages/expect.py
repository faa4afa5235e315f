"""What the finished pyramid must show, told from the slide.

In: a plan. Out: an `Expected`. Not here: the check itself (`write/validate`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from wsi_stain.geometry import Region
from wsi_stain.planning import SlidePlan
from wsi_stain.slides.mask import TissueMask
from wsi_stain.slides.missing import MissingTile, scaled
from wsi_stain.stain.density import is_stained
from wsi_stain.write.validate import Expected

__all__ = ["expectation", "shown_by_tiles"]

PROBES = 24
PROBE_PX = 128
# What the overview takes for wholly tissue, or bare glass, is so at full size but for fibers and
# dust; beyond these shares of stained pixels the two show something else.
TISSUE_FROM, GLASS_TO = 0.25, 0.02


def expectation(plan: SlidePlan, missing: Iterable[MissingTile] = ()) -> Expected:
    """Say what the pyramid must show: stained where the H&E is, white where it is bare glass.

    Nothing is expected where the slide has tiles that could not be read.
    """
    grid = plan.grid
    size = grid.scale.size_out
    stained = is_stained(plan.thumbnail_rgb, plan.glass.rgb)
    tissue = replace(plan.mask, pixels=plan.mask.pixels & stained)
    glass = replace(plan.mask, pixels=~(plan.mask.pixels | stained))
    boxes = [
        Region(x_px, y_px, PROBE_PX, PROBE_PX)
        for y_px in _spread(size.height_px)
        for x_px in _spread(size.width_px)
    ]
    holes = [tile.region_l0 for tile in missing]
    boxes = [box for box in boxes if not scaled(box, grid.scale.factor).touches_any(holes)]
    full = _wholly(tissue, boxes, grid.scale.factor)
    empty = _wholly(glass, boxes, grid.scale.factor)
    return Expected(
        size=size,
        mpp_out=grid.scale.mpp_out,
        tissue=tuple(full[:: max(1, len(full) // PROBES)]),
        glass=tuple(empty[:: max(1, len(empty) // PROBES)]),
        white=plan.spec.color.output_white,
    )


def shown_by_tiles(plan: SlidePlan, expected: Expected) -> Expected:
    """Keep the regions where the H&E at full size shows what its overview promised.

    A damaged tile that still decodes, or an overview of other content, is the slide's fault and
    not the pyramid's.
    """

    def stained(region: Region) -> float:
        he = plan.source.read_out(region, plan.grid.scale)
        return float(is_stained(he, plan.glass.rgb).mean())

    return replace(
        expected,
        tissue=tuple(region for region in expected.tissue if stained(region) >= TISSUE_FROM),
        glass=tuple(region for region in expected.glass if stained(region) <= GLASS_TO),
    )


def _wholly(mask: TissueMask, boxes: list[Region], factor: float) -> list[Region]:
    """Give the boxes that lie wholly on a mask; all are looked up at once."""
    corners = np.array([[b.x_px, b.y_px, b.right_px, b.bottom_px] for b in boxes])
    shares = mask.fractions(corners, factor)
    return [box for box, share in zip(boxes, shares, strict=True) if share >= 1.0]


def _spread(side_px: int) -> list[int]:
    """Give starts of probes spread over a side."""
    last = max(0, side_px - PROBE_PX)
    return sorted({round(last * i / 24) for i in range(25)})
