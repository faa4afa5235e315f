"""The student by regression on the deterministic teacher: its loss and its held-out curve.

In: teacher pairs. Out: one number per sample. Not here: the loop, files, distributions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from wsi_stain.config import DistillConfig, StudentSpec, TrainConfig
from wsi_stain.stain.density import dab_od
from wsi_stain.train.teacher_pairs import PairBatch, Pairs
from wsi_stain.translate.networks import ScoreNet
from wsi_stain.translate.noise import START_NOISE_STEP, Schedule
from wsi_stain.translate.pixels import to_rgb
from wsi_stain.translate.sampler import step_grid
from wsi_stain.translate.student import context_of, student_estimates

__all__ = ["RegressStage", "density_of", "regress_loss"]

SCALES = (1, 2, 4)
"""Averages over so many pixels are compared too: colors of nuclei, not of grains."""
OD_FLOOR = 0.02
"""Light that even black lets through, so that the density's slope stays bounded."""
GRAIN_PX = 8
POSITIVE_OD = 0.15
HELD_OUT_BATCH = 8


def density_of(y: torch.Tensor) -> torch.Tensor:
    """Give the optical density of pictures in [-1, 1] against white, bounded by 3.9."""
    return -torch.log(((y + 1.0) / 2.0).clamp_min(0.0) + OD_FLOOR)


def regress_loss(made: torch.Tensor, target: torch.Tensor, config: DistillConfig) -> torch.Tensor:
    """Mean absolute difference in grey levels and density at 3 scales, of edges, of grain.

    An absolute difference alone is least for the median, which is smooth where detail cannot be
    foretold. So the local strength of detail is compared too, whatever its exact place.

    Parameters
    ----------
    made, target
        float32 (B, 3, H, W), about [-1, 1].
    config
        `od_weight`, `edge_weight`, `grain_weight`.

    Returns
    -------
    torch.Tensor
        float32 (B,); 0 for equal pictures.
    """
    total = made.new_zeros(len(made))
    for scale in SCALES:
        a, b = F.avg_pool2d(made, scale), F.avg_pool2d(target, scale)
        total = total + _mean(a - b)
        total = total + config.od_weight * _mean(density_of(a) - density_of(b))
    difference = made - target
    edges = _mean(difference.diff(dim=2)) + _mean(difference.diff(dim=3))
    grain = _mean(_grain(made) - _grain(target))
    return total / len(SCALES) + config.edge_weight * edges + config.grain_weight * grain


def _grain(y: torch.Tensor) -> torch.Tensor:
    """Mean absolute Laplacian over 8 px squares, (B, 3, h, w)."""
    return F.avg_pool2d(_laplacian(y).abs(), GRAIN_PX, stride=GRAIN_PX // 2)


def _laplacian(y: torch.Tensor) -> torch.Tensor:
    inner = y[..., 1:-1, 1:-1]
    sides = y[..., :-2, 1:-1] + y[..., 2:, 1:-1] + y[..., 1:-1, :-2] + y[..., 1:-1, 2:]
    return sides - 4.0 * inner


def _mean(difference: torch.Tensor) -> torch.Tensor:
    return difference.abs().mean(dim=(1, 2, 3))


class RegressStage:
    """The student for the loop.

    Parameters
    ----------
    config
        Recipe.
    net
        Student, with the weights to start from.
    schedule, start_step
        Noise levels; the one where the start image enters.
    train, held_out
        Teacher pairs to learn from, and to judge by.
    device
        Where to train.
    """

    def __init__(
        self,
        config: TrainConfig,
        net: ScoreNet,
        schedule: Schedule,
        start_step: int,
        train: Pairs,
        held_out: Pairs,
        device: torch.device,
    ) -> None:
        torch.manual_seed(config.seed)
        self.net: ScoreNet = net.to(device).train().requires_grad_(True)
        self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.config, self.schedule, self.device = config, schedule, device
        self.train, self.held_out = train, held_out
        self.grid = student_grid(config.distill.evaluations, start_step)
        self.memory: dict[str, torch.Tensor] = {}

    def loss(
        self, batch: PairBatch, rng: np.random.Generator, generator: torch.Generator
    ) -> torch.Tensor:
        """Loss of one batch, per sample; all evaluations of the student count alike."""
        losses = [regress_loss(y, batch.target, self.config.distill) for y in self.estimates(batch)]
        return torch.stack(losses).mean(dim=0)

    def draw(self, rng: np.random.Generator) -> PairBatch:
        """Draw a batch of crops."""
        crop_px = self.config.distill.crop_px
        return self.train.batch(self.config.batch, crop_px, rng, self.device)

    def estimates(self, batch: PairBatch) -> list[torch.Tensor]:
        """Run the student: its clean estimate at each level, the result last."""
        view, top = batch.view, self.grid[0]
        alpha, sigma = float(self.schedule.alpha[top]), float(self.schedule.sigma[top])
        y_t = alpha * view.x_0 + sigma * view.noise(START_NOISE_STEP)
        context = context_of(view.x_0, view.edges)
        return student_estimates(self.net, self.schedule, self.grid, y_t, context)

    def evaluate(self) -> dict[str, float]:
        """Compare student and teacher on whole held-out pairs.

        Returns
        -------
        dict
            "grey": mean absolute difference, grey levels. "sharpness": mean absolute Laplacian of
            the student over the teacher's; 1 is wanted, below is blur. "dab" and "dab_teacher":
            share of pixels with a DAB density above 0.15.
        """
        grey, sharp, dab = [], [], []
        for start in range(0, len(self.held_out), HELD_OUT_BATCH):
            picks = np.arange(start, min(start + HELD_OUT_BATCH, len(self.held_out)))
            batch = self.held_out.whole(picks, self.device)
            with torch.inference_mode():
                made = self.estimates(batch)[-1].clamp(-1.0, 1.0)
            grey.append(127.5 * _mean(made - batch.target))
            sharp.append(torch.stack([_sharpness(made), _sharpness(batch.target)]))
            dab.append([_dab_share(made), _dab_share(batch.target)])
        sharpness = torch.cat(sharp, dim=1).mean(dim=1)
        shares = np.mean(dab, axis=0)
        return {
            "grey": float(torch.cat(grey).mean()),
            "sharpness": float(sharpness[0] / sharpness[1]),
            "dab": float(shares[0]),
            "dab_teacher": float(shares[1]),
        }


def student_grid(evaluations: int, start_step: int) -> list[int]:
    """List the student's levels, as its sampler visits them."""
    return step_grid(StudentSpec(steps=evaluations, start_step=start_step))


def _sharpness(y: torch.Tensor) -> torch.Tensor:
    """Mean absolute Laplacian per sample, (B,)."""
    return _mean(_laplacian(y))


def _dab_share(y: torch.Tensor) -> float:
    return float(np.mean(dab_od(to_rgb(y)) > POSITIVE_OD))
