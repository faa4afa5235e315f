"""Room 3 of 4: what a tile costs, in floating-point operations counted on the nets themselves.

In: a loaded bundle, a solver. Out: numbers. Not here: seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from wsi_stain.config import GuidanceSpec, SolverSpec
from wsi_stain.translate.bundle import ModelBundle
from wsi_stain.translate.sampler import Sampler, View
from wsi_stain.translate.structure import edge_map

__all__ = ["TileCost", "count_tile_flop"]


@dataclass(frozen=True)
class TileCost:
    """Cost of one tile.

    Attributes
    ----------
    flop
        All convolutions and matrix products, guidance and its gradients too; a multiplication
        and an addition are two.
    net_flop
        Those of score net or student alone.
    evaluations
        How often that net runs.
    """

    flop: int
    net_flop: int
    evaluations: int


def count_tile_flop(
    bundle: ModelBundle, solver: SolverSpec, guidance: GuidanceSpec | None
) -> TileCost:
    """Count the operations of one tile of the bundle's size.

    Parameters
    ----------
    bundle
        Loaded model, on any device.
    solver, guidance
        As `resolve_sampling` gives them; a `StudentSpec` counts the student.

    Returns
    -------
    TileCost
        Zeros for the identity bundle.

    Raises
    ------
    BundleError
        The bundle lacks a net that is asked for.

    Notes
    -----
    A term of the guidance acts below one level and not above, so a step costs the more the lower
    it lies. Steps between two of equal cost are not run: 300 steps take about ten evaluations.
    """
    sampler = bundle.sampler(solver, guidance)
    if sampler is None:
        return TileCost(0, 0, 0)
    side_px = bundle.spec.tile_px
    blank = torch.zeros(1, 3, side_px, side_px, device=bundle.device)
    view = View(blank, edge_map(blank), lambda _: blank, 1.0)
    levels = sampler.grid[:-1]
    costs: dict[int, int] = {}
    flop = _sum_costs(sampler, view, levels, costs, 0, len(levels) - 1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ones = torch.ones(1, device=bundle.device)
        sampler.look(blank, ones, ones, view)
    return TileCost(flop, counter.get_total_flops() * len(levels), len(levels))


def _sum_costs(
    sampler: Sampler, view: View, levels: list[int], costs: dict[int, int], first: int, last: int
) -> int:
    """Sum the costs of levels first..last; where both ends cost the same, so does all between."""
    low, high = (_cost(sampler, view, levels[i], costs) for i in (first, last))
    if low == high or last - first <= 1:
        inner = (last - first - 1) * low
        return low + inner + high if last > first else low
    middle = (first + last) // 2
    return _sum_costs(sampler, view, levels, costs, first, middle) + _sum_costs(
        sampler, view, levels, costs, middle + 1, last
    )


def _cost(sampler: Sampler, view: View, level: int, costs: dict[int, int]) -> int:
    if level not in costs:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            sampler.clean_estimate(view.x_0, level, level - 1, view)
        costs[level] = counter.get_total_flops()
    return costs[level]
