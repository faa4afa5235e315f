"""Room 3 of 4: the schedule, and noise that belongs to a place on the slide.

In: step numbers, places. Out: float64 tables, float32 normals. Not here: any other randomness;
the sampler draws nothing itself.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from wsi_stain.config import BundleSpec

__all__ = ["MAP_NOISE_STEP", "NoiseField", "Schedule"]

START_NOISE_STEP = 0
"""The field e, shared by y_S and every x_t."""
MAP_NOISE_STEP = 1001
"""The field that noises the gradient map, independent of every other."""

_GOLDEN = 0x9E3779B97F4A7C15
_ROW, _COL = 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_U64 = (1 << 64) - 1


class Schedule:
    """Discrete variance-preserving schedule (DDPM): ``q_t = N(alpha_t y_0, sigma_t^2)``.

    Parameters
    ----------
    timesteps
        T; step 0 is clean, step T almost pure noise.
    beta_first, beta_last
        Ends of the linear beta ramp.

    Attributes
    ----------
    alpha, sigma
        float64 (T + 1,): ``alpha^2 + sigma^2 = 1``; ``alpha[0] = 1``.

    Notes
    -----
    Ho et al. 2020 (arXiv 2006.11239), section 2. Tables are float64 on the CPU: steps are few.
    """

    def __init__(
        self, timesteps: int = 1000, beta_first: float = 1e-4, beta_last: float = 2e-2
    ) -> None:
        self.timesteps = timesteps
        beta = np.linspace(beta_first, beta_last, timesteps, dtype=np.float64)
        log_abar = np.concatenate([[0.0], np.cumsum(np.log1p(-beta))])
        self.alpha: NDArray[np.float64] = np.exp(0.5 * log_abar)
        self.sigma: NDArray[np.float64] = np.sqrt(-np.expm1(log_abar))

    @classmethod
    def of(cls, spec: BundleSpec) -> Schedule:
        """Build the schedule that a bundle was trained with."""
        return cls(spec.timesteps, spec.beta_first, spec.beta_last)

    def kappa(self, step: int) -> float:
        """Shift of the clean estimate by a unit gradient of the energy: ``sigma^2 / alpha``."""
        return float(self.sigma[step] ** 2 / self.alpha[step])

    def half_log_snr(self, step: int) -> float:
        """``ln(alpha / sigma)``: the solver's clock. Infinite at step 0."""
        if step == 0:
            return math.inf
        return float(math.log(self.alpha[step]) - math.log(self.sigma[step]))

    def tables(self, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """Give alpha and sigma as float32 tensors (T + 1,) for batched look-up in training."""
        alpha = torch.from_numpy(self.alpha).float().to(device)
        sigma = torch.from_numpy(self.sigma).float().to(device)
        return alpha, sigma


class NoiseField:
    """Standard normal noise as a function of (seed, step, absolute place, channel).

    The same place gets the same value whatever tile, batch, worker or restart asks: overlapping
    tiles agree, and a run can be repeated in any order. A counter-based integer hash
    (splitmix64's finalizer over a row and a column key) feeds Box and Muller's transform.

    Parameters
    ----------
    seed
        Run seed, 0 <= seed < 2**31.

    Notes
    -----
    **Invariant**: integer arithmetic is exact on every device, so two devices differ only in the
    last bits of ``log``, ``cos`` and ``sqrt``. Steele et al. 2014, "Fast splittable pseudorandom
    number generators", gives the mixing constants.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def at(self, places_xy: torch.Tensor, step: int, size_px: int) -> torch.Tensor:
        """Draw the field over square tiles.

        Parameters
        ----------
        places_xy
            int64 (B, 2): left and top of each tile in the model's frame, px; may be negative.
        step
            Which field: 0 is the start noise, 1..T the solver's, 1001 the gradient map's.
        size_px
            Tile side, px.

        Returns
        -------
        torch.Tensor
            float32 (B, 3, size_px, size_px), N(0, 1), on the device of `places_xy`.
        """
        ramp = torch.arange(size_px, device=places_xy.device, dtype=torch.int64)
        cols = (places_xy[:, 0, None] + ramp) * _signed(_COL)
        rows = (places_xy[:, 1, None] + ramp) * _signed(_ROW)
        counter = rows[:, :, None] + cols[:, None, :]
        first = _normals(counter, _key(self.seed, step, 0))
        second = _normals(counter, _key(self.seed, step, 1))[0]
        return torch.stack([*first, second], dim=1)


def _normals(counter: torch.Tensor, key: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn counters (B, H, W) into two independent float32 normals each (Box and Muller)."""
    bits = _mix(counter ^ _signed(key))
    upper = _shift(bits, 40).float().add_(0.5).mul_(2.0**-24)
    lower = (bits & 0xFFFFFF).float().mul_(2.0 * math.pi * 2.0**-24)
    radius = upper.log_().mul_(-2.0).sqrt_()
    return radius * torch.cos(lower), radius * torch.sin(lower)


def _mix(bits: torch.Tensor) -> torch.Tensor:
    bits = (bits ^ _shift(bits, 30)) * _signed(_MIX_1)
    bits = (bits ^ _shift(bits, 27)) * _signed(_MIX_2)
    return bits ^ _shift(bits, 31)


def _shift(bits: torch.Tensor, places: int) -> torch.Tensor:
    """Shift right logically; torch shifts int64 arithmetically."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def _key(seed: int, step: int, lane: int) -> int:
    """Mix the scalars of a field into one 64-bit key, in plain Python integers."""
    key = 0
    for word in (seed, step, lane):
        key = (key + word + 1) * _GOLDEN & _U64
        key = ((key ^ key >> 30) * _MIX_1) & _U64
        key = ((key ^ key >> 27) * _MIX_2) & _U64
        key ^= key >> 31
    return key


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
