"""Stage 1, the unconditional score model of the IHC stain: its loss and its held-out curve.

In: clean crops, steps, noise. Out: one number per sample. Not here: the loop, files, data.
"""

from __future__ import annotations

import numpy as np
import torch
from msgspec import structs
from numpy.typing import NDArray

from wsi_stain.config import NetSpec, TrainConfig
from wsi_stain.train.data import ImageSet, measure_mean_sd
from wsi_stain.train.samples import lay_out, redraw, sample
from wsi_stain.translate.networks import ScoreNet
from wsi_stain.translate.noise import Schedule

__all__ = [
    "HELD_OUT_STEPS",
    "ScoreStage",
    "draw_steps",
    "eps_errors",
    "score_loss",
    "settle_net",
]

HELD_OUT_STEPS = (10, 40, 80, 150, 220, 300, 500)
"""Noise levels at which the held-out loss is written down."""
HELD_OUT_CROPS = 16
N_PAINTED = 4


def draw_steps(config: TrainConfig, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw noise levels: mostly those that the sampler visits, stratified within the batch.

    Returns
    -------
    ndarray
        int64 (n,) in 1..last_step; a share `focus_fraction` is at most `focus_step`.
    """
    u = (rng.permutation(n) + rng.random(n)) / n
    low = 1 + (u / config.focus_fraction) * config.focus_step
    rest = (u - config.focus_fraction) / max(1e-9, 1.0 - config.focus_fraction)
    high = config.focus_step + 1 + rest * (config.last_step - config.focus_step)
    steps = np.where(u < config.focus_fraction, low, high).astype(np.int64)
    return np.minimum(steps, max(config.last_step, config.focus_step))


def score_loss(
    net: ScoreNet, schedule: Schedule, y_0: torch.Tensor, steps: torch.Tensor, eps: torch.Tensor
) -> torch.Tensor:
    """Denoising loss with unit weight on the inner net's target (Karras et al. 2022, eq. 8).

    Parameters
    ----------
    y_0
        float32 (B, 3, H, W) in [-1, 1].
    steps
        int64 (B,), 1..T.
    eps
        float32 like `y_0`, N(0, 1).

    Returns
    -------
    torch.Tensor
        float32 (B,): mean squared error of F against its target, per sample.
    """
    alpha, sigma = (table[steps] for table in schedule.tables(y_0.device))
    y_t = alpha.view(-1, 1, 1, 1) * y_0 + sigma.view(-1, 1, 1, 1) * eps
    c_skip, c_out, z, inner = net.parts(y_t, alpha, sigma)
    target = (y_0 - net.mean - c_skip * z) / c_out
    return (inner - target).square().mean(dim=(1, 2, 3))


@torch.inference_mode()
def eps_errors(
    net: ScoreNet, schedule: Schedule, y_0: torch.Tensor, seed: int, batch: int = 8
) -> dict[int, float]:
    """Held-out mean squared error of the predicted noise at fixed levels, same noise each time.

    Returns
    -------
    dict
        Step to eps-MSE; 1 is what a net that predicts nothing scores.
    """
    noise = torch.randn(y_0.shape, generator=torch.Generator().manual_seed(seed)).to(y_0.device)
    errors = {}
    for step in HELD_OUT_STEPS:
        alpha, sigma = float(schedule.alpha[step]), float(schedule.sigma[step])
        total = 0.0
        for start in range(0, len(y_0), batch):
            clean, eps = y_0[start : start + batch], noise[start : start + batch]
            y_t = alpha * clean + sigma * eps
            ones = torch.ones(len(clean), device=y_0.device)
            y0_hat = net.denoise(y_t, alpha * ones, sigma * ones)
            total += float(((y_t - alpha * y0_hat) / sigma - eps).square().mean()) * len(clean)
        errors[step] = total / len(y_0)
    return errors


def settle_net(net: NetSpec, train: ImageSet) -> NetSpec:
    """Complete a net's shape with the mean and spread of the data it is trained on."""
    mean, spread = measure_mean_sd(train)
    return structs.replace(net, data_mean=mean, data_sd=spread)


class ScoreStage:
    """Stage 1 for the loop: images in, denoising loss out.

    Parameters
    ----------
    config
        Recipe; `config.net` is the shape, with the data's mean and spread measured here.
    train, held_out
        Crops to learn from, and to judge by.
    device
        Where to train.
    """

    def __init__(
        self, config: TrainConfig, train: ImageSet, held_out: ImageSet, device: torch.device
    ) -> None:
        torch.manual_seed(config.seed)
        self.spec = settle_net(config.net, train)
        self.net: ScoreNet = ScoreNet(self.spec).to(device)
        self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.config, self.train, self.device = config, train, device
        self.memory: dict[str, torch.Tensor] = {}
        self.schedule = Schedule()
        self.held_out = held_out.fixed(HELD_OUT_CROPS, seed=1).to(device)

    def draw(self, rng: np.random.Generator) -> torch.Tensor:
        """Draw clean crops."""
        return self.train.batch(self.config.batch, rng, self.device)

    def loss(
        self, y_0: torch.Tensor, rng: np.random.Generator, generator: torch.Generator
    ) -> torch.Tensor:
        """Loss of one batch, per sample."""
        steps = torch.from_numpy(draw_steps(self.config, len(y_0), rng)).to(self.device)
        eps = torch.randn(y_0.shape, generator=generator, device=self.device)
        return score_loss(self.net, self.schedule, y_0, steps, eps)

    def evaluate(self) -> dict[str, float]:
        """Held-out eps-MSE by step."""
        errors = eps_errors(self.net, self.schedule, self.held_out, seed=2)
        return {f"eps_mse_{step}": error for step, error in errors.items()}

    def paint(self) -> NDArray[np.uint8]:
        """Draw four samples from noise, four held-out crops, and these redrawn from level 200.

        Returns
        -------
        ndarray
            uint8 (h, w, 3), one line each. Costs about 160 evaluations of the net on a crop.
        """
        real = self.held_out[:N_PAINTED]
        top = self.config.last_step
        drawn = sample(self.net, self.schedule, tuple(real.shape), seed=4, from_step=top)
        return lay_out([drawn, real, redraw(self.net, self.schedule, real, seed=4)])
