"""The color term pulls at the start image's local chroma, and at nothing else."""

from __future__ import annotations

import pytest
import torch

from wsi_stain.config import BundleSpec, GuidanceSpec
from wsi_stain.translate.color import ColorHold
from wsi_stain.translate.guidance import StepState
from wsi_stain.translate.noise import Schedule

SCHEDULE = Schedule.of(BundleSpec(name="test", marker="Ki-67"))


def _not_asked_for() -> torch.Tensor:
    raise AssertionError("the color term looks at the clean estimate alone")


def _state(y0_hat: torch.Tensor, start: torch.Tensor, t: int = 80) -> StepState:
    edges = y0_hat[:, :1]
    return StepState(t, y0_hat, y0_hat, start, edges, *3 * (_not_asked_for,))


def _moved(y0_hat: torch.Tensor, start: torch.Tensor, pull: float, t: int = 80) -> torch.Tensor:
    """Move the clean estimate as the sampler does."""
    term = ColorHold(SCHEDULE, GuidanceSpec(color_pull=pull))
    return y0_hat + SCHEDULE.kappa(t) * term(_state(y0_hat, start, t))


def _noise(seed: int) -> torch.Tensor:
    return 0.3 * torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("t", [5, 80, 150])
@pytest.mark.parametrize("pull", [0.25, 1.0])
def test_a_flat_tint_goes_by_the_share(pull: float, t: int) -> None:
    tint = torch.tensor([0.2, -0.3, 0.1]).view(1, 3, 1, 1)
    y0_hat = _noise(1)
    torch.testing.assert_close(
        _moved(y0_hat, y0_hat + tint, pull, t), y0_hat + pull * tint, atol=1e-5, rtol=0
    )


def test_lightness_is_left_alone() -> None:
    y0_hat, start = _noise(1), _noise(2)
    moved = _moved(y0_hat, start, 1.0)
    torch.testing.assert_close(moved.mean(dim=1), y0_hat.mean(dim=1), atol=1e-5, rtol=0)
    same = _moved(y0_hat, y0_hat + 0.4, 1.0)
    torch.testing.assert_close(same, y0_hat, atol=1e-5, rtol=0)


def test_texture_is_left_alone() -> None:
    """A chroma of alternating pixels lies far over the window's frequencies."""
    y0_hat = torch.zeros(1, 3, 48, 48)
    board = (torch.arange(48)[:, None] + torch.arange(48)) % 2 * 2.0 - 1.0
    start = torch.stack([board, torch.zeros_like(board), -board])[None]
    inner = _moved(y0_hat, start, 1.0)[..., 8:-8, 8:-8]
    assert float(inner.abs().max()) < 0.01


def test_pictures_of_a_batch_do_not_mix() -> None:
    y0_hat, start = _noise(1), _noise(2)
    both = _moved(y0_hat, start, 0.7)
    alone = _moved(y0_hat[1:], start[1:], 0.7)
    torch.testing.assert_close(both[1:], alone, atol=0, rtol=0)
