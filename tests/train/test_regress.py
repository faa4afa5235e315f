"""The student's regression: its loss in closed form, and a curve that says what it must."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import structs

from wsi_stain.config import DistillConfig, TrainConfig
from wsi_stain.manifest import ignore
from wsi_stain.train.feed import Feed
from wsi_stain.train.he_fields import load_fields
from wsi_stain.train.regress import RegressStage, density_of, regress_loss
from wsi_stain.train.teacher_pairs import Pairs, make_pairs
from wsi_stain.translate.bundle import load_bundle
from wsi_stain.translate.noise import Schedule
from wsi_stain.translate.student import student_net, widen

CPU = torch.device("cpu")
ONLY_GREY = DistillConfig(od_weight=0.0, edge_weight=0.0, grain_weight=0.0)


def _randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pairs(
    tmp_path_factory: pytest.TempPathFactory, distill_config: TrainConfig
) -> tuple[Pairs, Pairs]:
    """Train and held-out pairs of the tiny teacher."""
    folder = tmp_path_factory.mktemp("run")
    bundle = load_bundle(distill_config.bundle, CPU, torch.float32)
    train, held_out = (
        make_pairs(
            bundle, distill_config, load_fields(distill_config, split), split, folder, ignore
        )
        for split in ("train", "val")
    )
    return train, held_out


def _stage(config: TrainConfig, pairs: tuple[Pairs, Pairs]) -> RegressStage:
    bundle = load_bundle(config.bundle, CPU, torch.float32)
    assert bundle.score is not None
    net = student_net(bundle.score.spec)
    widen(net, bundle.score.state_dict())
    return RegressStage(config, net, Schedule.of(bundle.spec), 150, *pairs, CPU)


def test_density_is_the_logarithm_of_light_when_measured() -> None:
    y = torch.tensor([-1.0, 0.0, 1.0, -3.0])
    light = torch.tensor([0.0, 0.5, 1.0, 0.0])
    torch.testing.assert_close(density_of(y), -torch.log(light + 0.02))


@pytest.mark.parametrize("shift", [0.1, -0.3])
def test_loss_equals_the_closed_form_when_pictures_are_flat(shift: float) -> None:
    target = torch.full((2, 3, 16, 16), 0.2)
    config = DistillConfig(od_weight=0.7, edge_weight=3.0)
    density = abs(np.log((0.6 + 0.02) / (0.6 + shift / 2 + 0.02)))
    expected = abs(shift) + 0.7 * density  # the same at all scales, and flat has no edges
    found = regress_loss(target + shift, target, config)
    torch.testing.assert_close(found, torch.full((2,), float(expected)), rtol=1e-4, atol=0)


def test_loss_is_zero_for_equal_pictures_alone() -> None:
    y = _randn(3, 3, 32, 32).tanh()
    assert torch.equal(regress_loss(y, y, DistillConfig()), torch.zeros(3))
    for part in range(3):
        other = y.clone()
        other[part, 0, 5, 5] -= 0.2
        loss = regress_loss(other, y, DistillConfig())
        assert [bool(value > 0) for value in loss] == [i == part for i in range(3)]


def test_scales_see_less_of_a_checkerboard_when_averaged() -> None:
    target = torch.zeros(1, 3, 16, 16)
    board = 0.1 * (-1.0) ** (torch.arange(16)[:, None] + torch.arange(16)).expand(1, 3, 16, 16)
    assert float(regress_loss(board, target, ONLY_GREY)) == pytest.approx(0.1 / 3)
    edges = structs.replace(ONLY_GREY, edge_weight=1.0)
    assert float(regress_loss(board, target, edges)) == pytest.approx(0.1 / 3 + 2 * 0.2)
    grain = structs.replace(ONLY_GREY, grain_weight=1.0)
    assert float(regress_loss(board, target, grain)) == pytest.approx(0.1 / 3 + 0.8)
    # Grain of the same strength at other places costs nothing beyond its grey levels.
    assert float(regress_loss(board, -board, grain)) == pytest.approx(0.2 / 3)


@pytest.mark.parametrize("evaluations", [1, 2])
def test_student_nears_its_teacher_when_trained(
    distill_config: TrainConfig, pairs: tuple[Pairs, Pairs], evaluations: int
) -> None:
    distill = structs.replace(distill_config.distill, evaluations=evaluations, grain_weight=0.0)
    stage = _stage(structs.replace(distill_config, distill=distill), pairs)
    assert len(stage.grid) == evaluations + 1
    before = stage.evaluate()
    optimizer = torch.optim.Adam(stage.net.parameters(), lr=2e-3)
    rng, generator = np.random.default_rng(0), torch.Generator()
    for _ in range(25):
        optimizer.zero_grad()
        stage.loss(stage.draw(rng), rng, generator).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    after = stage.evaluate()
    assert after["grey"] < (0.9, 0.97)[evaluations - 1] * before["grey"]
    assert after["dab_teacher"] == before["dab_teacher"]


def test_curve_says_one_when_the_student_is_the_teacher(
    distill_config: TrainConfig, pairs: tuple[Pairs, Pairs], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = _stage(distill_config, pairs)
    monkeypatch.setattr(stage, "estimates", lambda batch: [batch.target])
    same = stage.evaluate()
    assert (same["grey"], same["sharpness"]) == (0.0, 1.0)
    assert same["dab"] == same["dab_teacher"]
    monkeypatch.setattr(stage, "estimates", lambda batch: [batch.target * 0.5])
    half = stage.evaluate()
    assert half["sharpness"] == pytest.approx(0.5)
    expected = 127.5 * 0.5 * np.abs(pairs[1].target / 127.5 - 1.0).mean()
    assert half["grey"] == pytest.approx(float(expected), rel=1e-4)


def test_loss_is_equal_when_generators_are(
    distill_config: TrainConfig, pairs: tuple[Pairs, Pairs]
) -> None:
    stage = _stage(distill_config, pairs)

    def draw(seed: int) -> torch.Tensor:
        return stage.loss(
            *Feed(stage.draw, np.random.SeedSequence, 0).take(seed), torch.Generator()
        ).detach()

    assert draw(1).shape == (distill_config.batch,)
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_untrained_student_is_far_when_noise_is_not_the_pairs(
    distill_config: TrainConfig,
    pairs: tuple[Pairs, Pairs],
    save_teacher: Callable[[Path], Path],
) -> None:
    # The teacher's picture carries its start noise: a student that got other noise cannot match.
    stage = _stage(distill_config, pairs)
    own = stage.evaluate()["grey"]
    moved = Pairs(**{**vars(pairs[1]), "row_px": 64})
    stage.held_out = moved
    assert stage.evaluate()["grey"] > 1.02 * own
