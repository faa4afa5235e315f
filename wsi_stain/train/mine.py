"""Stage 2, the mutual-information critic: estimators, loss and held-out value.

In: scores of true and rolled pairs. Out: losses and estimates in nats. Not here: the loop.

The critic learns how much a gradient map tells about a noised picture of the same stain. Both
sides are noised independently: otherwise the map is a function of the picture, the information
is infinite and there is nothing to converge to.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional as F

from wsi_stain.config import TrainConfig
from wsi_stain.train.data import ImageSet
from wsi_stain.train.score import HELD_OUT_STEPS
from wsi_stain.translate.guidance import inner_positions, roll_offsets
from wsi_stain.translate.maps import gradient_map
from wsi_stain.translate.networks import Critic
from wsi_stain.translate.noise import Schedule

__all__ = ["MineStage", "dv_estimate", "map_scales", "mi_loss", "nce_estimate", "pair_scores"]

CLIP_NATS = 5.0
HELD_OUT_CROPS = 16


def mi_loss(
    joint: torch.Tensor,
    marginal: torch.Tensor,
    kind: str,
    running: torch.Tensor | None = None,
) -> torch.Tensor:
    """Loss whose minimum makes the score a log-density ratio.

    Parameters
    ----------
    joint
        Scores of true pairs (n,); taken as float32.
    marginal
        Scores of pairs drawn apart (k, n): k for each true pair.
    kind
        "smile": Jensen-Shannon (Song and Ermon 2020, arXiv 1910.06222), read with clipping;
        "mine": Donsker-Varadhan, its gradient unbiased by a running mean of ``E exp f``
        (Belghazi et al. 2018, arXiv 1801.04062, section 3.2); "nce": InfoNCE, at most ln(k + 1).
    running
        For "mine": float32 scalar, updated in place; its log is the denominator.

    Returns
    -------
    torch.Tensor
        Scalar.
    """
    # In bfloat16 the exponentials would lose the information that is sought.
    joint, marginal = joint.float(), marginal.float()
    if kind == "smile":
        return F.softplus(-joint).mean() + F.softplus(marginal).mean()
    if kind == "nce":
        return -_nce(joint, marginal)
    mean_exp = marginal.exp().mean()
    if running is None:
        return -(joint.mean() - mean_exp.log())
    with torch.no_grad():
        running.copy_(mean_exp if float(running) == 0.0 else torch.lerp(running, mean_exp, 0.01))
    return -(joint.mean() - mean_exp / running)


def dv_estimate(
    joint: torch.Tensor, marginal: torch.Tensor, clip_nats: float | None = CLIP_NATS
) -> float:
    """Read the Donsker-Varadhan value ``E f - ln E exp f``, with exp f clipped (SMILE).

    Returns
    -------
    float
        Nats. On data the critic has not seen; on training data it over-fits.
    """
    scores = marginal if clip_nats is None else marginal.clamp(-clip_nats, clip_nats)
    log_mean = torch.logsumexp(scores.flatten().double(), 0) - math.log(scores.numel())
    return float(joint.double().mean() - log_mean)


def nce_estimate(joint: torch.Tensor, marginal: torch.Tensor) -> float:
    """Read the InfoNCE value, nats: a lower bound that never passes ln(k + 1)."""
    return float(_nce(joint, marginal))


def _nce(joint: torch.Tensor, marginal: torch.Tensor) -> torch.Tensor:
    everyone = torch.cat([joint[None], marginal], dim=0)
    return (joint - torch.logsumexp(everyone, dim=0)).mean() + math.log(len(everyone))


def pair_scores(
    critic: Critic, a: torch.Tensor, b: torch.Tensor, reach: int = 6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score each position with its own partner and with fixed rolls inside the same image.

    Parameters
    ----------
    critic
        Gives the bounded score and the number of negatives.
    a, b
        Embeddings of maps and pictures, (B, embed, h, w).

    Returns
    -------
    tuple
        joint (n,) and marginal (k, n), nats; n counts the inner positions of all images.

    Notes
    -----
    The map is the anchor: a map's place meets rolled places of the picture. Anchored on the
    picture, InfoNCE would fix the score only up to a function of the picture, whose gradient
    would be arbitrary guidance (METHOD, section 4). Positions that see the padding are left out:
    they tell their place without any structure.
    """
    a, b = inner_positions(a), inner_positions(b)
    side = a.shape[-1]
    place = torch.arange(side * side, device=a.device).view(side, side)
    offsets = roll_offsets(side, critic.spec.negatives, reach)
    partner = torch.stack([place.roll(offset, (0, 1)).flatten() for offset in offsets], dim=1)
    # One matrix product and a gather: rolled copies of the embeddings would cost ten times more.
    dots = torch.einsum("bep,beq->bpq", a.flatten(2), b.flatten(2))
    joint = critic.bound(dots.diagonal(dim1=1, dim2=2))
    marginal = critic.bound(dots.gather(2, partner.expand(len(a), -1, -1)))
    return joint.flatten(), marginal.movedim(2, 0).flatten(1)


