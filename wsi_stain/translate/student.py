"""Room 3 of 4: the student, one to four evaluations of a net that sees what the teacher saw.

In: start image, edge map, the start's noise. Out: the clean picture. Not here: its training.

The teacher with eta = 0 is a function of the start image, the edges of the H&E that its guidance
keeps, and the noise. The student gets all three: its target is one picture, not a blurred mean.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from msgspec import structs

from wsi_stain.config import GuidanceSpec, NetSpec, StudentSpec
from wsi_stain.translate.color import ColorHold
from wsi_stain.translate.guidance import Guidance, Sum
from wsi_stain.translate.networks import ScoreNet
from wsi_stain.translate.noise import Schedule
from wsi_stain.translate.sampler import Sampler, View, plan_move
from wsi_stain.translate.structure import EdgeInformation

__all__ = [
    "CONTEXT_CHANNELS",
    "StudentSampler",
    "context_of",
    "student_estimates",
    "student_net",
    "widen",
]

CONTEXT_CHANNELS = 4
"""Start image (3) and edge map of the H&E (1)."""


def student_net(spec: NetSpec) -> ScoreNet:
    """Build a student: the score net's shape, its first layer widened by the context."""
    return ScoreNet(spec, CONTEXT_CHANNELS)


def context_of(x_0: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """Join start image (B, 3, H, W) and edge map (B, 1, H, W): what the student sees beside y_t."""
    return torch.cat([x_0, edges], dim=1)


def widen(student: ScoreNet, score: dict[str, torch.Tensor]) -> None:
    """Start a student from a score net: what it knows stays, the context counts for nothing yet.

    Parameters
    ----------
    student
        Changed in place.
    score
        Weights of the score net, any float dtype.

    Notes
    -----
    **Invariant**: afterwards the student's estimate is the score net's, whatever the context.
    """
    own = student.state_dict()
    with torch.no_grad():
        for name, tensor in own.items():
            known = score[name].to(tensor)
            tensor.zero_()
            tensor[tuple(slice(0, side) for side in known.shape)] = known


def student_estimates(
    student: ScoreNet,
    schedule: Schedule,
    grid: Sequence[int],
    y_t: torch.Tensor,
    context: torch.Tensor,
) -> list[torch.Tensor]:
    """Run the student with gradients: one clean estimate per level of the grid.

    Parameters
    ----------
    grid
        Levels, S first and 0 last.
    y_t
        Noised start image at level S, float32 (B, 3, H, W).
    context
        float32 (B, 4, H, W).

    Returns
    -------
    list of torch.Tensor
        y0_hat by level, not clamped; the last is the result. No gradient flows from a level into
        the one before: each has a loss of its own, and memory stays that of one evaluation.
    """
    estimates = []
    ones = torch.ones(len(y_t), device=y_t.device)
    for t, s in itertools.pairwise(grid):
        alpha, sigma = float(schedule.alpha[t]), float(schedule.sigma[t])
        y0_hat = student.denoise(y_t, alpha * ones, sigma * ones, context)
        estimates.append(y0_hat)
        move = plan_move(schedule, t, s, eta=0.0)
        y_t = move.keep * y_t + move.pull * y0_hat.detach().clamp(-1.0, 1.0)
    return estimates


class StudentSampler(Sampler):
    """The reverse process with the student in place of score net and guidance.

    Parameters
    ----------
    schedule
        Noise levels.
    net
        Student.
    solver
        Its steps and its start.
    spec
        The bundle's guidance settings, which the student has learned; of their closed-form
        structure it takes ``solver.edges_push`` in place of their own.
    """

    net_name = "student"

    def __init__(
        self, schedule: Schedule, net: ScoreNet, solver: StudentSpec, spec: GuidanceSpec
    ) -> None:
        own = structs.replace(spec, edges_push=solver.edges_push)
        terms: list[Guidance] = []
        if solver.edges_push > 0.0:
            terms.append(EdgeInformation(schedule, own))
        if own.color_pull > 0.0:
            terms.append(ColorHold(schedule, own))
        super().__init__(schedule, net.denoise, Sum(terms) if terms else None, solver, own)
        self.net = net

    def look(
        self, y_t: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, view: View
    ) -> torch.Tensor:
        """Run the student on the noised picture and what the teacher saw."""
        return self.net.denoise(y_t, alpha, sigma, context_of(view.x_0, view.edges))
