"""The mutual-information estimator against Gaussians, whose information is known.

Correlated Gaussians of dimension d hold ``I = -(d / 2) ln(1 - rho^2)`` nats. Fast tests use a
critic that is linear in quadratic features: it can express the true log-density ratio and its
training is convex, so what is judged is the loss and the reading, not the patience of a net.
The slow grid trains a plain MLP critic by Adam instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from wsi_stain.train.mine import (
    dv_estimate,
    mi_loss,
    nce_estimate,
)
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
        scores: torch.Tensor = (x * both) @ y.T + own + self.bias
        return scores


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
@pytest.mark.parametrize(("d", "steps"), [(1, 1_500), (4, 2_500), (16, 6_000)])
@pytest.mark.parametrize("nats", [0.0, 0.5, 1.0, 2.0])
def test_mlp_equals_the_truth_when_gaussian(kind: str, d: int, steps: int, nats: float) -> None:
    critic = Multilayer(d, width=128)
    _learn(critic, lambda n, seed: _correlated(n, d, nats, seed), kind, steps)
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
