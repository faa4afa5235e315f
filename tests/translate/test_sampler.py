"""The reverse process against closed forms: DDPM, DDIM, exact Gaussian scores, one path."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
import torch
from msgspec import structs

from wsi_stain.config import GuidanceSpec, SolverSpec
from wsi_stain.errors import DeviceError
from wsi_stain.translate.guidance import Guidance, StepState
from wsi_stain.translate.maps import gradient_map
from wsi_stain.translate.networks import ScoreNet
from wsi_stain.translate.noise import MAP_NOISE_STEP, START_NOISE_STEP, Schedule
from wsi_stain.translate.sampler import (
    Denoiser,
    Noise,
    Sampler,
    View,
    clip_gradient,
    path_weights,
    plan_move,
    step_grid,
)

TEACHER = SolverSpec(steps=300, order=1, eta=1.0, shift="mean")
OFF = GuidanceSpec(clip="off")


def _gaussian(mean: float, sd: float) -> Denoiser:
    """Exact posterior mean of N(mean, sd^2) pixels."""

    def denoise(y_t: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        a, s = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
        return mean + a * sd**2 / (a**2 * sd**2 + s**2) * (y_t - a * mean)

    return denoise


def _fields(shape: tuple[int, ...], seed: int = 0) -> Noise:
    def noise(step: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed * 10_000 + step))

    return noise


def _plain(
    schedule: Schedule,
    denoise: Denoiser,
    solver: SolverSpec,
    guidance: Guidance | None = None,
    spec: GuidanceSpec = OFF,
) -> Sampler:
    return Sampler(schedule, denoise, guidance, solver, spec)


# ---- one step -----------------------------------------------------------------------------


@pytest.mark.parametrize("t", [2, 10, 40, 150, 300, 1000])
def test_unit_step_equals_ddpm_when_order_1_eta_1(t: int, schedule: Schedule) -> None:
    beta = np.linspace(1e-4, 2e-2, 1000)[t - 1]
    abar, abar_before = schedule.alpha[t] ** 2, schedule.alpha[t - 1] ** 2
    move = plan_move(schedule, t, t - 1, 1.0)
    # Ho et al. 2020, eq. 7: q(y_{t-1} | y_t, y_0).
    keep = math.sqrt(1.0 - beta) * (1.0 - abar_before) / (1.0 - abar)
    pull = math.sqrt(abar_before) * beta / (1.0 - abar)
    variance = (1.0 - abar_before) / (1.0 - abar) * beta
    assert move.keep == pytest.approx(keep, rel=1e-10)
    assert move.pull == pytest.approx(pull, rel=1e-10)
    assert move.spread**2 == pytest.approx(variance, rel=1e-10)


@pytest.mark.parametrize(("t", "s"), [(300, 280), (300, 1), (40, 39), (2, 1)])
def test_step_equals_ddim_when_eta_0(t: int, s: int, schedule: Schedule) -> None:
    move = plan_move(schedule, t, s, 0.0)
    # Song et al. 2021, eq. 12 with sigma = 0: alpha_s y0 + sigma_s eps.
    ratio = schedule.sigma[s] / schedule.sigma[t]
    assert move.keep == pytest.approx(ratio, rel=1e-10)
    assert move.pull == pytest.approx(schedule.alpha[s] - ratio * schedule.alpha[t], rel=1e-9)
    assert move.spread == 0.0


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_step_keeps_the_marginal_when_the_estimate_is_true(eta: float, schedule: Schedule) -> None:
    for t, s in ((300, 250), (120, 7)):
        move = plan_move(schedule, t, s, eta)
        alpha_t, sigma_t = schedule.alpha[t], schedule.sigma[t]
        assert move.keep * alpha_t + move.pull == pytest.approx(schedule.alpha[s], rel=1e-10)
        variance = (move.keep * sigma_t) ** 2 + move.spread**2
        assert variance == pytest.approx(schedule.sigma[s] ** 2, rel=1e-10)


def test_last_step_gives_the_estimate_when_s_is_0(schedule: Schedule) -> None:
    move = plan_move(schedule, 5, 0, 1.0)
    assert (move.keep, move.pull, move.spread) == (0.0, 1.0, 0.0)


def test_mean_shift_equals_the_paper_when_unit_step(schedule: Schedule) -> None:
    # The paper: mean <- mean + Sigma_t grad M, Sigma_t the posterior variance.
    gradient = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y_t, x_0 = torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)
    for t in (2, 40, 150, 300):
        move = plan_move(schedule, t, t - 1, 1.0)
        means = []
        for guidance in (None, lambda _: 0.01 * gradient):
            sampler = _plain(schedule, _gaussian(0.1, 0.3), TEACHER, guidance)
            y0_hat = sampler.clean_estimate(
                y_t, t, t - 1, View(x_0, x_0[:, :1], lambda _: x_0, 1.0)
            )
            means.append(sampler.step(y_t, y0_hat, None, move, math.inf))
        shift = schedule.kappa(t - 1)
        torch.testing.assert_close(
            means[1] - means[0], move.spread**2 * 0.01 * gradient, rtol=1e-3, atol=1e-7
        )
        assert move.pull * shift == pytest.approx(move.spread**2, rel=1e-9)


def test_score_shift_equals_the_substituted_score_when_asked(schedule: Schedule) -> None:
    # A gradient added to the score moves the clean estimate by sigma^2 / alpha (Tweedie).
    gradient = torch.full((1, 3, 4, 4), 0.02)
    solver = structs.replace(TEACHER, shift="score")
    flat = torch.zeros(1, 3, 4, 4)
    estimates = [
        _plain(schedule, _gaussian(0.1, 0.3), solver, guidance).clean_estimate(
            flat, 150, 100, View(flat, flat[:, :1], lambda _: flat, 1.0)
        )
        for guidance in (None, lambda _: gradient)
    ]
    expected = gradient * float(schedule.sigma[150] ** 2 / schedule.alpha[150])
    torch.testing.assert_close(estimates[1] - estimates[0], expected, rtol=1e-4, atol=1e-7)


# ---- the grid and the path ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "start", "spacing", "expected"),
    [
        (3, 300, 1.0, [300, 200, 100, 0]),
        (4, 300, 2.0, [300, 169, 75, 19, 0]),
        (1, 300, 1.0, [300, 0]),
        (5, 3, 1.0, [3, 2, 1, 0]),
    ],
)
def test_grid_equals_the_table_when_laid(
    steps: int, start: int, spacing: float, expected: list[int]
) -> None:
    assert step_grid(SolverSpec(steps=steps, start_step=start, spacing=spacing)) == expected


def test_grid_is_every_integer_when_teacher() -> None:
    assert step_grid(TEACHER) == list(range(300, -1, -1))


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize(("t", "s"), [(300, 280), (300, 1), (41, 40), (20, 3)])
def test_path_equals_composed_unit_steps_when_long(
    t: int, s: int, eta: float, schedule: Schedule
) -> None:
    weights = path_weights(schedule, t, s, eta)
    assert [u for u, _ in weights] == list(range(t, s, -1))
    assert sum(w * w for _, w in weights) == pytest.approx(1.0, rel=1e-12)
    # Push unit noise through the linear part of the unit steps one by one.
    reached = dict.fromkeys(range(t, s, -1), 0.0)
    for u in range(t, s, -1):
        move = plan_move(schedule, u, u - 1, eta)
        reached = {level: move.keep * value for level, value in reached.items()}
        reached[u] += move.spread
    long = plan_move(schedule, t, s, eta)
    for u, weight in weights:
        assert long.spread * weight == pytest.approx(reached[u], rel=1e-8)


def test_long_steps_follow_the_teacher_when_on_the_same_path(schedule: Schedule) -> None:
    shape = (2, 3, 16, 16)
    x_0 = torch.zeros(shape)
    runs = {}
    for steps in (300, 100, 50):
        solver = SolverSpec(steps=steps, order=2, eta=1.0)
        for seed in (0, 1):
            sampler = _plain(schedule, _gaussian(0.2, 0.25), solver)
            runs[steps, seed] = sampler(x_0, _fields(shape, seed), 1.0)
    same = float((runs[50, 0] - runs[300, 0]).square().mean().sqrt())
    other = float((runs[50, 1] - runs[300, 0]).square().mean().sqrt())
    nearer = float((runs[100, 0] - runs[300, 0]).square().mean().sqrt())
    assert nearer < same < 0.2 * other


# ---- whole runs on Gaussian data ----------------------------------------------------------


def _ddim_gain(schedule: Schedule, sd: float) -> float:
    """Closed form: the probability flow scales a deviation by the marginal spreads' ratio."""
    top = math.sqrt(schedule.alpha[300] ** 2 * sd**2 + schedule.sigma[300] ** 2)
    return sd / top


