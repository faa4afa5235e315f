"""The student by regularized distribution matching (arXiv 2406.14762): two scores, one difference.

In: teacher pairs' inputs, a guided teacher. Out: one number per sample. Not here: the loop, files.

The student's outputs are noised; the true score says where IHC is likelier, the fake score, which
follows the student, where the student's own pictures are. Their difference moves the student
toward the true distribution, and it stops where both agree. The true score is the teacher's guided
one, so that the energy (structure kept, staining free) is the cost that ties output to input.
"""

from __future__ import annotations

import numpy as np
import torch

from wsi_stain.config import TrainConfig
from wsi_stain.train.regress import RegressStage, regress_loss
from wsi_stain.train.score import score_loss
from wsi_stain.train.teacher_pairs import PairBatch, Pairs
from wsi_stain.translate.networks import ScoreNet
from wsi_stain.translate.noise import Schedule
from wsi_stain.translate.sampler import Sampler

__all__ = ["MatchStage", "match_loss"]

ADAM_BETAS = (0.0, 0.99)
"""No momentum: the fake score's target moves with the student."""


def match_loss(y_0: torch.Tensor, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Give a loss whose gradient is the difference of two scores, as clean estimates.

    Parameters
    ----------
    y_0
        What the student made, float32 (B, 3, H, W), with gradient.
    real, fake
        Clean estimates of its noised copy by the true and the fake score, without gradient.

    Returns
    -------
    torch.Tensor
        float32 (B,). The gradient with respect to `y_0` points along ``fake - real``: descending
        it moves the picture from the fake estimate to the real one. Its size is that of the
        difference relative to the mean ``|y_0 - real|``, so that all noise levels weigh alike
        (Yin et al. 2023, arXiv 2311.18828, eq. 8).
    """
    dims = tuple(range(1, y_0.ndim))
    size = (y_0.detach() - real).abs().mean(dim=dims, keepdim=True).clamp_min(1e-3)
    wanted = y_0.detach() - (fake - real) / size
    return 0.5 * (y_0 - wanted).square().mean(dim=dims)


class MatchStage(RegressStage):
    """The student by distribution matching, for the loop.

    Parameters
    ----------
    config
        Recipe.
    net
        Student, usually one that has learned by regression.
    fake
        Score net that follows the student; starts as the true one.
    teacher
        Guided reverse process: gives the true score.
    train, held_out
        Teacher pairs. Targets are used for `regress_weight` and the held-out curve only.
    device
        Where to train.

    Notes
    -----
    **Invariant**: fake score and its optimizer live in `memory`, so a resumed run follows the
    undisturbed one.
    """

    def __init__(
        self,
        config: TrainConfig,
        net: ScoreNet,
        fake: ScoreNet,
        teacher: Sampler,
        train: Pairs,
        held_out: Pairs,
        device: torch.device,
    ) -> None:
        schedule: Schedule = teacher.schedule
        start_step = teacher.solver.start_step
        super().__init__(config, net, schedule, start_step, train, held_out, device)
        self.teacher = teacher
        self.fake: ScoreNet = fake.to(device).train().requires_grad_(True)
        self.optimizer, self.memory = _prepare_adam(self.fake, config.distill.fake_lr)

    def loss(
        self, batch: PairBatch, rng: np.random.Generator, generator: torch.Generator
    ) -> torch.Tensor:
        """Teach the fake score one step; give the student's loss per sample."""
        y_0 = self.estimates(batch)[-1]
        low, high = self.config.distill.match_levels
        level = int(rng.integers(low, min(high, self.schedule.timesteps) + 1))
        eps = self._randn(y_0, generator)
        total = match_loss(y_0, *self._two_estimates(y_0.detach(), eps, level, batch))
        if self.config.distill.regress_weight > 0.0:
            anchor = regress_loss(y_0, batch.target, self.config.distill)
            total = total + self.config.distill.regress_weight * anchor
        self._follow(y_0.detach(), rng, generator)
        return total

    @torch.no_grad()
    def _two_estimates(
        self, y_0: torch.Tensor, eps: torch.Tensor, level: int, batch: PairBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        alpha, sigma = float(self.schedule.alpha[level]), float(self.schedule.sigma[level])
        y_t = alpha * y_0.clamp(-1.0, 1.0) + sigma * eps
        ones = torch.ones(len(y_t), device=self.device)
        fake = self.fake.denoise(y_t, alpha * ones, sigma * ones).clamp(-1.0, 1.0)
        if level <= self.grid[0]:
            taught = self.teacher.clean_estimate(y_t, level, level - 1, batch.view)
            batch.view.seen.require_finite()
            return taught, fake
        # Above the start step the guidance was never trained.
        return self.teacher.denoise(y_t, alpha * ones, sigma * ones).clamp(-1.0, 1.0), fake

    def _follow(
        self, y_0: torch.Tensor, rng: np.random.Generator, generator: torch.Generator
    ) -> None:
        """Take one denoising step of the fake score on the student's own pictures."""
        low, high = self.config.distill.match_levels
        steps = torch.from_numpy(rng.integers(low, high + 1, len(y_0))).to(self.device)
        eps = self._randn(y_0, generator)
        self.optimizer.zero_grad(set_to_none=True)
        loss = score_loss(self.fake, self.schedule, y_0.clamp(-1.0, 1.0), steps, eps)
        loss.mean().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.fake.parameters(), self.config.grad_clip)
        self.optimizer.step()

    def _randn(self, y_0: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(y_0.shape, generator=generator, device=self.device)


def _prepare_adam(net: ScoreNet, lr: float) -> tuple[torch.optim.Adam, dict[str, torch.Tensor]]:
    """Build an optimizer whose state exists from the start, and name all that it changes."""
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, betas=ADAM_BETAS)
    memory: dict[str, torch.Tensor] = {}
    for name, p in net.named_parameters():
        state = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
        optimizer.state[p] = state
        memory[f"fake.{name}"] = p.detach()
        memory |= {f"fake.{key}.{name}": tensor for key, tensor in state.items()}
    return optimizer, memory
