"""Stage 1: its loss against closed forms, and which noise levels it sees."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from msgspec import structs

from wsi_stain.config import DataConfig, NetSpec, TrainConfig
from wsi_stain.train.data import ImageSet, measure_mean_sd
from wsi_stain.train.feed import Feed
from wsi_stain.train.score import (
    HELD_OUT_STEPS,
    ScoreStage,
    draw_steps,
    eps_errors,
    score_loss,
    settle_net,
)
from wsi_stain.translate.networks import ScoreNet
from wsi_stain.translate.noise import Schedule

NET = NetSpec(channels=(16, 16), blocks=1, data_mean=(0.6, 0.5, 0.4), data_sd=0.3)
CONFIG = TrainConfig(stage="score", bundle="none", data=DataConfig(root="."), net=NET)
Predict = Literal["clean", "noise"]


def _randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _data(n: int = 64) -> torch.Tensor:
    """White Gaussian pixels with the net's own mean and spread."""
    return torch.tensor(NET.data_mean).view(1, 3, 1, 1) + NET.data_sd * _randn(n, 3, 32, 32)


def _net(predict: Predict = "clean", *, random: bool = False) -> ScoreNet:
    torch.manual_seed(0)
    net = ScoreNet(structs.replace(NET, predict=predict))
    if random:
        torch.nn.init.normal_(net.tail.weight, std=0.1)
    return net


def test_steps_lie_in_bounds_and_favor_the_sampler_when_drawn() -> None:
    rng = np.random.default_rng(0)
    steps = np.concatenate([draw_steps(CONFIG, 64, rng) for _ in range(200)])
    assert steps.dtype == np.int64
    assert steps.min() == 1
    assert steps.max() == CONFIG.last_step
    share = float(np.mean(steps <= CONFIG.focus_step))
    assert share == pytest.approx(CONFIG.focus_fraction, abs=0.01)
    # Uniform within either part.
    for low, high in ((1, 330), (331, 600)):
        part = steps[(steps >= low) & (steps <= high)]
        counts = np.histogram(part, 10, (low, high + 1))[0]
        assert counts.max() / counts.min() < 1.6


def test_every_batch_is_stratified_when_drawn() -> None:
    rng = np.random.default_rng(1)
    config = structs.replace(CONFIG, focus_fraction=0.75)
    for _ in range(50):
        steps = draw_steps(config, 4, rng)
        assert int((steps <= config.focus_step).sum()) == 3


@pytest.mark.parametrize(("focus", "last", "fraction"), [(300, 300, 1.0), (330, 200, 0.5)])
def test_steps_stay_in_bounds_when_settings_are_odd(focus: int, last: int, fraction: float) -> None:
    config = structs.replace(CONFIG, focus_step=focus, last_step=last, focus_fraction=fraction)
    steps = np.concatenate([draw_steps(config, 8, np.random.default_rng(i)) for i in range(100)])
    assert steps.min() >= 1
    assert steps.max() <= max(focus, last)


@pytest.mark.parametrize("predict", ["clean", "noise"])
def test_loss_is_one_when_nothing_is_learned(predict: Predict) -> None:
    # Both targets have unit variance on data of the stated mean and spread.
    schedule, y_0 = Schedule(), _data()
    steps = torch.tensor([1, 40, 150, 300, 600]).repeat(13)[:64]
    losses = score_loss(_net(predict), schedule, y_0, steps, _randn(*y_0.shape, seed=1))
    assert losses.shape == (64,)
    torch.testing.assert_close(losses, torch.ones(64), rtol=0.1, atol=0.0)
    assert float(losses.detach().mean()) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("t", [1, 40, 300, 600])
def test_loss_weighs_eps_error_as_designed_when_preconditioned(t: int) -> None:
    schedule, y_0, net = Schedule(), _data(4), _net(random=True)
    eps = _randn(*y_0.shape, seed=1)
    alpha, sigma = float(schedule.alpha[t]), float(schedule.sigma[t])
    ones = torch.ones(4)
    y_t = alpha * y_0 + sigma * eps
    with torch.no_grad():
        y0_hat = net.denoise(y_t, alpha * ones, sigma * ones)
        losses = score_loss(net, schedule, y_0, torch.full((4,), t), eps)
    error = (((y_t - alpha * y0_hat) / sigma).double() - eps).square().mean(dim=(1, 2, 3))
    g = sigma / alpha
    weight = (g**2 + NET.data_sd**2) / NET.data_sd**2
    torch.testing.assert_close(losses.double(), weight * error, rtol=2e-3, atol=0.0)


