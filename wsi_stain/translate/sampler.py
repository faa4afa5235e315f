"""Room 3 of 4: the guided reverse process. One solver: teacher, DDIM and 2M are its settings.

In: start image, a noise function, a guidance. Out: the clean estimate. Not here: bars, files,
devices, drawing of noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from wsi_stain.config import GuidanceSpec, SolverSpec
from wsi_stain.errors import DeviceError
from wsi_stain.translate.guidance import Guidance, StepState
from wsi_stain.translate.maps import gradient_map
from wsi_stain.translate.noise import MAP_NOISE_STEP, START_NOISE_STEP, Schedule
from wsi_stain.translate.structure import edge_map

__all__ = ["Denoiser", "Noise", "Sampler", "View", "plan_move", "step_grid"]

Noise = Callable[[int], torch.Tensor]
"""``noise(step)`` gives the field of that step for the current batch, float32 (B, 3, H, W)."""


class Denoiser(Protocol):
    """Whatever estimates the clean picture; `ScoreNet.denoise` is one."""

    def __call__(self, y_t: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Map y_t (B, 3, H, W) and the schedule (B,), or (1,) for all, to y0_hat."""
        ...


def step_grid(solver: SolverSpec) -> list[int]:
    """List the noise levels a solver visits, S first and 0 last, strictly falling.

    Where rounding would repeat a level the grid is shorter than asked: 300 steps from S = 300
    is every integer.
    """
    n, start = solver.steps, solver.start_step
    levels = [round(start * (1.0 - i / n) ** solver.spacing) for i in range(n)]
    return [*sorted({max(1, level) for level in levels}, reverse=True), 0]


@dataclass(frozen=True)
class Move:
    """One step of the solver in numbers: ``y_s = keep y_t + pull D + spread xi``.

    Attributes
    ----------
    keep, pull, spread
        Weights of the current picture, of the clean estimate and of unit noise.
    h
        Step in half log-SNR; infinite for the last.
    """

    keep: float
    pull: float
    spread: float
    h: float


def plan_move(schedule: Schedule, t: int, s: int, eta: float) -> Move:
    """Weigh a step from level t to s < t.

    Notes
    -----
    The exact solution of the linear part with a constant clean estimate (Lu et al. 2022,
    arXiv 2211.01095, eq. 9; eta as in k-diffusion's 2M SDE). With ``eta = 1`` and ``s = t - 1``
    it is the ancestral step of DDPM: mean and variance of ``q(y_{t-1} | y_t, y_0)``.
    """
    if s == 0:
        return Move(0.0, 1.0, 0.0, math.inf)
    h = schedule.half_log_snr(s) - schedule.half_log_snr(t)
    ratio = float(schedule.sigma[s] / schedule.sigma[t])
    return Move(
        keep=ratio * math.exp(-eta * h),
        pull=float(schedule.alpha[s]) * -math.expm1(-(1.0 + eta) * h),
        spread=float(schedule.sigma[s]) * math.sqrt(-math.expm1(-2.0 * eta * h)),
        h=h,
    )


def path_weights(schedule: Schedule, t: int, s: int, eta: float) -> list[tuple[int, float]]:
    """Weigh the unit steps' noise fields so that a long step follows the same Brownian path.

    Returns
    -------
    list of (level, weight)
        Squares sum to 1: the noise of the interval is ``sum weight * noise(level)``.
    """
    lam = schedule.half_log_snr
    weights = []
    for u in range(t, s, -1):
        drift = math.exp(-eta * (lam(s) - lam(u - 1)))
        weights.append((u, drift * math.sqrt(-math.expm1(-2.0 * eta * (lam(u - 1) - lam(u))))))
    norm = math.sqrt(sum(w * w for _, w in weights))
    return [(u, w / norm) for u, w in weights]


