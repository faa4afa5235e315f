"""The mutual-information estimator against Gaussians, whose information is known.

Correlated Gaussians of dimension d hold ``I = -(d / 2) ln(1 - rho^2)`` nats. Fast tests use a
critic that is linear in quadratic features: it can express the true log-density ratio and its
training is convex, so what is judged is the loss and the reading, not the patience of a net.
The slow grid trains a plain MLP critic by Adam instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np
import pytest
import torch
from msgspec import structs
from torch import nn
from torch.nn import functional as F

from wsi_stain.config import CriticSpec, DataConfig, TrainConfig
from wsi_stain.errors import ConfigError
from wsi_stain.train.data import ImageSet
from wsi_stain.train.mine import (
    MineStage,
    dv_estimate,
    map_scales,
    mi_loss,
    nce_estimate,
    pair_scores,
)
from wsi_stain.translate.guidance import gradient_map, roll_offsets
from wsi_stain.translate.networks import Critic
from wsi_stain.translate.noise import Schedule

Pair = tuple[torch.Tensor, torch.Tensor]
LOSSES = ("smile", "mine", "nce")


class PairCritic(Protocol):
    """Anything that scores all pairs: (n, d) and (n, d) to (n, n)."""

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Score row i of x with row j of y at (i, j)."""
        ...


def _correlated(n: int, d: int, nats: float, seed: int) -> Pair:
    rho = math.sqrt(-math.expm1(-2.0 * nats / d))
    generator = torch.Generator().manual_seed(seed)
    x, z = (torch.randn(n, d, generator=generator) for _ in range(2))
    return x, rho * x + math.sqrt(1.0 - rho * rho) * z


def _rolled(critic: PairCritic, pair: Pair, k: int) -> Pair:
    """Scores of true pairs (n,) and of k rolled ones (k, n); x is the anchor."""
    x, y = pair
    scores = critic(x, y)
    place = torch.arange(len(x))
    marginal = torch.stack([scores[place, (place + 1 + i) % len(x)] for i in range(k)])
    return scores.diagonal(), marginal


class Quadratic(nn.Module):
    """Scores linear in x_i y_i, x_i^2, y_i^2: holds the log-density ratio of our Gaussians."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(3, d))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Score all pairs."""
        both, left, right = self.weights
        own = (x.square() @ left)[:, None] + (y.square() @ right)[None, :]
        return (x * both) @ y.T + own + self.bias


class Multilayer(nn.Module):
    """Scores ``<a(x), b(y)>`` of two MLPs."""

    def __init__(self, d: int, width: int = 48, embed: int = 24) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (
            nn.Sequential(
                nn.Linear(d, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                nn.Linear(width, embed),
            )
            for _ in range(2)
        )  # fmt: skip

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Score all pairs."""
        scores: torch.Tensor = self.a(x) @ self.b(y).T / math.sqrt(24)
        return scores


def _solve(critic: Quadratic, pair: Pair, kind: str, k: int = 4) -> None:
    """Find the convex loss's minimum."""
    optimizer = torch.optim.LBFGS(
        critic.parameters(), max_iter=100, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = mi_loss(*_in_parts(critic, pair, k), kind)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]


def _in_parts(critic: PairCritic, pair: Pair, k: int, n: int = 250) -> Pair:
    """Roll inside groups of n samples: n^2 scores each instead of all pairs' square."""
    x, y = pair
    parts = [_rolled(critic, (x[i : i + n], y[i : i + n]), k) for i in range(0, len(x), n)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts], dim=1)


def _learn(
    critic: nn.Module, draw: Callable[[int, int], Pair], kind: str, steps: int, lr: float = 3e-3
) -> None:
    optimizer = torch.optim.Adam(critic.parameters(), lr=lr)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    running = torch.zeros(())
    for step in range(steps):
        loss = mi_loss(*_rolled(critic, draw(256, 1000 + step), 8), kind, running)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        rates.step()


@torch.no_grad()
def _read(critic: PairCritic, pair: Pair, kind: str) -> float:
    if kind == "nce":
        return nce_estimate(*_in_parts(critic, pair, k=200))
    return dv_estimate(*_in_parts(critic, pair, k=32))


def _bar(nats: float) -> float:
    return max(0.1, 0.1 * nats)


