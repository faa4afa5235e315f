"""Guidance terms against closed forms and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import torch
from msgspec import structs
from torch.nn import functional as F

from wsi_stain.config import CriticSpec, GuidanceSpec, HeadsSpec, SolverSpec
from wsi_stain.errors import ConfigError
from wsi_stain.translate.guidance import (
    Entropy,
    MutualInformation,
    PatchContrast,
    StepState,
    Sum,
    contrast_loss,
    inner_positions,
    roll_offsets,
)
from wsi_stain.translate.networks import ContrastHeads, Critic, ScoreNet
from wsi_stain.translate.noise import Schedule
from wsi_stain.translate.sampler import Sampler, View, plan_move

START_STEP = 300


def _randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _state(t: int, size_px: int = 96, n: int = 1) -> StepState:
    shape = (n, 3, size_px, size_px)
    return StepState(
        t=t,
        y_t=_randn(*shape, seed=1),
        y0_hat=0.3 * _randn(*shape, seed=3),
        start=0.3 * _randn(*shape, seed=7),
        edges=_randn(n, 1, size_px, size_px, seed=6).abs(),
        draw_eps=lambda: _randn(*shape, seed=2),
        draw_x_t=lambda: _randn(*shape, seed=4),
        draw_g_t=lambda: _randn(n, 1, size_px, size_px, seed=5).abs(),
    )


def _slope(
    energy: Callable[[torch.Tensor], torch.Tensor], y: torch.Tensor, direction: torch.Tensor
) -> float:
    """Central difference of an energy along a direction, in float64 arithmetic of the quotient."""
    h = 1e-2
    with torch.no_grad():
        rise = energy(y + h * direction).double() - energy(y - h * direction).double()
    return float(rise) / (2.0 * h)


# ---- structure ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sign", "weight", "expected"),
    [
        ("as_written", "linear", {300: -1.0, 150: 0.0, 75: 0.5, 0: 1.0}),
        ("clamped", "linear", {300: 0.0, 150: 0.0, 75: 0.5, 0: 1.0}),
        ("constant", "linear", {300: 1.0, 150: 1.0, 75: 1.0, 0: 1.0}),
        ("as_written", 0.25, {300: 0.5, 1: 0.5}),
        ("as_written", 0.5, {300: 0.0, 1: 0.0}),
        ("as_written", 0.75, {300: -0.5, 1: -0.5}),
        ("clamped", 0.75, {300: 0.0, 1: 0.0}),
    ],
)
def test_structure_factor_equals_the_table_when_sign_and_weight_vary(
    sign: Literal["as_written", "clamped", "constant"],
    weight: Literal["linear"] | float,
    expected: dict[int, float],
    tiny_critic: Critic,
    schedule: Schedule,
) -> None:
    for energy_sign, flip in (("ascend", 1.0), ("descend", -1.0)):
        spec = GuidanceSpec(structure_sign=sign, weight=weight, structure_scale=2.0)
        spec = structs.replace(spec, energy_sign=energy_sign)
        term = MutualInformation(tiny_critic, schedule, spec, START_STEP)
        for t, factor in expected.items():
            assert term.factor(t) == pytest.approx(2.0 * flip * factor)


@pytest.mark.parametrize("energy", ["critic", "dv"])
@pytest.mark.parametrize("t", [10, 75])
def test_structure_gradient_equals_the_finite_difference_when_checked(
    energy: Literal["critic", "dv"], t: int, tiny_critic: Critic, schedule: Schedule
) -> None:
    spec = GuidanceSpec(energy=energy, structure_sign="constant", structure_scale=3.0)
    term = MutualInformation(tiny_critic, schedule, spec, START_STEP)
    state = _state(t)
    map_level = torch.tensor([-schedule.half_log_snr(max(t, spec.map_floor_step))])
    level = torch.tensor([-schedule.half_log_snr(t)])

    def total(y: torch.Tensor) -> torch.Tensor:
        g_wide, y_wide = (F.pad(v, (24, 24, 24, 24), mode="reflect") for v in (state.g_t, y))
        a = tiny_critic.embed_map(g_wide, map_level)[..., 3:15, 3:15]
        b = tiny_critic.embed_picture(y_wide, level)[..., 3:15, 3:15]
        return term.energy(a, b) * (3.0 / 32.0)

    gradient = term(state)
    direction = _randn(1, 3, 96, 96, seed=9)
    expected = _slope(total, state.y_t, direction)
    assert abs(expected) > 1e-3
    assert float((gradient * direction).sum()) == pytest.approx(expected, rel=0.02, abs=2e-4)


def test_structure_does_not_depend_on_the_window_when_44_px_inside(
    tiny_critic: Critic, schedule: Schedule
) -> None:
    term = MutualInformation(
        tiny_critic, schedule, GuidanceSpec(structure_sign="constant"), START_STEP
    )
    wide = _state(60, size_px=192)
    map_part = wide.g_t[..., 8:168, 16:176]
    part = replace(wide, y_t=wide.y_t[..., 8:168, 16:176], draw_g_t=lambda: map_part)
    inside = term(part)[..., 44:-44, 44:-44]
    expected = term(wide)[..., 8:168, 16:176][..., 44:-44, 44:-44]
    assert float(expected.std()) > 0.0
    torch.testing.assert_close(inside, expected, rtol=1e-3, atol=1e-5 * float(expected.std()))


def test_border_embeds_as_inside_when_the_tile_is_mirrored(tiny_critic: Critic) -> None:
    # On a constant picture every place is alike; zero padding would set the border apart.
    level = torch.zeros(1)
    flat = torch.full((1, 3, 96, 96), 0.3)
    plain = tiny_critic.embed_picture(flat, level)
    assert float((plain - plain[..., 6:7, 6:7]).abs().max()) > 0.01
    inner = inner_positions(plain)
    assert inner.shape[-2:] == (6, 6)
    torch.testing.assert_close(inner, inner[..., :1, :1].expand_as(inner), rtol=1e-4, atol=1e-5)


def test_structure_is_zero_when_its_factor_is_zero(tiny_critic: Critic, schedule: Schedule) -> None:
    term = MutualInformation(tiny_critic, schedule, GuidanceSpec(), START_STEP)
    assert float(term(_state(150)).abs().max()) == 0.0
    repelled, attracted = term(_state(299)), term(_state(1))
    assert float(repelled.abs().max()) > 0.0
    assert float(attracted.abs().max()) > 0.0


def test_energy_ignores_the_other_tiles_when_batched(
    tiny_critic: Critic, schedule: Schedule
) -> None:
    both = _state(40, n=2)
    first = replace(both, y_t=both.y_t[:1], draw_g_t=lambda: both.g_t[:1])
    for energy in ("critic", "dv"):
        spec = structs.replace(GuidanceSpec(structure_sign="constant"), energy=energy)
        term = MutualInformation(tiny_critic, schedule, spec, START_STEP)
        torch.testing.assert_close(term(both)[:1], term(first), rtol=1e-4, atol=1e-7)


def test_dv_energy_is_unmoved_when_every_map_gains_the_same_score(schedule: Schedule) -> None:
    class Shifted(Critic):
        shift = 0.0

        def bound(self, dot: torch.Tensor) -> torch.Tensor:
            return dot + self.shift

    critic = Shifted(CriticSpec(channels=(8, 8, 8), embed=8, negatives=8))
    term = MutualInformation(critic, schedule, GuidanceSpec(energy="dv"), START_STEP)
    a, b = _randn(1, 8, 12, 12), _randn(1, 8, 12, 12, seed=1)
    before = float(term.energy(a, b))
    critic.shift = 3.0
    assert float(term.energy(a, b)) == pytest.approx(before, abs=1e-3)


# ---- entropy ------------------------------------------------------------------------------


def test_surprisal_gradient_equals_eps_over_sigma_when_gaussian(schedule: Schedule) -> None:
    term = Entropy(schedule, GuidanceSpec(entropy_scale=0.5), START_STEP)
    state = _state(120)
    expected = 0.5 * 120 / 300 * state.eps / float(schedule.sigma[120])
    torch.testing.assert_close(term(state), expected)


def test_logdet_gradient_equals_the_closed_form_when_contrast_grows(schedule: Schedule) -> None:
    # OD = mean + c * pattern has det Cov ~ c^6: half its logarithm rises by 3 per unit of ln c.
    side_px, t = 64, 240
    pattern = 0.15 * _randn(1, 3, side_px, side_px)
    intensity = torch.exp(-(0.7 + pattern)) - 1e-3
    state = replace(_state(t, side_px), y0_hat=2.0 * intensity - 1.0)
    assert float(state.y0_hat.abs().max()) < 0.99
    term = Entropy(schedule, GuidanceSpec(entropy="logdet", entropy_scale=0.7), START_STEP)
    along_c = -2.0 * torch.exp(-(0.7 + pattern)) * pattern
    expected = 0.7 * (t / 300) / float(schedule.alpha[t]) * 3.0 * side_px**2 / 16.0**2
    assert float((term(state) * along_c).sum()) == pytest.approx(expected, rel=0.03)


def test_histogram_gradient_equals_the_finite_difference_when_checked(schedule: Schedule) -> None:
    state = _state(300, size_px=64)
    state = replace(state, y0_hat=state.y0_hat.clamp(-0.9, 0.9))
    term = Entropy(schedule, GuidanceSpec(entropy="histogram", entropy_scale=1.0), START_STEP)

    def entropy(y: torch.Tensor) -> torch.Tensor:
        od = -torch.log((y.double() + 1.0) / 2.0 + 1e-3).mean(dim=1)[0]
        centers = torch.linspace(0.0, 2.0, 32, dtype=torch.float64)
        weights = torch.exp(-((od[..., None] - centers) ** 2) / (2.0 * 0.06**2)) + 1e-300
        share = weights / weights.sum(dim=-1, keepdim=True)
        total = torch.zeros((), dtype=torch.float64)
        for top in range(0, 33, 16):
            for left in range(0, 33, 16):
                p = share[top : top + 32, left : left + 32].mean(dim=(0, 1)).clamp_min(1e-8)
                total -= (p * p.log()).sum()
        return total

    gradient = term(state)
    direction = gradient / gradient.norm()
    h = 1e-3
    rise = entropy(state.y0_hat + h * direction) - entropy(state.y0_hat - h * direction)
    expected = float(rise) / (2.0 * h) / float(schedule.alpha[300])
    assert float(gradient.norm()) == pytest.approx(expected, rel=0.03)


def test_entropies_differ_when_kinds_differ(schedule: Schedule) -> None:
    state = _state(200, size_px=64)
    gradients = [
        Entropy(schedule, structs.replace(GuidanceSpec(), entropy=kind), START_STEP)(state)
        for kind in ("surprisal", "logdet", "histogram", "none")
    ]
    assert float(gradients[3].abs().max()) == 0.0
    for i, a in enumerate(gradients):
        for b in gradients[i + 1 :]:
            assert not torch.equal(a, b)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (1.0, (1.36, 1.74, 1.79)),
        (0.5, (1.07, 1.20, 1.27)),
        (0.1, (0.98, 1.02, 1.03)),
        (0.0, (0.96, 0.99, 0.99)),
    ],
)
def test_entropy_toy_ends_at_the_design_ratio_when_scale_varies(
    scale: float, expected: tuple[float, float, float], schedule: Schedule
) -> None:
    for sd, ratio in zip((0.1, 0.25, 0.5), expected, strict=True):
        assert _toy_sd(schedule, scale, sd) / sd == pytest.approx(ratio, rel=0.03)


def _toy_sd(schedule: Schedule, scale: float, sd: float) -> float:
    """Follow the exact variance of the 300-step teacher through linear Gaussian data.

    The sampler is linear as long as nothing is clamped, so each step's gain is read off a tiny
    constant picture, and its noise off `plan_move`.
    """

    def denoise(y_t: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        a, s = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
        return a * sd**2 / (a**2 * sd**2 + s**2) * y_t

    spec = GuidanceSpec(entropy_scale=scale, clip="off")
    solver = SolverSpec(steps=300, order=1, eta=1.0, shift="mean")
    sampler = Sampler(schedule, denoise, Entropy(schedule, spec, START_STEP), solver, spec)
    probe = torch.full((1, 3, 8, 8), 1e-3)
    nothing = torch.zeros_like(probe)
    view = View(nothing, nothing[:, :1], lambda _: nothing, 1.0)
    variance = float(schedule.alpha[300] ** 2 * sd**2 + schedule.sigma[300] ** 2)
    for t in range(300, 0, -1):
        move = plan_move(schedule, t, t - 1, 1.0)
        y0_hat = sampler.clean_estimate(probe, t, t - 1, view)
        gain = float(sampler.step(probe, y0_hat, None, move, math.inf)[0, 0, 0, 0]) / 1e-3
        variance = gain**2 * variance + move.spread**2
    return math.sqrt(variance)


# ---- local contrast -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["score", "l2"])
def test_contrast_is_zero_when_above_its_first_step(
    kind: Literal["score", "l2"],
    tiny_score: ScoreNet,
    tiny_heads: ContrastHeads,
    schedule: Schedule,
) -> None:
    term = PatchContrast(tiny_score, tiny_heads, schedule, GuidanceSpec(contrast=kind))
    assert float(term(_state(41)).abs().max()) == 0.0
    assert float(term(_state(40)).abs().max()) > 0.0
    off = PatchContrast(tiny_score, tiny_heads, schedule, GuidanceSpec(contrast="none"))
    assert float(off(_state(10)).abs().max()) == 0.0


@pytest.mark.parametrize("kind", ["score", "l2"])
def test_contrast_gradient_equals_the_finite_difference_when_checked(
    kind: Literal["score", "l2"],
    tiny_score: ScoreNet,
    tiny_heads: ContrastHeads,
    schedule: Schedule,
) -> None:
    spec = GuidanceSpec(contrast=kind, contrast_scale=2.0)
    term = PatchContrast(tiny_score, tiny_heads, schedule, spec)
    state = _state(20)
    alpha, sigma = (torch.tensor([float(v[20])]) for v in (schedule.alpha, schedule.sigma))
    keys = tiny_score.features(state.x_t, alpha, sigma)

    def loss(y: torch.Tensor) -> torch.Tensor:
        queries = tiny_score.features(y, alpha, sigma)
        if kind == "score":
            return contrast_loss(tiny_heads, queries, keys, 96).sum()
        pairs = zip(queries, keys, strict=True)
        return torch.stack([(q - k).square().mean(dim=1).sum() for q, k in pairs]).mean()

    wanted = term(state)
    expected = -2.0 * _slope(loss, state.y_t, wanted / wanted.norm())
    assert float(wanted.norm()) == pytest.approx(expected, rel=0.03)
    assert expected > 0.0
    with torch.no_grad():
        assert float(loss(state.y_t + 0.05 * wanted / wanted.norm())) < float(loss(state.y_t))


def test_contrast_loss_equals_plain_cross_entropy_when_recomputed(
    tiny_heads: ContrastHeads,
) -> None:
    shapes = [(2, 16, 24, 24), (2, 16, 12, 12), (2, 32, 6, 6)]
    queries = [_randn(*shape, seed=i) for i, shape in enumerate(shapes)]
    keys = [q + 0.5 * _randn(*q.shape, seed=7) for q in queries]
    losses = contrast_loss(tiny_heads, queries, keys, 96)
    assert losses.shape == (2, 36)
    expected = torch.zeros(2, 36)
    for level, (q, k) in enumerate(zip(queries, keys, strict=True)):
        stride = q.shape[-1] // 6
        for image in range(2):
            sides = []
            for f in (q, k):
                cells = f[image, :, stride // 2 :: stride, stride // 2 :: stride].reshape(-1, 36)
                hidden = F.relu(tiny_heads.mlps[level][0](cells.T))  # type: ignore[index]
                sides.append(F.normalize(tiny_heads.mlps[level][2](hidden), dim=1))  # type: ignore[index]
            logits = sides[0] @ sides[1].T / 0.07
            expected[image] += F.cross_entropy(logits, torch.arange(36), reduction="none") / 3.0
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sides", [(32, 16, 8, 4), (16, 8, 4), (8,)])
def test_contrast_uses_the_same_places_when_levels_are_coarse(sides: tuple[int, ...]) -> None:
    heads = ContrastHeads(HeadsSpec(embed=4), (3,) * len(sides))
    features = [_randn(1, 3, side, side, seed=side) for side in sides]
    assert contrast_loss(heads, features, features, 128).shape == (1, min(sides) ** 2)


def test_contrast_positions_lie_at_cell_centers_when_read() -> None:
    heads = ContrastHeads(HeadsSpec(embed=4), (3,))
    features = torch.zeros(1, 3, 64, 64)
    # Equal features everywhere: no place can be told from another, ln 256 nats each.
    with torch.no_grad():
        features[:, :, 1::4, 1::4] = 5.0 * _randn(1, 3, 16, 16)
        unseen = contrast_loss(heads, [features], [features], 256)
        torch.testing.assert_close(unseen, torch.full((1, 256), math.log(256.0)))
        features[:, :, 2::4, 2::4] = 5.0 * _randn(1, 3, 16, 16)
        seen = contrast_loss(heads, [features], [features], 256)
    assert float(seen.mean()) < math.log(256.0) - 0.5


# ---- negatives ----------------------------------------------------------------------------


@pytest.mark.parametrize("side", [12, 16, 32])
def test_rolls_pass_the_field_of_view_when_wrapped(side: int) -> None:
    offsets = roll_offsets(side, 64)
    assert len(offsets) == len(set(offsets)) == min(64, len(offsets))
    assert len(offsets) == 64 or side == 12
    for dy, dx in offsets:
        # 6 positions of 8 px are more than the critic's 44 px.
        assert max(min(dy, side - dy), min(dx, side - dx)) >= 6


def test_rolls_spread_over_the_map_when_there_is_room() -> None:
    rows, cols = zip(*roll_offsets(32, 64), strict=True)
    assert max(rows) > 28
    assert min(rows) < 4
    assert len(set(cols)) > 16


def test_small_maps_are_refused_when_no_roll_is_far_enough() -> None:
    with pytest.raises(ConfigError, match="at least 144 px"):
        roll_offsets(8, 64)


def test_sum_adds_terms_when_called() -> None:
    state = _state(100)
    double = Sum([lambda s: s.eps, lambda s: 2.0 * s.y0_hat])
    torch.testing.assert_close(double(state), state.eps + 2.0 * state.y0_hat)
    assert float(Sum([])(state).abs().max()) == 0.0
