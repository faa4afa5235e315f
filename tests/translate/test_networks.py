"""The nets: what they are before training, and that no place depends on the tile's frame."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from msgspec import structs

from wsi_stain.config import CriticSpec, HeadsSpec, NetSpec
from wsi_stain.translate.networks import (
    ContrastHeads,
    Critic,
    NoiseLevel,
    PositionNorm,
    ScoreNet,
)
from wsi_stain.translate.noise import Schedule

SPEC = NetSpec(channels=(16, 16), blocks=1, data_mean=(0.6, 0.5, 0.7), data_sd=0.3)


def _levels(schedule: Schedule, *steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    alpha, sigma = schedule.tables()
    return alpha[list(steps)], sigma[list(steps)]


def test_untrained_net_is_the_linear_denoiser_when_called(schedule: Schedule) -> None:
    net = ScoreNet(SPEC)
    alpha, sigma = _levels(schedule, 10, 300)
    y_t = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean = torch.tensor(SPEC.data_mean).view(1, 3, 1, 1)
    a, s = alpha.view(2, 1, 1, 1), sigma.view(2, 1, 1, 1)
    # Posterior mean of N(mean, sd^2) data seen as alpha y + sigma eps.
    gain = a * SPEC.data_sd**2 / (a**2 * SPEC.data_sd**2 + s**2)
    expected = mean + gain * (y_t - a * mean)
    torch.testing.assert_close(net.denoise(y_t, alpha, sigma), expected, rtol=1e-5, atol=1e-5)


def test_noise_prediction_is_the_inner_net_when_not_preconditioned(schedule: Schedule) -> None:
    net = ScoreNet(structs.replace(SPEC, predict="noise"))
    torch.nn.init.normal_(net.tail.weight, std=0.1)
    alpha, sigma = _levels(schedule, 150)
    y_t = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        eps = net.inner(y_t, torch.log(sigma / alpha))
        y0_hat = net.denoise(y_t, alpha, sigma)
    assert float(eps.std()) > 0.01
    torch.testing.assert_close(y0_hat, (y_t - sigma * eps) / alpha, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["position", "group"])
def test_one_level_for_all_is_the_level_of_each(
    norm: Literal["position", "group"], schedule: Schedule
) -> None:
    torch.manual_seed(0)
    net = ScoreNet(structs.replace(SPEC, norm=norm))
    with torch.no_grad():
        for weights in net.parameters():
            weights.add_(0.05 * torch.randn_like(weights))
    y_t = torch.randn(3, 3, 32, 32)
    one, each = _levels(schedule, 80), _levels(schedule, 80, 80, 80)
    learning = net.denoise(y_t, *one)
    gradients = torch.autograd.grad(learning.square().mean(), list(net.parameters()))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    with torch.no_grad():
        for levels in (one, each):
            torch.testing.assert_close(net.denoise(y_t, *levels), learning.detach())


def test_position_norm_equals_the_formula_when_weighted() -> None:
    norm = PositionNorm(7)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2.0, 7))
    x = 3.0 + 2.0 * torch.randn(2, 7, 4, 5, generator=torch.Generator().manual_seed(0))
    centered = x - x.mean(dim=1, keepdim=True)
    spread = (centered.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
    expected = centered / spread * norm.weight.view(1, 7, 1, 1)
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize(("norm", "agrees"), [("position", True), ("group", False)])
def test_interior_depends_on_the_window_when_norm_is_group(
    norm: Literal["position", "group"], agrees: bool, schedule: Schedule
) -> None:
    spec = NetSpec(channels=(16, 16, 16), blocks=1, norm=norm)
    net = ScoreNet(spec)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) / p[0].numel() ** 0.5)
    alpha, sigma = _levels(schedule, 80)
    # The radius of this net is below 240 px: the center of 512 px sees no border.
    canvas = torch.randn(1, 3, 528, 528, generator=generator)
    canvas[:, :, :100] += 4.0  # something for a window's statistics to see
    with torch.inference_mode():
        low = net.denoise(canvas[:, :, :512, :512], alpha, sigma)
        high = net.denoise(canvas[:, :, 16:, 16:], alpha, sigma)
    difference = (low[:, :, 16:, 16:] - high[:, :, :496, :496])[:, :, 240:256, 240:256]
    worst = float(difference.abs().max())
    assert (worst < 1e-4) is agrees, worst


def test_gradient_reaches_no_other_tile_when_batched(
    tiny_score: ScoreNet, schedule: Schedule
) -> None:
    alpha, sigma = _levels(schedule, 40, 40)
    y_t = torch.randn(2, 3, 64, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(tiny_score.denoise(y_t, alpha, sigma)[0].sum(), y_t)
    assert float(gradient[0].abs().max()) > 0.0
    assert float(gradient[1].abs().max()) == 0.0


@pytest.mark.parametrize("unshuffle_px", [1, 2, 4, 8])
def test_shapes_follow_the_spec_when_built(
    unshuffle_px: Literal[1, 2, 4, 8], schedule: Schedule
) -> None:
    spec = NetSpec(channels=(16, 32, 16), blocks=2, unshuffle_px=unshuffle_px)
    net = ScoreNet(spec)
    alpha, sigma = _levels(schedule, 5)
    y_t = torch.zeros(1, 3, 64, 96)
    assert net.denoise(y_t, alpha, sigma).shape == y_t.shape
    shapes = [tuple(f.shape) for f in net.features(y_t, alpha, sigma)]
    rows, cols = 64 // unshuffle_px, 96 // unshuffle_px
    expected = [(1, c, rows >> i, cols >> i) for i, c in enumerate(spec.channels)]
    assert shapes == expected


def test_score_is_bounded_by_tau_when_embeddings_are_huge() -> None:
    critic = Critic(CriticSpec(channels=(8, 8, 8), embed=4, tau=5.0))
    a = 1e3 * torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    scores = critic.score(a, a.flip(0))
    assert float(scores.abs().max()) <= 5.0
    assert float(scores.max()) > 4.9
    assert float(scores.min()) < -4.9


def test_score_equals_the_scaled_product_when_small() -> None:
    critic = Critic(CriticSpec(channels=(8, 8, 8), embed=4))
    a, b = torch.full((1, 4, 1, 1), 0.1), torch.full((1, 4, 1, 1), 0.2)
    assert float(critic.score(a, b)) == pytest.approx(4 * 0.02 / 2.0, rel=1e-4)


def test_critic_sees_44_px_when_a_pixel_changes(tiny_critic: Critic) -> None:
    level = torch.zeros(1)
    y = torch.zeros(1, 3, 128, 128, requires_grad=True)
    middle = tiny_critic.embed_picture(y, level)[0, :, 8, 8].sum()
    (gradient,) = torch.autograd.grad(middle, y)
    seen = (gradient.abs().amax(dim=(0, 1)) > 0).nonzero()
    span = seen.max(dim=0).values - seen.min(dim=0).values + 1
    assert span.tolist() == [44, 44]


def test_heads_give_unit_vectors_when_called() -> None:
    heads = ContrastHeads(HeadsSpec(embed=8), (16, 32))
    out = heads(1, torch.randn(2, 5, 32))
    assert out.shape == (2, 5, 8)
    torch.testing.assert_close(out.norm(dim=-1), torch.ones(2, 5))


def test_noise_level_tells_neighbors_apart_when_steps_are_close(schedule: Schedule) -> None:
    level = NoiseLevel(64)
    steps = torch.arange(1, 301)
    alpha, sigma = schedule.tables()
    log_noise = torch.log(sigma[steps] / alpha[steps])
    phase = log_noise[:, None] * level.frequencies
    codes = torch.cat([phase.cos(), phase.sin()], dim=1)
    gaps = (codes[1:] - codes[:-1]).norm(dim=1)
    assert float(gaps.min()) > 0.05


def test_lowered_net_agrees_when_run_in_bfloat16(schedule: Schedule) -> None:
    torch.manual_seed(0)
    net, low = ScoreNet(SPEC), ScoreNet(SPEC)
    torch.nn.init.normal_(net.tail.weight, std=0.05)
    low.load_state_dict(net.state_dict())
    low.lower(torch.bfloat16)
    assert low.head.weight.dtype == torch.bfloat16
    # In bfloat16 these would be wrong by up to 0.3 rad in phase, and the mean by 0.1 grey levels.
    assert torch.equal(low.level.frequencies, net.level.frequencies)
    assert torch.equal(low.mean, net.mean)
    alpha, sigma = _levels(schedule, 1, 300)
    y_t = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        exact, rough = net.denoise(y_t, alpha, sigma), low.denoise(y_t, alpha, sigma)
        features = zip(
            net.features(y_t, alpha, sigma), low.features(y_t, alpha, sigma), strict=True
        )
    assert rough.dtype == torch.float32
    assert float((exact - rough).abs().max()) < 0.02
    for a, b in features:
        assert float((a - b.float()).square().mean() / a.square().mean()) < 1e-3
