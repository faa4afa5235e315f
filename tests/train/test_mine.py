"""Losses and readings on given scores, pairs inside an image, and stage 2 as a whole.

Whether the estimator finds the truth is asked in `test_mine_truth.py`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from msgspec import structs
from torch.nn import functional as F

from wsi_stain.config import CriticSpec, DataConfig, TrainConfig
from wsi_stain.errors import ConfigError
from wsi_stain.train.data import ImageSet
from wsi_stain.train.feed import Feed
from wsi_stain.train.images import TrainImage
from wsi_stain.train.mine import (
    MineStage,
    dv_estimate,
    map_scales,
    mi_loss,
    nce_estimate,
    pair_scores,
)
from wsi_stain.translate.guidance import roll_offsets
from wsi_stain.translate.maps import gradient_map
from wsi_stain.translate.networks import Critic

LOSSES = ("smile", "mine", "nce")


# ---- losses and readings on given numbers ---------------------------------------------------


def test_losses_equal_their_formulas_when_given_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    joint, marginal = torch.randn(5, generator=generator), torch.randn(3, 5, generator=generator)
    js = torch.log1p(torch.exp(-joint)).mean() + torch.log1p(torch.exp(marginal)).mean()
    torch.testing.assert_close(mi_loss(joint, marginal, "smile"), js)
    dv = -(joint.mean() - marginal.exp().mean().log())
    torch.testing.assert_close(mi_loss(joint, marginal, "mine"), dv)
    logits = torch.cat([joint[None], marginal]).T
    entropy = F.cross_entropy(logits, torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(mi_loss(joint, marginal, "nce"), entropy - math.log(4.0))


def test_mine_gradient_divides_by_the_running_mean_when_given() -> None:
    joint = torch.zeros(4, requires_grad=True)
    marginal = torch.tensor([[0.0, 1.0, -1.0, 2.0]], requires_grad=True)
    running = torch.zeros(())
    mi_loss(joint, marginal, "mine", running)
    mean = float(marginal.detach().exp().mean())
    assert float(running) == pytest.approx(mean)  # the first batch sets it
    running.fill_(10.0)
    loss = mi_loss(joint, marginal, "mine", running)
    expected = 10.0 + 0.01 * (mean - 10.0)
    assert float(running) == pytest.approx(expected)
    g_joint, g_marginal = torch.autograd.grad(loss, (joint, marginal))
    torch.testing.assert_close(g_joint, torch.full((4,), -0.25))
    torch.testing.assert_close(g_marginal, marginal.detach().exp() / 4.0 / expected)


def test_dv_reads_the_formula_when_scores_are_given() -> None:
    joint, marginal = torch.tensor([1.0, 3.0]), torch.tensor([[0.0, 1.0], [2.0, -1.0]])
    expected = 2.0 - math.log(sum(math.exp(v) for v in (0, 1, 2, -1)) / 4.0)
    assert dv_estimate(joint, marginal) == pytest.approx(expected)
    assert dv_estimate(joint, marginal + 100.0) == pytest.approx(2.0 - 5.0)
    assert dv_estimate(joint, marginal + 100.0, clip_nats=None) == pytest.approx(expected - 100.0)


@pytest.mark.parametrize("k", [1, 7, 63])
def test_nce_never_passes_its_ceiling_when_the_critic_is_sure(k: int) -> None:
    joint = torch.full((10,), 50.0)
    marginal = torch.full((k, 10), -50.0)
    assert nce_estimate(joint, marginal) == pytest.approx(math.log(k + 1))
    generator = torch.Generator().manual_seed(k)
    for spread in (0.1, 3.0, 30.0):
        wild = spread * torch.randn(k + 1, 10, generator=generator)
        assert nce_estimate(wild[0], wild[1:]) <= math.log(k + 1) + 1e-5


def test_bounded_critic_reads_at_most_twice_tau_when_it_is_sure() -> None:
    critic = Critic(CriticSpec(channels=(8, 8, 8), embed=4, tau=2.0))
    dots = torch.tensor([1e4, -1e4])
    high, low = critic.bound(dots)
    assert dv_estimate(high.expand(10), low.expand(3, 10)) == pytest.approx(4.0, abs=1e-4)


def test_estimates_are_zero_when_scores_say_nothing() -> None:
    joint, marginal = torch.zeros(6), torch.zeros(4, 6)
    assert dv_estimate(joint, marginal) == pytest.approx(0.0)
    assert nce_estimate(joint, marginal) == pytest.approx(0.0)
    assert float(mi_loss(joint, marginal, "smile")) == pytest.approx(2.0 * math.log(2.0))


# ---- pairs inside an image ------------------------------------------------------------------


def _critic(negatives: int = 8, embed: int = 5) -> Critic:
    return Critic(CriticSpec(channels=(8, 8, 8), embed=embed, negatives=negatives))


def test_pairs_equal_explicit_rolls_when_scored() -> None:
    critic = _critic()
    a, b = torch.randn(2, 5, 18, 18), torch.randn(2, 5, 18, 18)
    joint, marginal = pair_scores(critic, a, b)
    a, b = a[..., 3:15, 3:15], b[..., 3:15, 3:15]
    torch.testing.assert_close(joint, critic.score(a, b).flatten())
    offsets = roll_offsets(12, 8)
    assert marginal.shape == (len(offsets), 2 * 144)
    for row, offset in zip(marginal, offsets, strict=True):
        # torch.roll moves places forward: the map at p meets the picture at p - offset.
        torch.testing.assert_close(row, critic.score(a, b.roll(offset, (2, 3))).flatten())


def test_pairs_stay_inside_the_image_when_batched() -> None:
    critic = _critic()
    a, b = torch.randn(3, 5, 18, 18), torch.randn(3, 5, 18, 18)
    joint, marginal = pair_scores(critic, a, b)
    alone, alone_marginal = pair_scores(critic, a[1:2], b[1:2])
    torch.testing.assert_close(joint[144:288], alone)
    torch.testing.assert_close(marginal[:, 144:288], alone_marginal)


def test_nce_is_blind_to_the_map_but_not_to_the_picture_when_anchored() -> None:
    # The other way round, the picture's gradient would hold an arbitrary function of the picture.
    class Plain(Critic):
        def bound(self, dot: torch.Tensor) -> torch.Tensor:
            return dot

    critic = Plain(CriticSpec(channels=(8, 8, 8), embed=6, negatives=8))
    a, b, c = torch.randn(1, 5, 18, 18), torch.randn(1, 5, 18, 18), torch.randn(1, 1, 18, 18)
    one, zero = torch.ones_like(c), torch.zeros_like(c)

    def loss(of_map: torch.Tensor, of_picture: torch.Tensor) -> float:
        left = torch.cat([a, of_map, one], dim=1)
        right = torch.cat([b, one, of_picture], dim=1)
        return float(mi_loss(*pair_scores(critic, left, right), "nce"))

    assert loss(3.0 * c, zero) == pytest.approx(loss(zero, zero), abs=1e-4)
    assert abs(loss(zero, 3.0 * c) - loss(zero, zero)) > 0.1


def test_map_scales_equal_the_percentile_when_measured() -> None:
    y_0 = 0.3 * torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    y_0[1] *= 2.0
    scales = map_scales(y_0, "sobel")
    assert scales.shape == (2, 1, 1, 1)
    for i in range(2):
        values = gradient_map(y_0[i : i + 1], "sobel").numpy()
        assert float(scales[i]) == pytest.approx(float(np.percentile(values, 99.0)), rel=1e-4)
    assert float(map_scales(torch.zeros(1, 3, 8, 8), "sobel")) == pytest.approx(1e-3)


# ---- the stage ------------------------------------------------------------------------------


@pytest.fixture
def config() -> TrainConfig:
    """Small critic on crops of 144 px, the smallest that have far places inside."""
    return TrainConfig(
        stage="mine",
        bundle="none",
        data=DataConfig(root=".", crop_px=144),
        batch=2,
        focus_step=300,
        critic=CriticSpec(channels=(16, 24, 24), embed=16, negatives=16),
    )


def test_held_out_steps_are_those_trained_when_evaluated(
    config: TrainConfig, tissue_144: ImageSet
) -> None:
    stage = MineStage(config, tissue_144, tissue_144, torch.device("cpu"))
    values = stage.evaluate()
    assert list(values) == [f"nats_{t}" for t in (10, 40, 80, 150, 220, 300)]
    assert all(math.isfinite(value) for value in values.values())
    assert stage.evaluate() == values


@pytest.mark.parametrize("kind", LOSSES)
def test_reading_fits_the_loss_when_scores_depend_on_the_map_alone(
    kind: Literal["nce", "smile", "mine"],
    config: TrainConfig,
    tissue_144: ImageSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    critic = structs.replace(config.critic, loss=kind)
    stage = MineStage(
        structs.replace(config, critic=critic), tissue_144, tissue_144, torch.device("cpu")
    )
    own = torch.tensor([0.0, 5.0]).repeat(50)
    monkeypatch.setattr(stage, "scores", lambda *_: (own, own.expand(16, -1)))
    # Such scores know nothing. InfoNCE says so; Donsker-Varadhan would read 2.5 - ln E e^f.
    dv = 2.5 - math.log((1.0 + math.exp(5.0)) / 2.0)
    assert dv < -1.5
    expected = 0.0 if kind == "nce" else dv
    assert stage.evaluate()["nats_40"] == pytest.approx(expected, abs=1e-5)
    assert set(stage.memory) == ({"running"} if kind == "mine" else set())


def test_small_crops_are_refused_when_no_roll_is_far_enough(
    config: TrainConfig, tissue_144: ImageSet
) -> None:
    small = ImageSet(tissue_144.images, structs.replace(config.data, crop_px=128))
    stage = MineStage(config, small, small, torch.device("cpu"))
    with pytest.raises(ConfigError, match="at least 144 px"):
        stage.loss(*Feed(stage.draw, np.random.SeedSequence, 0).take(0), torch.Generator())


def _train(config: TrainConfig, images: ImageSet, held_out: ImageSet, steps: int) -> MineStage:
    stage = MineStage(config, images, held_out, torch.device("cpu"))
    optimizer = torch.optim.Adam(stage.net.parameters(), lr=2e-3)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        stage.loss(stage.draw(rng), rng, generator).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return stage


def test_nothing_is_learned_when_pictures_are_blank(config: TrainConfig) -> None:
    # Noise on a flat picture holds no structure; a critic that meets the padding of its
    # convolutions reads 1.4 nats after 80 steps, for it knows the places along the border.
    flat = TrainImage(Path("flat.png"), "ihc/flat", "CC0", np.full((160, 160, 3), 180, np.uint8))
    images = ImageSet([flat], structs.replace(config.data, stain_jitter=0.0))
    values = _train(config, images, images, steps=80).evaluate()
    assert max(values.values()) < 0.05


@pytest.mark.slow
def test_structure_is_learned_and_falls_with_noise_when_trained(
    config: TrainConfig, tissue_144: ImageSet
) -> None:
    values = _train(config, tissue_144, tissue_144, steps=300).evaluate()
    assert values["nats_40"] > 0.3
    assert values["nats_40"] > values["nats_150"] > values["nats_300"]
