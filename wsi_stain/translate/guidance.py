"""Room 3 of 4: what pulls the reverse process. Structure, entropy, local contrast, their sum.

In: one frozen `StepState`. Out: a gradient of the picture's shape. Not here: step sizes, clips
(the sampler's), training.

The paper's energy is ``M = lam U + (1 - lam) I`` with ``U = H - I``, so its gradient is
``(1 - 2 lam) grad I + lam grad H``: as written, structure repels above S/2 and attracts below.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional as F

from wsi_stain.config import GuidanceSpec
from wsi_stain.errors import ConfigError
from wsi_stain.translate.maps import blur
from wsi_stain.translate.networks import ContrastHeads, Critic, ScoreNet
from wsi_stain.translate.noise import Schedule

__all__ = [
    "Entropy",
    "Guidance",
    "MutualInformation",
    "PatchContrast",
    "StepState",
    "Sum",
    "contrast_loss",
    "inner_positions",
    "roll_offsets",
]

PATCH_OVERLAP = 32.0
"""Each pixel lies in (45 / 8)^2 of the critic's fields of view: a patch sum counts it so often."""
EDGE_POSITIONS = 3
"""Positions along a border whose field of view (44 px) reaches over it and meets the padding.

The critic can tell these places by the padding alone: on blank pictures, where the truth is 0, it
then reads 1.6 nats.
"""
CELL_PX = 16
"""Contrast positions are the centers of 16 px cells, which lie at the same places in any tile."""


@dataclass(frozen=True)
class StepState:
    """All that a guidance term may look at in one step.

    Attributes
    ----------
    t
        Noise level.
    y_t, y0_hat
        Current picture, clean estimate: float32 (B, 3, H, W).
    start, edges
        Start image x'_0, (B, 3, H, W); clean edge map of the H&E, (B, 1, H, W).
    draw_eps, draw_x_t, draw_g_t
        Give `eps`, `x_t` and `g_t`, which few terms look at, when asked.
    """

    t: int
    y_t: torch.Tensor
    y0_hat: torch.Tensor
    start: torch.Tensor
    edges: torch.Tensor
    draw_eps: Callable[[], torch.Tensor]
    draw_x_t: Callable[[], torch.Tensor]
    draw_g_t: Callable[[], torch.Tensor]

    @functools.cached_property
    def eps(self) -> torch.Tensor:
        """Predicted noise, (B, 3, H, W)."""
        return self.draw_eps()

    @functools.cached_property
    def x_t(self) -> torch.Tensor:
        """Start image noised to level t with the start field, (B, 3, H, W)."""
        return self.draw_x_t()

    @functools.cached_property
    def g_t(self) -> torch.Tensor:
        """Gradient map of the start image at level t, independently noised: (B, 1, H, W)."""
        return self.draw_g_t()


class Guidance(Protocol):
    """A term of the energy: gives its raw gradient at ``state.y_t``; zero where inactive."""

    def __call__(self, state: StepState) -> torch.Tensor:
        """Give the gradient, float32 (B, 3, H, W): the direction that is wanted."""
        ...


def energy_weight(t: int, spec: GuidanceSpec, start_step: int) -> float:
    """Give lam_t: ``t / S``, or the constant that the settings name."""
    return t / start_step if spec.weight == "linear" else float(spec.weight)


