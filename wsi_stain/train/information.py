"""Held-out information between a picture and its gradient map, against the noise level.

In: a trained critic as a `MineStage`. Out: one line per level, CSV, a picture: the paper's first
experiment. Not here: estimators, training.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from wsi_stain.train.mine import CLIP_NATS, MineStage, dv_estimate, nce_estimate
from wsi_stain.train.plot import Axes, Band, draw_lines

__all__ = ["LEVELS", "Level", "draw_levels", "measure_levels", "to_csv"]

LEVELS = (1, 10, 20, 40, 60, 80, 110, 150, 190, 220, 260, 300)
N_BOOTSTRAP = 1000


@dataclass(frozen=True)
class Level:
    """Information at one noise level, nats per position.

    Attributes
    ----------
    step
        Noise level t of the picture; the map has the same, but never less than the map's floor.
    nats, low, high
        Donsker-Varadhan value with exp f clipped at 5 nats (SMILE), and its 95 % interval over
        crops (percentile bootstrap).
    nce_nats
        InfoNCE value, a lower bound that never passes ln(negatives + 1).
    unrelated_nats
        The first again with the map of another crop: 0 is the truth.
    """

    step: int
    nats: float
    low: float
    high: float
    nce_nats: float
    unrelated_nats: float


def measure_levels(stage: MineStage, seed: int = 0) -> list[Level]:
    """Measure the stage's critic on its held-out crops at each level that it was trained at.

    Parameters
    ----------
    stage
        With a trained net; at least two held-out crops.
    seed
        Of the noise and of the bootstrap.
    """
    stage.net.eval()
    rng = np.random.default_rng(seed)
    return [_measure(stage, step, seed, rng) for step in LEVELS if step <= stage.config.focus_step]


@torch.inference_mode()
def _measure(stage: MineStage, step: int, seed: int, rng: np.random.Generator) -> Level:
    y_0 = stage.held_out
    steps = torch.full((len(y_0),), step, device=y_0.device)
    generator = torch.Generator(y_0.device).manual_seed(1000 * seed + step)
    joint, marginal = stage.scores(y_0, steps, generator)
    apart = stage.scores(y_0, steps, generator, y_0.roll(1, 0))
    low, high = _interval(joint, marginal, len(y_0), rng)
    return Level(
        step,
        dv_estimate(joint, marginal),
        low,
        high,
        nce_estimate(joint, marginal),
        dv_estimate(*apart),
    )


def _interval(
    joint: torch.Tensor, marginal: torch.Tensor, n_crops: int, rng: np.random.Generator
) -> tuple[float, float]:
    """Resample crops: positions of one crop are not independent."""
    own = joint.double().view(n_crops, -1).mean(1).cpu().numpy()
    clipped = marginal.double().clamp(-CLIP_NATS, CLIP_NATS).exp()
    other = clipped.view(len(marginal), n_crops, -1).mean((0, 2)).cpu().numpy()
    picks = rng.integers(n_crops, size=(N_BOOTSTRAP, n_crops))
    values: NDArray[np.float64] = own[picks].mean(1) - np.log(other[picks].mean(1))
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def to_csv(levels: Sequence[Level]) -> str:
    """Write one line per level, four decimals."""
    text = io.StringIO()
    names = [field.name for field in fields(Level)]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for level in levels:
        row = asdict(level)
        writer.writerow({k: v if k == "step" else f"{v:.4f}" for k, v in row.items()})
    return text.getvalue()


def draw_levels(levels: Sequence[Level], title: str) -> Image.Image:
    """Draw nats against the noise level, RGB."""
    name = "I(g; y_t), SMILE"
    lines = {
        name: [(level.step, level.nats) for level in levels],
        "InfoNCE bound": [(level.step, level.nce_nats) for level in levels],
        "map of another crop": [(level.step, level.unrelated_nats) for level in levels],
    }
    band = Band([(level.step, level.low, level.high) for level in levels])
    return draw_lines(lines, Axes(title, "noise level t", "nats per position"), {name: band})