def map_scales(y_0: torch.Tensor, kind: str) -> torch.Tensor:
    """Measure the 99th percentile of each clean map, (B, 1, 1, 1): the slide's scale in small."""
    flat = gradient_map(y_0, kind).flatten(1)
    return torch.quantile(flat, 0.99, dim=1).clamp_min(1e-3).view(-1, 1, 1, 1)


class MineStage:
    """Stage 2 for the loop.

    Parameters
    ----------
    config
        Recipe: critic shape, kind of map and its noise floor.
    train, held_out
        Crops to learn from, and to judge by.
    device
        Where to train.
    """

    def __init__(
        self, config: TrainConfig, train: ImageSet, held_out: ImageSet, device: torch.device
    ) -> None:
        torch.manual_seed(config.seed)
        self.net: Critic = Critic(config.critic).to(device)
        self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.config, self.train, self.device = config, train, device
        self.schedule = Schedule()
        self.held_out = held_out.fixed(HELD_OUT_CROPS, seed=1).to(device)
        self.running = torch.zeros((), device=device)
        self.memory = {"running": self.running} if config.critic.loss == "mine" else {}

    def draw(self, rng: np.random.Generator) -> torch.Tensor:
        """Draw clean crops."""
        return self.train.batch(self.config.batch, rng, self.device)

    def loss(
        self, y_0: torch.Tensor, rng: np.random.Generator, generator: torch.Generator
    ) -> torch.Tensor:
        """Loss of one batch: a scalar, since negatives mix positions."""
        steps = torch.from_numpy(rng.integers(1, self.config.focus_step + 1, len(y_0)))
        joint, marginal = self.scores(y_0, steps.to(self.device), generator)
        return mi_loss(joint, marginal, self.config.critic.loss, self.running)

    def evaluate(self) -> dict[str, float]:
        """Held-out information by step, nats (the summary's first experiment)."""
        # InfoNCE fixes scores up to a function of the map, which Donsker-Varadhan can't read.
        estimate = nce_estimate if self.config.critic.loss == "nce" else dv_estimate
        values = {}
        for step in HELD_OUT_STEPS:
            if step > self.config.focus_step:
                continue
            generator = torch.Generator(self.device).manual_seed(step)
            steps = torch.full((len(self.held_out),), step, device=self.device)
            with torch.inference_mode():
                joint, marginal = self.scores(self.held_out, steps, generator)
            values[f"nats_{step}"] = estimate(joint, marginal)
        return values

    def scores(
        self,
        y_0: torch.Tensor,
        steps: torch.Tensor,
        generator: torch.Generator,
        mapped: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise both sides apart and score their pairs.

        Parameters
        ----------
        y_0
            Pictures, float32 (B, 3, H, W) in [-1, 1].
        steps
            int64 (B,), 1..T.
        generator
            Draws the two noise fields.
        mapped
            Pictures whose maps are taken, like `y_0`; none: the same.

        Returns
        -------
        tuple
            joint (n,) and marginal (k, n), nats, as `pair_scores` gives them.
        """
        mapped = y_0 if mapped is None else mapped
        alpha, sigma = self.schedule.tables(self.device)
        levels = steps.clamp_min(self.config.map_floor_step)
        scales = map_scales(mapped, self.config.gradient_map)

        def noised(y: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
            field = torch.randn(y.shape, generator=generator, device=self.device)
            return alpha[at].view(-1, 1, 1, 1) * y + sigma[at].view(-1, 1, 1, 1) * field

        g_t = gradient_map(noised(mapped, levels), self.config.gradient_map, scales)
        a = self.net.embed_map(g_t, torch.log(sigma[levels] / alpha[levels]))
        b = self.net.embed_picture(noised(y_0, steps), torch.log(sigma[steps] / alpha[steps]))
        return pair_scores(self.net, a, b)
