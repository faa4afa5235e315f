"""Stage 3, the patch-contrast heads on the frozen encoder of stage 1.

In: IHC crops. Out: nats per position. Not here: the loop, the encoder's training.

At inference the query is the picture in the making and the key the noised start image. Training
plays that with IHC alone: the key is a grey copy of the picture, its contrast and sharpness
varied, at the same noise level but under its own noise. Under one noise the heads learn to match
the noise: on blank pictures, where nothing can be found, they then reach 0.04 nats of 4.4.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from wsi_stain.config import TrainConfig
from wsi_stain.train.data import ImageSet
from wsi_stain.train.score import HELD_OUT_CROPS
from wsi_stain.translate.guidance import contrast_loss
from wsi_stain.translate.networks import ContrastHeads, ScoreNet
from wsi_stain.translate.noise import Schedule

__all__ = ["RefineStage", "grey_copy"]

HELD_OUT_LEVELS = (10, 25, 40)


def grey_copy(y_0: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """Make the neutral grey of the mean optical density, its density scaled by `gamma`.

    Parameters
    ----------
    y_0
        float32 (B, 3, H, W) in [-1, 1].
    gamma
        float32 (B,), about 1.

    Returns
    -------
    torch.Tensor
        float32 (B, 3, H, W) in [-1, 1], three equal channels.
    """
    od = -torch.log(((y_0 + 1.0) / 2.0).clamp_min(1 / 255)).mean(dim=1, keepdim=True)
    grey = 2.0 * torch.exp(-gamma.view(-1, 1, 1, 1) * od) - 1.0
    return grey.expand(-1, 3, -1, -1)


class RefineStage:
    """Stage 3 for the loop.

    Parameters
    ----------
    config
        Recipe: heads' shape.
    encoder
        Trained stage-1 net; frozen here.
    train, held_out
        Crops to learn from, and to judge by.
    device
        Where to train.
    """

    def __init__(
        self,
        config: TrainConfig,
        encoder: ScoreNet,
        train: ImageSet,
        held_out: ImageSet,
        device: torch.device,
    ) -> None:
        torch.manual_seed(config.seed)
        self.net: ContrastHeads = ContrastHeads(config.heads, encoder.spec.channels).to(device)
        self.encoder = encoder.to(device).eval().requires_grad_(False)
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
        """Loss of one batch, per position."""
        steps = torch.from_numpy(rng.integers(1, HELD_OUT_LEVELS[-1] + 1, len(y_0)))
        gamma = torch.from_numpy(np.exp(0.25 * rng.standard_normal(len(y_0)))).float()
        queries, keys = self._features(y_0, steps.to(self.device), gamma, generator)
        return contrast_loss(self.net, queries, keys, y_0.shape[-1])

    def evaluate(self) -> dict[str, float]:
        """Held-out nats per position, and how often the own place wins, by level."""
        values: dict[str, float] = {}
        gamma = torch.ones(len(self.held_out))
        for step in HELD_OUT_LEVELS:
            generator = torch.Generator(self.device).manual_seed(step)
            steps = torch.full((len(self.held_out),), step, device=self.device)
            with torch.inference_mode():
                features = self._features(self.held_out, steps, gamma, generator)
                loss = contrast_loss(self.net, *features, self.held_out.shape[-1])
            values[f"nats_{step}"] = float(loss.mean())
            values[f"sure_{step}"] = float((loss < np.log(2.0)).float().mean())
        return values

    @torch.no_grad()
    def _features(
        self,
        y_0: torch.Tensor,
        steps: torch.Tensor,
        gamma: torch.Tensor,
        generator: torch.Generator,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        alpha, sigma = (table[steps] for table in self.schedule.tables(self.device))
        key = grey_copy(y_0, gamma.to(self.device))
        soft = F.avg_pool2d(F.pad(key, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        key = torch.where((gamma < 1.0).to(self.device).view(-1, 1, 1, 1), soft, key)
        shape = (-1, 1, 1, 1)

        def encode(y: torch.Tensor) -> list[torch.Tensor]:
            field = torch.randn(y_0.shape, generator=generator, device=self.device)
            y_t = alpha.view(shape) * y + sigma.view(shape) * field
            return self.encoder.features(y_t, alpha, sigma)

        return encode(y_0), encode(key)