class Extremes:
    """Notes the extremes of what is computed, to be looked at once, when all is done.

    To look is to wait for the device, which then waits for the next step's kernels.
    """

    def __init__(self) -> None:
        self._extremes: list[torch.Tensor] = []
        self._names: list[tuple[str, int]] = []

    def add(self, values: torch.Tensor, t: int, term: str) -> None:
        """Note what a term gave at step t."""
        # The extremes of an array with NaN are NaN: one pass instead of four.
        self._extremes.append(torch.stack(values.aminmax()))
        self._names.append((term, t))

    def require_finite(self) -> None:
        """Refuse a result on the way to which a value was not finite.

        Raises
        ------
        DeviceError
            Step and term of the first such value are named.
        """
        finite = torch.isfinite(torch.stack(self._extremes)).all(dim=1).tolist()
        if all(finite):
            return
        term, t = self._names[finite.index(False)]
        raise DeviceError(
            f"The {term} gave a value that is not finite at step {t}.",
            hint="Run again with --device cpu to tell a broken device from a broken bundle.",
        )


@dataclass(frozen=True)
class View:
    """What a batch is translated from, the same in all steps.

    Attributes
    ----------
    x_0
        Start image, float32 (B, 3, H, W).
    edges
        Clean edge map of the H&E, float32 (B, 1, H, W).
    noise
        Noise fields, by step.
    map_scale
        Scale of the gradient map; in training one per sample, (B, 1, 1, 1). None where no term
        looks at the map.
    seen
        Notes what net and guidance give.
    """

    x_0: torch.Tensor
    edges: torch.Tensor
    noise: Noise
    map_scale: float | torch.Tensor | None
    seen: Extremes = field(default_factory=Extremes)