# ---- closed forms on Gaussians ------------------------------------------------------------


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("d", [1, 4, 16])
@pytest.mark.parametrize("nats", [0.0, 0.5, 1.0, 2.0])
def test_estimate_equals_the_truth_when_gaussian(kind: str, d: int, nats: float) -> None:
    critic = Quadratic(d)
    _solve(critic, _correlated(4_000, d, nats, seed=1), kind)
    found = _read(critic, _correlated(6_000, d, nats, seed=2), kind)
    assert found == pytest.approx(nats, abs=_bar(nats))
    if nats == 0.0:
        assert found < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["smile", "nce"])
@pytest.mark.parametrize("d", [1, 4, 16])
@pytest.mark.parametrize("nats", [0.0, 0.5, 1.0, 2.0])
def test_mlp_equals_the_truth_when_gaussian(kind: str, d: int, nats: float) -> None:
    critic = Multilayer(d, width=128)
    _learn(critic, lambda n, seed: _correlated(n, d, nats, seed), kind, steps=6_000)
    found = _read(critic, _correlated(20_000, d, nats, seed=2), kind)
    assert found == pytest.approx(nats, abs=_bar(nats))


def test_mlp_is_unmoved_when_each_side_is_bent() -> None:
    def bent(n: int, seed: int) -> Pair:
        x, y = _correlated(n, 1, 1.0, seed)
        return 0.2 * x**3 + x, torch.sinh(y) / 2.0

    critic = Multilayer(1)
    _learn(critic, bent, "smile", steps=500)
    assert _read(critic, bent(8_000, 2), "smile") == pytest.approx(1.0, abs=0.1)


def test_mine_loss_reaches_the_truth_when_its_denominator_is_a_running_mean() -> None:
    critic = Multilayer(1)
    _learn(critic, lambda n, seed: _correlated(n, 1, 0.5, seed), "mine", steps=350)
    found = _read(critic, _correlated(8_000, 1, 0.5, seed=2), "mine")
    assert found == pytest.approx(0.5, abs=0.1)


def test_coarser_side_holds_less_when_only_its_sign_is_kept() -> None:
    nats = 1.0
    rho = math.sqrt(-math.expm1(-2.0 * nats))
    # I(x; sign y) = ln 2 - E h(P(y > 0 | x)), by quadrature.
    x = np.linspace(-9.0, 9.0, 20_001)
    density = np.exp(-0.5 * x**2) / math.sqrt(2.0 * math.pi)
    p = 0.5 * (1.0 + np.array([math.erf(v) for v in rho * x / math.sqrt(2 * (1 - rho**2))]))
    p = np.clip(p, 1e-12, 1 - 1e-12)
    entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p))
    truth = math.log(2.0) - float(np.trapezoid(density * entropy, x))
    assert truth < nats

    def signs(n: int, seed: int) -> Pair:
        left, right = _correlated(n, 1, nats, seed)
        return left, right.sign()

    critic = Multilayer(1)
    _learn(critic, signs, "smile", steps=300)
    assert _read(critic, signs(8_000, 2), "smile") == pytest.approx(truth, abs=0.05)


def test_information_adds_when_copies_are_independent() -> None:
    def both(n: int, seed: int) -> Pair:
        first, second = _correlated(n, 1, 0.5, seed), _correlated(n, 1, 1.0, seed + 10_000)
        return torch.cat([first[0], second[0]], 1), torch.cat([first[1], second[1]], 1)

    critic = Quadratic(2)
    _solve(critic, both(6_000, 1), "smile")
    assert _read(critic, both(8_000, 2), "smile") == pytest.approx(1.5, rel=0.15)


def test_information_falls_with_noise_when_the_image_is_gaussian() -> None:
    schedule, d, power = Schedule(), 16, 0.1
    found = []
    for t in (120, 200, 300):
        alpha, sigma = float(schedule.alpha[t]), float(schedule.sigma[t])

        def noised(seed: int, a: float = alpha, s: float = sigma) -> Pair:
            y_0, z = _correlated(6_000, d, 0.0, seed)
            return y_0, a * math.sqrt(power) * y_0 + s * z

        truth = 0.5 * d * math.log1p((alpha / sigma) ** 2 * power)
        critic = Quadratic(d)
        _solve(critic, noised(1), "smile")
        found.append(_read(critic, noised(2), "smile"))
        assert found[-1] == pytest.approx(truth, rel=0.1)
    assert found[0] > found[1] > found[2]


