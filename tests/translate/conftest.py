"""Tiny bundles: small nets with random weights, saved and loaded the way real ones are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from wsi_stain.config import BundleSpec, CriticSpec, HeadsSpec, NetSpec
from wsi_stain.translate.bundle import save_nets
from wsi_stain.translate.networks import ContrastHeads, Critic, ScoreNet
from wsi_stain.translate.noise import Schedule

TINY_NET = NetSpec(channels=(16, 16, 32), blocks=1)
TINY_CRITIC = CriticSpec(channels=(8, 12, 16), embed=8, negatives=8)
TINY_HEADS = HeadsSpec(embed=8)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def schedule() -> Schedule:
    """The schedule that every bundle uses by default."""
    return Schedule()


def random_net(net: nn.Module, seed: int) -> nn.Module:
    """Fill every weight: freshly made nets are linear, since their last layers are zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim > 1:
                fan = p[0].numel()
                p.copy_(torch.randn(p.shape, generator=generator) / fan**0.5)
            elif name.endswith("bias"):
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_score() -> ScoreNet:
    """Score net of 16..32 channels with every weight random; does not denoise."""
    net = random_net(ScoreNet(TINY_NET), seed=0)
    assert isinstance(net, ScoreNet)
    return net


@pytest.fixture(scope="session")
def tiny_critic() -> Critic:
    """Critic with every weight random."""
    net = random_net(Critic(TINY_CRITIC), seed=1)
    assert isinstance(net, Critic)
    return net


@pytest.fixture(scope="session")
def tiny_heads() -> ContrastHeads:
    """Heads with every weight random."""
    net = random_net(ContrastHeads(TINY_HEADS, TINY_NET.channels), seed=2)
    assert isinstance(net, ContrastHeads)
    return net


SaveBundle = Callable[[Path], Path]


@pytest.fixture(scope="session")
def save_tiny_bundle(
    tiny_score: ScoreNet, tiny_critic: Critic, tiny_heads: ContrastHeads
) -> SaveBundle:
    """Give the function that writes the tiny bundle into a folder and gives the folder."""

    def save(folder: Path) -> Path:
        spec = BundleSpec(
            name="tiny",
            marker="Ki-67",
            tile_px=96,
            net=TINY_NET,
            critic=TINY_CRITIC,
            heads=TINY_HEADS,
        )
        nets = {"score": tiny_score, "critic": tiny_critic, "heads": tiny_heads}
        save_nets(folder, spec, {part: dict(net.named_parameters()) for part, net in nets.items()})
        return folder

    return save


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory, save_tiny_bundle: SaveBundle) -> Path:
    """Folder of the tiny bundle: all three nets, tiles of 96 px."""
    return save_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="session")
def identity_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a bundle without nets: its output is the start image."""
    folder = tmp_path_factory.mktemp("bundles") / "identity"
    save_nets(folder, BundleSpec(name="identity", marker="none", tile_px=96), {})
    return folder