class Sampler:
    """Guided reverse process from a start image (METHOD: section 3).

    Parameters
    ----------
    schedule
        Noise levels.
    denoise
        Clean estimate, usually `ScoreNet.denoise`.
    guidance
        Energy gradient, or none for the unguided process.
    solver, spec
        Solver settings; guidance settings (clip, kind of map, its noise).

    Notes
    -----
    **Invariant**: a tile's result depends on its start image and its noise, never on the other
    tiles of the batch.
    """

    net_name = "score net"
    """What a fault of the net is called."""

    def __init__(
        self,
        schedule: Schedule,
        denoise: Denoiser,
        guidance: Guidance | None,
        solver: SolverSpec,
        spec: GuidanceSpec,
    ) -> None:
        self.schedule, self.denoise, self.guidance = schedule, denoise, guidance
        self.solver, self.spec = solver, spec
        self.grid = step_grid(solver)

    @torch.no_grad()
    def __call__(
        self,
        x_0: torch.Tensor,
        noise: Noise,
        map_scale: float | torch.Tensor | None,
        source: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the whole process.

        Parameters
        ----------
        x_0
            Start image x'_0, float32 (B, 3, H, W) in [-1, 1].
        noise
            Noise fields of this batch, by step.
        map_scale
            99th percentile of the slide's clean gradient map: one number per slide, or
            (B, 1, 1, 1) where a batch mixes slides; none where no term looks at the map.
        source
            The H&E itself, float32 (B, 3, H, W) in [-1, 1], whose edges are to be kept; none: those
            of the start image.

        Returns
        -------
        torch.Tensor
            y_0, float32 (B, 3, H, W) in [-1, 1].

        Raises
        ------
        DeviceError
            A value stopped being finite; the step and the term are named.
        """
        view = View(x_0, edge_map(x_0 if source is None else source), noise, map_scale)
        y_t = self.start(x_0, noise)
        previous: torch.Tensor | None = None
        h_previous = math.inf
        for t, s in zip(self.grid, self.grid[1:], strict=False):
            y0_hat = self.clean_estimate(y_t, t, s, view)
            move = plan_move(self.schedule, t, s, self.solver.eta)
            y_t = self.step(y_t, y0_hat, previous, move, h_previous)
            if move.spread > 0.0:
                y_t = y_t + move.spread * self._path(t, s, noise)
            previous, h_previous = y0_hat, move.h
        view.seen.require_finite()
        return y_t.clamp(-1.0, 1.0)

    def start(self, x_0: torch.Tensor, noise: Noise) -> torch.Tensor:
        """Draw ``y_S ~ q(y_S | x'_0)``."""
        top = self.solver.start_step
        alpha, sigma = float(self.schedule.alpha[top]), float(self.schedule.sigma[top])
        return alpha * x_0 + sigma * noise(START_NOISE_STEP)

    def step(
        self,
        y_t: torch.Tensor,
        y0_hat: torch.Tensor,
        previous: torch.Tensor | None,
        move: Move,
        h_previous: float,
    ) -> torch.Tensor:
        """Take one deterministic step; the caller adds the noise.

        Order 2 extrapolates the clean estimate through the previous one (DPM-Solver++ 2M); the
        first and the last step are of order 1.
        """
        estimate = y0_hat
        if self.solver.order == 2 and previous is not None and math.isfinite(move.h):
            bend = 0.5 * move.h / h_previous
            estimate = torch.lerp(previous, y0_hat, 1.0 + bend)
        return torch.add(move.keep * y_t, estimate, alpha=move.pull)

    def clean_estimate(self, y_t: torch.Tensor, t: int, s: int, view: View) -> torch.Tensor:
        """Estimate y_0 at level t, shifted by the energy's gradient, in [-1, 1]."""
        alpha, sigma = float(self.schedule.alpha[t]), float(self.schedule.sigma[t])
        ones = torch.ones(1, device=y_t.device)
        y0_hat = self.look(y_t, alpha * ones, sigma * ones, view)
        view.seen.add(y0_hat, t, self.net_name)
        if self.guidance is None:
            return y0_hat.clamp(-1.0, 1.0)
        state = StepState(
            t=t,
            y_t=y_t,
            y0_hat=y0_hat,
            start=view.x_0,
            edges=view.edges,
            draw_eps=lambda: (y_t - alpha * y0_hat) / sigma,
            draw_x_t=lambda: alpha * view.x_0 + sigma * view.noise(START_NOISE_STEP),
            draw_g_t=lambda: self._map(view, t),
        )
        gradient = clip_gradient(self.guidance(state), self.spec, sigma)
        view.seen.add(gradient, t, "guidance")
        return torch.add(y0_hat, gradient, alpha=self._shift(t, s)).clamp_(-1.0, 1.0)

    def look(
        self, y_t: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, view: View
    ) -> torch.Tensor:
        """Run the net; the score net sees the noised picture alone."""
        return self.denoise(y_t, alpha, sigma)

    def _shift(self, t: int, s: int) -> float:
        """``sigma^2 / alpha`` at t (score substitution), or at s (the posterior-mean form)."""
        return self.schedule.kappa(s if self.solver.shift == "mean" else t)

    def _map(self, view: View, t: int) -> torch.Tensor:
        if view.map_scale is None:
            raise AssertionError("a term looks at a map whose scale was not measured")
        level = max(t, self.spec.map_floor_step)
        field = MAP_NOISE_STEP if self.spec.map_noise == "independent" else START_NOISE_STEP
        alpha, sigma = float(self.schedule.alpha[level]), float(self.schedule.sigma[level])
        noised = alpha * view.x_0 + sigma * view.noise(field)
        return gradient_map(noised, self.spec.gradient_map, view.map_scale)

    def _path(self, t: int, s: int, noise: Noise) -> torch.Tensor:
        weighted = [w * noise(u) for u, w in path_weights(self.schedule, t, s, self.solver.eta)]
        return torch.stack(weighted).sum(dim=0) if len(weighted) > 1 else weighted[0]


def clip_gradient(gradient: torch.Tensor, spec: GuidanceSpec, sigma: float) -> torch.Tensor:
    """Bound the guidance: its rms over channels may not pass ``clip_limit / sigma``.

    Parameters
    ----------
    gradient
        float32 (B, 3, H, W).
    spec
        `clip` "pixel" bounds each pixel's 3-vector on its own (independent of the window),
        "tile" each tile by one factor, "off" nothing.
    sigma
        Noise level; the score's own size is about ``1 / sigma``.
    """
    if spec.clip == "off":
        return gradient
    dims = (1,) if spec.clip == "pixel" else (1, 2, 3)
    rms = gradient.square().mean(dim=dims, keepdim=True).sqrt()
    return gradient * (spec.clip_limit / sigma / rms.clamp_min(1e-12)).clamp_max(1.0)
