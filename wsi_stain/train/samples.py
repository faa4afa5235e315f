"""Samples of a score net: from noise alone, and from held-out crops noised half way.

In: a score net. Out: tensors, pictures. Not here: guidance, H&E, how new the samples are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from wsi_stain.config import GuidanceSpec, SolverSpec
from wsi_stain.translate.networks import ScoreNet
from wsi_stain.translate.noise import Schedule
from wsi_stain.translate.pixels import to_rgb
from wsi_stain.translate.sampler import Sampler

__all__ = ["lay_out", "redraw", "sample"]

REDRAW_STEP = 200
PURE_STEPS, REDRAW_STEPS = 30, 10
GAP_PX = 4


def sample(
    net: ScoreNet, schedule: Schedule, shape: tuple[int, ...], seed: int, from_step: int
) -> torch.Tensor:
    """Draw pictures from noise: level `from_step` of the mean color of the data.

    Parameters
    ----------
    shape
        (B, 3, H, W).
    from_step
        Highest level that the net was trained at; at 600 the signal is a sixth of the noise.

    Returns
    -------
    torch.Tensor
        float32 (B, 3, H, W) in [-1, 1], on the net's device.
    """
    mean = net.mean.expand(shape).contiguous()
    return _run(net, schedule, mean, seed, SolverSpec(steps=PURE_STEPS, start_step=from_step))


def redraw(net: ScoreNet, schedule: Schedule, y_0: torch.Tensor, seed: int) -> torch.Tensor:
    """Noise real crops to level 200 and take the noise away again: what a translation redraws."""
    return _run(net, schedule, y_0, seed, SolverSpec(steps=REDRAW_STEPS, start_step=REDRAW_STEP))


def _run(
    net: ScoreNet, schedule: Schedule, y_0: torch.Tensor, seed: int, solver: SolverSpec
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(y_0.shape, generator=generator).to(y_0.device)
    sampler = Sampler(schedule, net.denoise, None, solver, GuidanceSpec())
    return sampler(y_0, lambda _: noise, 1.0)


def lay_out(lines: Sequence[torch.Tensor]) -> NDArray[np.uint8]:
    """Lay pictures side by side, one line per batch.

    Parameters
    ----------
    lines
        Batches (B, 3, H, W) in [-1, 1], all of one shape.

    Returns
    -------
    ndarray
        uint8 (h, w, 3), 4 px of white between pictures.
    """
    gap = ((0, 0), (0, GAP_PX), (0, GAP_PX), (0, 0))
    pictures = [np.pad(to_rgb(batch), gap, constant_values=255) for batch in lines]
    return np.concatenate([np.concatenate(list(batch), axis=1) for batch in pictures], axis=0)
