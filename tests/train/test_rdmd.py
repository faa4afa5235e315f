"""Distribution matching: its gradient in closed form, and a student that moves to the truth."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import structs

from wsi_stain.config import TrainConfig
from wsi_stain.errors import DeviceError
from wsi_stain.manifest import ignore
from wsi_stain.train.checkpoint import load_average
from wsi_stain.train.feed import Feed
from wsi_stain.train.he_fields import load_fields
from wsi_stain.train.loop import fit
from wsi_stain.train.rdmd import MatchStage, match_loss
from wsi_stain.train.teacher_pairs import make_pairs, teacher_of
from wsi_stain.translate.bundle import load_bundle
from wsi_stain.translate.noise import Schedule
from wsi_stain.translate.student import student_net, widen

CPU = torch.device("cpu")


def _randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_gradient_is_the_difference_of_the_estimates_when_differentiated() -> None:
    y_0 = _randn(2, 3, 8, 8).requires_grad_(True)
    real, fake = _randn(2, 3, 8, 8, seed=1), _randn(2, 3, 8, 8, seed=2)
    (gradient,) = torch.autograd.grad(match_loss(y_0, real, fake).sum(), y_0)
    size = (y_0 - real).abs().mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(gradient, (fake - real) / size / y_0[0].numel())
    (none,) = torch.autograd.grad(match_loss(y_0, real, real).sum(), y_0)
    assert not none.any()


class Gaussian(torch.nn.Module):
    """Score model of a normal distribution: its clean estimate is exact for its own numbers."""

    def __init__(self, mean: float, sd: float) -> None:
        super().__init__()
        self.mean = torch.nn.Parameter(torch.tensor(mean))
        self.log_sd = torch.nn.Parameter(torch.tensor(math.log(sd)))

    def denoise(self, y_t: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        """Posterior mean of y_0 given y_t."""
        variance = torch.exp(2.0 * self.log_sd)
        gain = alpha * variance / (alpha**2 * variance + sigma**2)
        return self.mean + gain * (y_t - alpha * self.mean)


@pytest.mark.parametrize(("mean", "sd"), [(0.5, 0.2), (-0.3, 0.6)])
def test_student_moves_to_the_truth_when_all_is_normal(mean: float, sd: float) -> None:
    # Truth N(mean, sd^2); student a + b z starts elsewhere; the fake score learns online.
    truth, fake = Gaussian(mean, sd), Gaussian(0.1, 0.35)
    student = Gaussian(0.1, 0.35)
    schedule, generator = Schedule(), torch.Generator().manual_seed(0)
    slow = torch.optim.Adam(student.parameters(), lr=4e-3, betas=(0.0, 0.99))
    fast = torch.optim.Adam(fake.parameters(), lr=2e-2, betas=(0.0, 0.99))
    rng = np.random.default_rng(0)
    for _ in range(500):
        z = torch.randn((1024, 1), generator=generator)
        y_0 = student.mean + torch.exp(student.log_sd) * z
        step = int(rng.integers(20, 401))
        alpha, sigma = float(schedule.alpha[step]), float(schedule.sigma[step])
        y_t = alpha * y_0.detach() + sigma * torch.randn(y_0.shape, generator=generator)
        with torch.no_grad():
            estimates = truth.denoise(y_t, alpha, sigma), fake.denoise(y_t, alpha, sigma)
        slow.zero_grad()
        match_loss(y_0, *estimates).mean().backward()  # type: ignore[no-untyped-call]
        slow.step()
        fast.zero_grad()
        error = fake.denoise(y_t, alpha, sigma) - y_0.detach()
        (error.square().mean() * (alpha / sigma) ** 2).backward()  # type: ignore[no-untyped-call]
        fast.step()
    assert student.mean.item() == pytest.approx(mean, abs=0.05)
    assert student.log_sd.exp().item() == pytest.approx(sd, rel=0.15)


def _stage(config: TrainConfig, folder: Path) -> MatchStage:
    bundle = load_bundle(config.bundle, CPU, torch.float32)
    again = load_bundle(config.bundle, CPU, torch.float32)
    assert bundle.score is not None
    assert again.score is not None
    net = student_net(bundle.score.spec)
    widen(net, bundle.score.state_dict())
    train, held_out = (
        make_pairs(bundle, config, load_fields(config, split), split, folder, ignore)
        for split in ("train", "val")
    )
    return MatchStage(config, net, again.score, teacher_of(bundle, config), train, held_out, CPU)


@pytest.fixture
def config(distill_config: TrainConfig) -> TrainConfig:
    """Distribution matching, with a little regression."""
    distill = structs.replace(distill_config.distill, loss="rdmd", regress_weight=0.5)
    return structs.replace(distill_config, distill=distill)


def test_fake_score_follows_and_student_learns_when_stepped(
    tmp_path: Path, config: TrainConfig
) -> None:
    stage = _stage(config, tmp_path)
    before = {name: tensor.clone() for name, tensor in stage.memory.items()}
    loss = stage.loss(
        *Feed(stage.draw, np.random.SeedSequence, 0).take(0), torch.Generator().manual_seed(0)
    )
    assert loss.shape == (config.batch,)
    moved = [n for n, tensor in stage.memory.items() if not torch.equal(tensor, before[n])]
    assert any(name == "fake.tail.weight" for name in moved)
    assert float(stage.memory["fake.step.tail.weight"]) == 1.0
    loss.mean().backward()  # type: ignore[no-untyped-call]
    assert stage.net.head.weight.grad is not None
    assert float(stage.net.head.weight.grad[:, 48:].abs().sum()) > 0
    teacher = stage.teacher.denoise.__self__  # type: ignore[attr-defined]
    assert all(p.grad is None for p in teacher.parameters())


def test_nothing_pulls_when_fake_and_true_score_agree_above_the_start(
    tmp_path: Path, config: TrainConfig
) -> None:
    # Above the start step the true score is unguided, and the fake one starts as its copy.
    distill = structs.replace(config.distill, match_levels=(200, 200), regress_weight=0.0)
    stage = _stage(structs.replace(config, distill=distill), tmp_path)
    loss = stage.loss(
        *Feed(stage.draw, np.random.SeedSequence, 0).take(0), torch.Generator().manual_seed(0)
    )
    assert float(loss.detach().abs().max()) < 1e-8
    guided = structs.replace(distill, match_levels=(100, 100))
    stage = _stage(structs.replace(config, distill=guided), tmp_path)
    loss = stage.loss(
        *Feed(stage.draw, np.random.SeedSequence, 0).take(0), torch.Generator().manual_seed(0)
    )
    assert float(loss.detach().min()) > 1e-8  # here the guidance is the difference


def test_resumed_run_is_the_undisturbed_one(tmp_path: Path, config: TrainConfig) -> None:
    whole, split = tmp_path / "whole", tmp_path / "split"
    fit(_stage(config, tmp_path), config, whole, ignore)
    stops = iter([False, False, True])
    fit(_stage(config, tmp_path), config, split, ignore, lambda: next(stops))
    assert load_average(split, "distill")[1] == 4
    fit(_stage(config, tmp_path), config, split, ignore)
    expected, found = (load_average(folder, "distill") for folder in (whole, split))
    assert found[1] == expected[1] == config.samples
    for name, tensor in expected[0].items():
        torch.testing.assert_close(found[0][name], tensor, rtol=0, atol=1e-6)


def test_teacher_that_is_not_finite_is_named(config: TrainConfig, tmp_path: Path) -> None:
    distill = structs.replace(config.distill, match_levels=(100, 100))
    stage = _stage(structs.replace(config, distill=distill), tmp_path)
    drawn = Feed(stage.draw, np.random.SeedSequence, 0).take(0)
    stage.teacher.denoise = lambda y_t, *_: torch.full_like(y_t, float("nan"))
    with pytest.raises(DeviceError, match="score net gave a value that is not finite at step 100"):
        stage.loss(*drawn, torch.Generator().manual_seed(0))