def test_noise_loss_is_the_eps_error_when_not_preconditioned() -> None:
    schedule, y_0, net = Schedule(), _data(4), _net("noise", random=True)
    eps = _randn(*y_0.shape, seed=1)
    steps = torch.tensor([5, 80, 300, 600])
    alpha, sigma = (table[steps] for table in schedule.tables())
    y_t = alpha.view(-1, 1, 1, 1) * y_0 + sigma.view(-1, 1, 1, 1) * eps
    with torch.no_grad():
        found = score_loss(net, schedule, y_0, steps, eps)
        guess = net.inner(y_t, torch.log(sigma / alpha))
    torch.testing.assert_close(found, (guess - eps).square().mean(dim=(1, 2, 3)), rtol=1e-3, atol=0)


def test_loss_is_zero_when_the_target_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule, y_0, net = Schedule(), _data(2), _net()
    eps, steps = _randn(*y_0.shape, seed=1), torch.tensor([20, 200])
    alpha, sigma = (table[steps].view(-1, 1, 1, 1) for table in schedule.tables())
    g, total = sigma / alpha, ((sigma / alpha) ** 2 + NET.data_sd**2).sqrt()
    centered = y_0 - net.mean
    # Karras et al. 2022, eq. 8 with c_skip and c_out written out.
    target = (centered - NET.data_sd**2 / total**2 * (centered + g * eps)) * total
    monkeypatch.setattr(net, "inner", lambda *_: target / (g * NET.data_sd))
    assert float(score_loss(net, schedule, y_0, steps, eps).max()) < 1e-6


@pytest.mark.parametrize("predict", ["clean", "noise"])
def test_eps_errors_equal_the_closed_form_when_untrained(predict: Predict) -> None:
    schedule = Schedule()
    errors = eps_errors(_net(predict), schedule, _data(32), seed=3)
    assert tuple(errors) == HELD_OUT_STEPS
    for step, error in errors.items():
        g = schedule.sigma[step] / schedule.alpha[step]
        linear = NET.data_sd**2 / (g**2 + NET.data_sd**2)
        assert error == pytest.approx(linear if predict == "clean" else 1.0, rel=0.03)


def test_eps_errors_do_not_depend_on_the_batch_when_split() -> None:
    net, y_0 = _net(random=True), _data(10)
    one = eps_errors(net, Schedule(), y_0, seed=3, batch=10)
    split = eps_errors(net, Schedule(), y_0, seed=3, batch=4)
    assert split == pytest.approx(one, rel=1e-5)


def test_stage_measures_its_data_when_built(tissue: ImageSet) -> None:
    stage = ScoreStage(CONFIG, tissue, tissue, torch.device("cpu"))
    mean, spread = measure_mean_sd(tissue)
    assert (stage.net.spec.data_mean, stage.net.spec.data_sd) == (mean, spread)
    assert settle_net(CONFIG.net, tissue) == stage.spec
    assert stage.spec.channels == CONFIG.net.channels
    assert tuple(round(v, 4) for v in stage.net.mean.flatten().tolist()) == mean


def test_loss_is_equal_when_generators_are(tissue: ImageSet) -> None:
    stage = ScoreStage(CONFIG, tissue, tissue, torch.device("cpu"))
    torch.nn.init.normal_(stage.net.tail.weight, std=0.1)

    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return stage.loss(
            *Feed(stage.draw, np.random.SeedSequence, 0).take(seed), generator
        ).detach()

    assert draw(1).shape == (CONFIG.batch,)
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("predict", ["clean", "noise"])
def test_net_learns_when_trained_a_little(predict: Predict, tissue: ImageSet) -> None:
    config = structs.replace(CONFIG, net=structs.replace(NET, predict=predict))
    stage = ScoreStage(config, tissue, tissue, torch.device("cpu"))
    before = stage.evaluate()
    optimizer = torch.optim.Adam(stage.net.parameters(), lr=2e-3)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    for _ in range(30):
        optimizer.zero_grad()
        stage.loss(stage.draw(rng), rng, generator).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    after = stage.evaluate()
    # A preconditioned net starts as the best linear denoiser and passes it within 30 steps.
    for step in (80, 150, 220, 300):
        assert after[f"eps_mse_{step}"] < 0.97 * before[f"eps_mse_{step}"]
