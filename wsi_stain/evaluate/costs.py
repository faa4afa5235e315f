"""What a method costs beside what it reaches: operations counted, seconds measured.

In: painters, rows. Out: a table. Not here: counting (`translate/cost`), timing (`judge`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from wsi_stain.config import resolve_sampling
from wsi_stain.evaluate.paint import ModelPainter, Painter
from wsi_stain.evaluate.rows import Row
from wsi_stain.translate.cost import TileCost, count_tile_flop

__all__ = ["MethodCost", "costs_markdown", "method_costs"]


class MethodCost(NamedTuple):
    """Cost of one variant.

    Attributes
    ----------
    method
        Its name.
    tile
        Operations of one tile of the bundle's size.
    tile_s
        Seconds to paint the area of one tile, everything included: mean over all rows.
    """

    method: str
    tile: TileCost
    tile_s: float


def method_costs(painters: Sequence[Painter], rows: Sequence[Row]) -> list[MethodCost]:
    """Give the cost of every variant; null rows run no net.

    Parameters
    ----------
    painters
        Methods of the evaluation.
    rows
        Their rows. Times of one table compare only where one idle machine made them.
    """
    costs = []
    for painter in painters:
        if not isinstance(painter, ModelPainter):
            continue
        spec = painter.bundle.spec
        ours = [row for row in rows if row.method == painter.name]
        tiles = sum(row.width_px * row.height_px for row in ours) / spec.tile_px**2
        tile = count_tile_flop(painter.bundle, *resolve_sampling(spec, painter.variant.sample))
        costs.append(MethodCost(painter.name, tile, sum(row.seconds for row in ours) / tiles))
    return costs


def costs_markdown(costs: Sequence[MethodCost]) -> str:
    """Write the table of costs; times less is relative to the first variant."""
    lines = [
        "## Cost of a tile",
        "",
        "| method | evaluations | GFLOP | less than the first | seconds |",
        "|---|---|---|---|---|",
    ]
    for cost in costs:
        flop, first = cost.tile.flop, costs[0].tile.flop
        less = f"{first / flop:.1f} x" if flop else "-"
        lines.append(
            f"| {cost.method} | {cost.tile.evaluations} | {flop / 1e9:.3g} | {less} "
            f"| {cost.tile_s:.3g} |"
        )
    return "\n".join(lines) + "\n"