def test_order_2_converges_faster_when_score_is_exact(schedule: Schedule) -> None:
    sd = 0.2
    e = 0.5  # a start noise small enough that nothing is clamped
    probe = torch.full((1, 3, 4, 4), e)
    # The exact flow ends at t = 0; the solver's last step jumps from its last level to y0_hat.
    errors: dict[int, list[float]] = {}
    for order in (1, 2):
        errors[order] = []
        for steps in (10, 20, 40):
            solver = SolverSpec(steps=steps, order=order, eta=0.0, spacing=2.0)
            sampler = _plain(schedule, _gaussian(0.0, sd), solver)
            end = float(sampler(torch.zeros_like(probe), lambda _: probe, 1.0)[0, 0, 0, 0])
            exact = float(schedule.sigma[300]) * e * _ddim_gain(schedule, sd)
            errors[order].append(abs(end - exact) / exact)
    for first, second in zip(errors[1], errors[2], strict=True):
        assert second < 0.5 * first
    assert errors[1][2] < 0.7 * errors[1][1] < 0.5 * errors[1][0]
    assert errors[2][2] < 0.45 * errors[2][1] < 0.3 * errors[2][0]


@pytest.mark.parametrize(
    ("order", "eta", "loss"),
    [(1, 1.0, 0.04), (2, 1.0, 0.015), (1, 0.0, 0.015), (2, 0.0, 0.015)],
)
def test_samples_have_the_right_moments_when_score_is_exact(
    order: Literal[1, 2], eta: float, loss: float, schedule: Schedule
) -> None:
    # First-order ancestral sampling is known to lose 2-4 % of the spread in 300 steps (METHOD,
    # section 4: 0.96 of sd 0.1, 0.99 of sd 0.25).
    mean, sd = 0.3, 0.15
    shape = (4, 3, 64, 64)
    clean = mean + sd * _fields(shape, seed=7)(1)
    solver = SolverSpec(steps=300, order=order, eta=eta)
    sampler = _plain(schedule, _gaussian(mean, sd), solver)
    y_0 = sampler(clean, _fields(shape), 1.0)
    n = y_0.numel()
    assert float(y_0.mean()) == pytest.approx(mean, abs=5 * sd / math.sqrt(n))
    assert float(y_0.std()) == pytest.approx(sd, rel=loss)
    kurtosis = float(((y_0 - y_0.mean()) / y_0.std()).pow(4).mean())
    assert kurtosis == pytest.approx(3.0, abs=0.1)