@pytest.mark.parametrize("kind", ["smile", "nce"])
def test_gradient_points_along_the_likelihood_when_trained(kind: str) -> None:
    d, nats = 4, 1.0
    critic = Multilayer(d)
    _learn(critic, lambda n, seed: _correlated(n, d, nats, seed), kind, steps=600)
    x, y = _correlated(500, d, nats, seed=2)
    y.requires_grad_(True)
    (found,) = torch.autograd.grad(critic(x, y).diagonal().sum(), y)
    rho = math.sqrt(-math.expm1(-2.0 * nats / d))
    # grad_y ln p(x | y), with p(x | y) = N(rho y, 1 - rho^2).
    truth = rho * (x - rho * y.detach()) / (1.0 - rho**2)
    assert float(F.cosine_similarity(found.flatten(), truth.flatten(), dim=0)) > 0.95


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
    a, b = torch.randn(2, 5, 12, 12), torch.randn(2, 5, 12, 12)
    joint, marginal = pair_scores(critic, a, b)
    torch.testing.assert_close(joint, critic.score(a, b).flatten())
    offsets = roll_offsets(12, 8)
    assert marginal.shape == (len(offsets), 2 * 144)
    for row, offset in zip(marginal, offsets, strict=True):
        # torch.roll moves places forward: the map at p meets the picture at p - offset.
        torch.testing.assert_close(row, critic.score(a, b.roll(offset, (2, 3))).flatten())


def test_pairs_stay_inside_the_image_when_batched() -> None:
    critic = _critic()
    a, b = torch.randn(3, 5, 12, 12), torch.randn(3, 5, 12, 12)
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
    a, b, c = torch.randn(1, 5, 12, 12), torch.randn(1, 5, 12, 12), torch.randn(1, 1, 12, 12)
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
    """Small critic on crops of 96 px."""
    return TrainConfig(
        stage="mine",
        bundle="none",
        data=DataConfig(root=".", crop_px=96),
        batch=2,
        focus_step=300,
        critic=CriticSpec(channels=(16, 24, 24), embed=16, negatives=16),
    )


def test_held_out_steps_are_those_trained_when_evaluated(
    config: TrainConfig, tissue: ImageSet
) -> None:
    stage = MineStage(config, tissue, tissue, torch.device("cpu"))
    values = stage.evaluate()
    assert list(values) == [f"nats_{t}" for t in (10, 40, 80, 150, 220, 300)]
    assert all(math.isfinite(value) for value in values.values())
    assert stage.evaluate() == values


@pytest.mark.parametrize("kind", LOSSES)
def test_reading_fits_the_loss_when_scores_depend_on_the_map_alone(
    kind: Literal["nce", "smile", "mine"],
    config: TrainConfig,
    tissue: ImageSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    critic = structs.replace(config.critic, loss=kind)
    stage = MineStage(structs.replace(config, critic=critic), tissue, tissue, torch.device("cpu"))
    own = torch.tensor([0.0, 5.0]).repeat(50)
    monkeypatch.setattr(stage, "_scores", lambda *_: (own, own.expand(16, -1)))
    # Such scores know nothing. InfoNCE says so; Donsker-Varadhan would read 2.5 - ln E e^f.
    dv = 2.5 - math.log((1.0 + math.exp(5.0)) / 2.0)
    assert dv < -1.5
    expected = 0.0 if kind == "nce" else dv
    assert stage.evaluate()["nats_40"] == pytest.approx(expected, abs=1e-5)
    assert set(stage.memory) == ({"running"} if kind == "mine" else set())


def test_small_crops_are_refused_when_no_roll_is_far_enough(
    config: TrainConfig, tissue: ImageSet
) -> None:
    small = ImageSet(tissue.images, structs.replace(tissue.config, crop_px=64))
    stage = MineStage(config, small, small, torch.device("cpu"))
    with pytest.raises(ConfigError, match="at least 96 px"):
        stage.loss(np.random.default_rng(0), torch.Generator())


@pytest.mark.slow
def test_structure_is_learned_and_falls_with_noise_when_trained(
    config: TrainConfig, tissue: ImageSet
) -> None:
    stage = MineStage(config, tissue, tissue, torch.device("cpu"))
    optimizer = torch.optim.Adam(stage.net.parameters(), lr=2e-3)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    for _ in range(300):
        optimizer.zero_grad()
        stage.loss(rng, generator).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    values = stage.evaluate()
    assert values["nats_40"] > 0.3
    assert values["nats_40"] > values["nats_150"] > values["nats_300"]
