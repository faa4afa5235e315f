"""Counted operations equal those added up by hand, layer by layer and level by level."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from msgspec import structs
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from wsi_stain.config import BundleSpec, GuidanceSpec, NetSpec, SolverSpec, StudentSpec
from wsi_stain.translate.bundle import ModelBundle, load_bundle, save_nets
from wsi_stain.translate.cost import TileCost, count_tile_flop
from wsi_stain.translate.networks import ScoreNet
from wsi_stain.translate.sampler import View
from wsi_stain.translate.structure import edge_map
from wsi_stain.translate.student import student_net

CPU = torch.device("cpu")
NET = NetSpec(channels=(16, 32), blocks=1)
FOUR = SolverSpec(steps=4, start_step=200)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    """Score net and student, tiles of 64 px."""
    folder = tmp_path_factory.mktemp("bundles") / "b"
    spec = BundleSpec(name="b", marker="x", tile_px=64, net=NET, student=StudentSpec())
    nets = {"score": ScoreNet(NET), "student": student_net(NET)}
    save_nets(folder, spec, {part: dict(net.named_parameters()) for part, net in nets.items()})
    return load_bundle(str(folder), CPU)


def _by_hand(net: ScoreNet, side_px: int) -> int:
    """Add up 2 x inputs x outputs of every layer, seen through hooks."""
    total = 0

    def count(layer: nn.Module, _: object, out: torch.Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            total += 2 * layer.weight[0].numel() * out.numel()
        elif isinstance(layer, nn.Linear):
            total += 2 * layer.in_features * out.numel()

    handles = [layer.register_forward_hook(count) for layer in net.modules()]
    ones, channels = torch.ones(1), net.head.weight.shape[1] // 16 - 3
    context = torch.zeros(1, channels, side_px, side_px) if channels else None
    with torch.no_grad():
        net.denoise(torch.zeros(1, 3, side_px, side_px), ones, ones, context)
    for handle in handles:
        handle.remove()
    return total


def test_flop_equal_those_by_hand_when_unguided(bundle: ModelBundle) -> None:
    assert bundle.score is not None
    once = _by_hand(bundle.score, 64)
    assert once > 1_000_000
    for steps in (1, 4, 30):
        solver = structs.replace(FOUR, steps=steps)
        assert count_tile_flop(bundle, solver, None) == TileCost(steps * once, steps * once, steps)


def test_flop_equal_those_by_hand_when_student(bundle: ModelBundle) -> None:
    assert bundle.student is not None
    assert bundle.score is not None
    once = _by_hand(bundle.student, 64)
    found = count_tile_flop(bundle, StudentSpec(steps=2, start_step=100), None)
    assert found == TileCost(2 * once, 2 * once, 2)
    assert once > _by_hand(bundle.score, 64)


@pytest.mark.parametrize("below", [0, 40, 77, 300])
def test_skipped_levels_are_counted_when_a_term_acts_on_few(tiny_bundle: Path, below: int) -> None:
    tiny = load_bundle(str(tiny_bundle), CPU)
    spec = GuidanceSpec(structure_scale=0.0, entropy="none", contrast_below_step=below)
    solver = SolverSpec(steps=8, start_step=100)
    sampler = tiny.sampler(solver, spec)
    assert sampler is not None
    blank = torch.zeros(1, 3, 96, 96)
    view = View(blank, edge_map(blank), lambda _: blank, 1.0)
    total = 0
    for level in sampler.grid[:-1]:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            sampler.clean_estimate(blank, level, level - 1, view)
        total += counter.get_total_flops()
    found = count_tile_flop(tiny, solver, spec)
    assert found.flop == total
    assert found.net_flop <= found.flop
    assert (found.net_flop < found.flop) == (below > 0)


def test_identity_costs_nothing(identity_bundle: Path) -> None:
    bundle = load_bundle(str(identity_bundle), CPU)
    assert count_tile_flop(bundle, FOUR, None) == TileCost(0, 0, 0)