def test_gaussian_energy_moves_the_mean_when_guided(schedule: Schedule) -> None:
    # Data N(0, sd^2) and energy c y_t at each level: the posterior mean tilts towards +.
    shape = (2, 3, 32, 32)

    def push(state: StepState) -> torch.Tensor:
        return torch.ones_like(state.y_t)

    terms: tuple[Guidance | None, ...] = (None, push)
    runs = [_plain(schedule, _gaussian(0.0, 0.2), SolverSpec(steps=30), term) for term in terms]
    free, pushed = (run(torch.zeros(shape), _fields(shape), 1.0) for run in runs)
    assert float((pushed - free).mean()) > 0.02
    assert float((pushed - free).std()) < 1e-4


# ---- invariants and refusals --------------------------------------------------------------


@pytest.mark.parametrize("guided", [False, True])
def test_tile_is_the_same_when_batch_mates_change(
    guided: bool, tiny_score: ScoreNet, schedule: Schedule
) -> None:
    shape = (3, 3, 32, 32)
    x_0 = _fields(shape, seed=3)(0).clamp(-1, 1)
    noise = _fields(shape)

    def term(state: StepState) -> torch.Tensor:
        return state.eps + state.x_t + state.g_t

    guidance: Guidance | None = term if guided else None
    sampler = _plain(schedule, tiny_score.denoise, SolverSpec(steps=4), guidance, GuidanceSpec())
    order = torch.tensor([2, 2, 0])
    together = sampler(x_0, noise, 1.0)
    mixed = sampler(x_0[order], lambda step: noise(step)[order], 1.0)
    assert float(together.std()) > 0.05
    assert torch.equal(mixed, together[order])


def test_state_holds_the_papers_quantities_when_guided(schedule: Schedule) -> None:
    seen: list[StepState] = []

    def spy(state: StepState) -> torch.Tensor:
        seen.append(state)
        return torch.zeros_like(state.y_t)

    shape = (1, 3, 16, 16)
    x_0, noise = 0.3 * _fields(shape, seed=5)(0), _fields(shape)
    sampler = _plain(schedule, _gaussian(0.0, 0.3), SolverSpec(steps=3), spy, GuidanceSpec())
    sampler(x_0, noise, 0.7)
    assert [state.t for state in seen] == [300, 200, 100]
    for state in seen:
        alpha, sigma = float(schedule.alpha[state.t]), float(schedule.sigma[state.t])
        torch.testing.assert_close(alpha * state.y0_hat + sigma * state.eps, state.y_t)
        e = noise(START_NOISE_STEP)
        torch.testing.assert_close(state.x_t, alpha * x_0 + sigma * e)
        noised = alpha * x_0 + sigma * noise(MAP_NOISE_STEP)
        torch.testing.assert_close(state.g_t, gradient_map(noised, "sobel", 0.7))
    torch.testing.assert_close(seen[0].y_t, seen[0].x_t)  # y_S is x_S