class MutualInformation:
    """Structure: the gradient of ``I(g; y_t)`` as the trained critic sees it.

    Parameters
    ----------
    critic
        Trained critic, float32, in evaluation mode.
    schedule, spec
        Noise levels; signs and scale.
    start_step
        S, for lam_t.
    """

    def __init__(
        self, critic: Critic, schedule: Schedule, spec: GuidanceSpec, start_step: int
    ) -> None:
        self.critic, self.schedule = critic, schedule
        self.spec, self.start_step = spec, start_step

    def __call__(self, state: StepState) -> torch.Tensor:
        """Give ``sign s_I (1 - 2 lam_t) grad_y sum G(g_t, y_t) / 32``."""
        factor = self.factor(state.t)
        if factor == 0.0:
            return torch.zeros_like(state.y_t)
        picture_noise = self._log_noise(state.t, state.y_t)
        map_noise = self._log_noise(max(state.t, self.spec.map_floor_step), state.y_t)
        with torch.no_grad():
            a = inner_positions(self.critic.embed_map(_mirrored(state.g_t), map_noise))
        with torch.enable_grad():
            y_t = state.y_t.detach().clone().requires_grad_(True)
            b = inner_positions(self.critic.embed_picture(_mirrored(y_t), picture_noise))
            total = self.energy(a, b)
            (gradient,) = torch.autograd.grad(total, y_t)
        return gradient * (factor / PATCH_OVERLAP)

    def energy(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Sum the scores of true pairs; "dv" takes off the log-mean-exp over rolled pairs."""
        joint = self.critic.score(a, b)
        if self.spec.energy == "critic":
            return joint.sum()
        offsets = roll_offsets(a.shape[-1], self.critic.spec.negatives)
        rolled = torch.stack([self.critic.score(a.roll(o, (-2, -1)), b) for o in offsets])
        marginal = torch.logsumexp(rolled, dim=0) - torch.log(torch.tensor(float(len(offsets))))
        return (joint - marginal).sum()

    def factor(self, t: int) -> float:
        """Give the signed weight of ``grad I`` at level t."""
        lam = energy_weight(t, self.spec, self.start_step)
        weight = {
            "as_written": 1.0 - 2.0 * lam,
            "clamped": max(0.0, 1.0 - 2.0 * lam),
            "constant": 1.0,
        }[self.spec.structure_sign]
        return _sign(self.spec) * self.spec.structure_scale * weight

    def _log_noise(self, t: int, like: torch.Tensor) -> torch.Tensor:
        return torch.full((len(like),), -self.schedule.half_log_snr(t), device=like.device)


def _mirrored(y: torch.Tensor) -> torch.Tensor:
    """Continue a tile over its borders, so that no position that counts meets the padding."""
    return F.pad(y, (8 * EDGE_POSITIONS,) * 4, mode="reflect")


def inner_positions(embedded: torch.Tensor) -> torch.Tensor:
    """Leave out the positions whose field of view reaches over the border, (..., h, w)."""
    inside = slice(EDGE_POSITIONS, -EDGE_POSITIONS)
    return embedded[..., inside, inside]


class Entropy:
    """Staining: the gradient of ``H(y)``, by the net's own surprisal or by local contrast.

    "surprisal" is ``-ln q_t(y)``, whose gradient is ``eps / sigma_t``: free. "logdet" is half the
    log-determinant of the OD covariance in Gaussian windows of the clean estimate; "histogram"
    the entropy of a soft 32-bin histogram of its mean OD. Both of the latter treat the denoiser
    as the identity (no gradient through the score net).
    """

    def __init__(self, schedule: Schedule, spec: GuidanceSpec, start_step: int) -> None:
        self.schedule, self.spec, self.start_step = schedule, spec, start_step

    def __call__(self, state: StepState) -> torch.Tensor:
        """Give ``sign s_H lam_t grad H``."""
        lam = energy_weight(state.t, self.spec, self.start_step)
        factor = _sign(self.spec) * self.spec.entropy_scale * lam
        if self.spec.entropy == "none" or factor == 0.0:
            return torch.zeros_like(state.y_t)
        if self.spec.entropy == "surprisal":
            return state.eps * (factor / float(self.schedule.sigma[state.t]))
        measure = _logdet if self.spec.entropy == "logdet" else _histogram_entropy
        with torch.enable_grad():
            y = state.y0_hat.detach().clone().clamp(-0.99, 0.99).requires_grad_(True)
            (gradient,) = torch.autograd.grad(measure(y), y)
        return gradient * (factor / float(self.schedule.alpha[state.t]))


def _logdet(y: torch.Tensor) -> torch.Tensor:
    """Sum half the log-determinant of OD covariance over 32 px Gaussian windows (sd 8 px)."""
    od = -torch.log((y + 1.0) / 2.0 + 1e-3)
    pairs = [(i, j) for i in range(3) for j in range(i, 3)]
    mean = [blur(od[:, i : i + 1], 8.0) for i in range(3)]
    cov = {
        (i, j): blur(od[:, i : i + 1] * od[:, j : j + 1], 8.0) - mean[i] * mean[j] for i, j in pairs
    }
    floor = 1e-4
    a, b, c = (cov[i, i] + floor for i in range(3))
    d, e, f = cov[0, 1], cov[0, 2], cov[1, 2]
    det = a * (b * c - f * f) - d * (d * c - f * e) + e * (d * f - b * e)
    return 0.5 * torch.log(det.clamp_min(1e-12)).sum() / (16.0 * 16.0)


def _histogram_entropy(y: torch.Tensor) -> torch.Tensor:
    """Sum the entropy of soft 32-bin histograms of the mean OD, over 32 px windows."""
    od = -torch.log((y + 1.0) / 2.0 + 1e-3).mean(dim=1, keepdim=True)
    centers = torch.linspace(0.0, 2.0, 32, device=y.device).view(1, -1, 1, 1)
    share = torch.softmax(-((od - centers) ** 2) / (2 * 0.06**2), dim=1)
    window = F.avg_pool2d(share, 32, stride=16).clamp_min(1e-8)
    return -(window * window.log()).sum()


class PatchContrast:
    """Local structure from t'_0 down: same place alike, other places unlike (PatchNCE).

    Parameters
    ----------
    net, heads
        The stage-1 net (its encoder gives the features) and the trained heads.
    schedule, spec
        Noise levels; kind ("score" or "l2"), scale and the level where the term begins.
    """

    def __init__(
        self, net: ScoreNet, heads: ContrastHeads, schedule: Schedule, spec: GuidanceSpec
    ) -> None:
        self.net, self.heads, self.schedule, self.spec = net, heads, schedule, spec

    def __call__(self, state: StepState) -> torch.Tensor:
        """Give ``-s_P grad l_PCL(y_t, x_t)``, zero above t'_0."""
        if state.t > self.spec.contrast_below_step or self.spec.contrast == "none":
            return torch.zeros_like(state.y_t)
        alpha, sigma = float(self.schedule.alpha[state.t]), float(self.schedule.sigma[state.t])
        ones = torch.ones(len(state.y_t), device=state.y_t.device)
        with torch.no_grad():
            keys = self.net.features(state.x_t, alpha * ones, sigma * ones)
        with torch.enable_grad():
            y_t = state.y_t.detach().clone().requires_grad_(True)
            queries = self.net.features(y_t, alpha * ones, sigma * ones)
            if self.spec.contrast == "l2":
                loss = _feature_distance(queries, keys)
            else:
                loss = contrast_loss(self.heads, queries, keys, y_t.shape[-1]).sum()
            (gradient,) = torch.autograd.grad(loss, y_t)
        return -self.spec.contrast_scale * gradient


def _feature_distance(queries: list[torch.Tensor], keys: list[torch.Tensor]) -> torch.Tensor:
    """Sum squared differences over positions, mean over channels and levels (the ablation)."""
    terms = [
        (q.float() - k.float()).square().mean(dim=1).sum()
        for q, k in zip(queries, keys, strict=True)
    ]
    return torch.stack(terms).mean()


def contrast_loss(
    heads: ContrastHeads, queries: list[torch.Tensor], keys: list[torch.Tensor], size_px: int
) -> torch.Tensor:
    """Cross-entropy of finding each query's own place among all places of the same tile.

    Parameters
    ----------
    queries, keys
        Encoder features by level, (B, C, h, w).
    size_px
        Tile side.

    Returns
    -------
    torch.Tensor
        float32 (B, P): nats per position, mean over levels (arXiv 2007.15651, eq. 3).

    Notes
    -----
    Positions are the centers of 16 px cells, or the coarsest level's positions where these lie
    further apart: every level answers for the same places.
    """
    cell_px = max(CELL_PX, size_px // min(q.shape[-1] for q in queries))
    losses = []
    for level, (q, k) in enumerate(zip(queries, keys, strict=True)):
        query = heads(level, _at_cells(q, size_px, cell_px))
        key = heads(level, _at_cells(k, size_px, cell_px)).detach()
        logits = torch.einsum("bpe,bqe->bpq", query, key) / heads.spec.temperature
        losses.append(torch.logsumexp(logits, dim=-1) - logits.diagonal(dim1=1, dim2=2))
    return torch.stack(losses).mean(dim=0)


def _at_cells(features: torch.Tensor, size_px: int, cell_px: int) -> torch.Tensor:
    """Sample features (B, C, h, w) at the centers of cells: (B, P, C), float32."""
    stride = max(1, cell_px * features.shape[-1] // size_px)
    picked = features[:, :, stride // 2 :: stride, stride // 2 :: stride]
    return picked.float().flatten(2).transpose(1, 2)


class Sum:
    """Adds terms."""

    def __init__(self, terms: list[Guidance]) -> None:
        self.terms = terms

    def __call__(self, state: StepState) -> torch.Tensor:
        """Give the sum of the terms' gradients."""
        gradients = [term(state) for term in self.terms]
        return functools.reduce(torch.add, gradients) if gradients else torch.zeros_like(state.y_t)


def roll_offsets(side: int, n: int, reach: int = 6) -> list[tuple[int, int]]:
    """List n fixed rolls of a square map that move every place by more than the field of view.

    Parameters
    ----------
    side, reach
        Map side; half the critic's field of view plus one; in positions of 8 px.
    n
        How many; fewer where the map has fewer such offsets. Always the same, evenly spread.

    Raises
    ------
    ConfigError
        The map is too small for any such offset.
    """
    far = [
        (dy, dx)
        for dy in range(side)
        for dx in range(side)
        if max(min(dy, side - dy), min(dx, side - dx)) >= reach
    ]
    if not far:
        raise ConfigError(
            f"A tile is too small to draw negatives from: of its {side} x {side} inner places "
            f"each is within {reach} places of every other.",
            hint=f"Take tiles and crops of at least {16 * (reach + EDGE_POSITIONS)} px.",
        )
    stride = max(1, len(far) // n)
    return far[stride // 2 :: stride][:n]


def _sign(spec: GuidanceSpec) -> float:
    return 1.0 if spec.energy_sign == "ascend" else -1.0