@pytest.mark.parametrize(("floor", "level"), [(0, 5), (20, 20), (40, 40)])
def test_map_is_noised_at_its_floor_when_t_is_small(
    floor: int, level: int, schedule: Schedule
) -> None:
    maps: list[torch.Tensor] = []

    def spy(state: StepState) -> torch.Tensor:
        maps.append(state.g_t)
        return torch.zeros_like(state.y_t)

    shape = (1, 3, 16, 16)
    x_0, noise = _fields(shape, seed=5)(0).clamp(-1, 1), _fields(shape)
    spec = GuidanceSpec(map_floor_step=floor, map_noise="shared")
    solver = SolverSpec(steps=1, start_step=5)
    _plain(schedule, _gaussian(0.0, 0.3), solver, spy, spec)(x_0, noise, 1.0)
    alpha, sigma = float(schedule.alpha[level]), float(schedule.sigma[level])
    expected = gradient_map(alpha * x_0 + sigma * noise(START_NOISE_STEP), "sobel", 1.0)
    torch.testing.assert_close(maps[0], expected)


def test_bad_value_is_named_when_the_net_gives_nan(schedule: Schedule) -> None:
    def broken(y_t: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        bad = y_t.clone()
        if float(alpha[0]) > float(schedule.alpha[150]):
            bad[0, 0, 3, 3] = math.nan
        return bad

    x_0 = torch.zeros(1, 3, 8, 8)
    sampler = _plain(schedule, broken, SolverSpec(steps=3))
    with pytest.raises(DeviceError, match=r"score net .* step 100"):
        sampler(x_0, _fields((1, 3, 8, 8)), 1.0)


@pytest.mark.parametrize("clip", ["pixel", "tile", "off"])
def test_bad_value_is_named_when_guidance_gives_inf(
    clip: Literal["pixel", "tile", "off"], schedule: Schedule
) -> None:
    spec = GuidanceSpec(clip=clip)
    x_0 = torch.zeros(1, 3, 8, 8)

    def term(state: StepState) -> torch.Tensor:
        return torch.full_like(state.y_t, math.inf)

    sampler = _plain(schedule, _gaussian(0.0, 0.3), SolverSpec(steps=3), term, spec)
    with pytest.raises(DeviceError, match=r"guidance .* step 300"):
        sampler(x_0, _fields((1, 3, 8, 8)), 1.0)


def test_clip_bounds_each_pixel_when_set(schedule: Schedule) -> None:
    sigma, limit = float(schedule.sigma[40]), 0.5
    gradient = 100.0 * _fields((2, 3, 16, 16))(0)
    gradient[0, :, :8] *= 1e-5
    spec = GuidanceSpec(clip="pixel", clip_limit=limit)
    clipped = clip_gradient(gradient, spec, sigma)
    rms = clipped.square().mean(dim=1).sqrt()
    assert float(rms.max()) <= limit / sigma * (1 + 1e-5)
    torch.testing.assert_close(clipped[0, :, :8], gradient[0, :, :8])
    direction = torch.nn.functional.cosine_similarity(clipped, gradient, dim=1)
    assert float(direction.min()) > 1 - 1e-5


def test_clip_bounds_each_tile_by_one_factor_when_set(schedule: Schedule) -> None:
    sigma = float(schedule.sigma[40])
    gradient = _fields((2, 3, 16, 16))(0) * torch.tensor([100.0, 0.1]).view(2, 1, 1, 1)
    clipped = clip_gradient(gradient, GuidanceSpec(clip="tile"), sigma)
    rms = clipped.square().mean(dim=(1, 2, 3)).sqrt()
    assert float(rms[0]) == pytest.approx(1.0 / sigma, rel=1e-4)
    torch.testing.assert_close(clipped[1], gradient[1])
    ratio = clipped[0] / gradient[0]
    assert float(ratio.max() - ratio.min()) < 1e-6
    assert torch.equal(clip_gradient(gradient, GuidanceSpec(clip="off"), sigma), gradient)


def test_clip_leaves_zero_alone_when_there_is_no_gradient() -> None:
    zero = torch.zeros(1, 3, 4, 4)
    assert torch.equal(clip_gradient(zero, GuidanceSpec(), 0.5), zero)


def test_result_is_in_range_when_the_net_overshoots(schedule: Schedule) -> None:
    def wild(y_t: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return 50.0 * y_t

    y_0 = _plain(schedule, wild, SolverSpec(steps=5))(
        torch.zeros(1, 3, 8, 8), _fields((1, 3, 8, 8)), 1.0
    )
    assert float(y_0.abs().max()) <= 1.0
    assert float(y_0.std()) > 0.5
