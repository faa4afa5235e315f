"""The loop: a resumed run is the undisturbed one, and a checkpoint is never half written."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from msgspec import structs
from safetensors import safe_open
from torch import nn

from wsi_stain.config import CriticSpec, DataConfig, NetSpec, TrainConfig
from wsi_stain.errors import ConfigError, DeviceError, LockedError, OutputError
from wsi_stain.manifest import Event, ignore
from wsi_stain.train import checkpoint
from wsi_stain.train.checkpoint import load_average
from wsi_stain.train.data import ImageSet
from wsi_stain.train.feed import Feed
from wsi_stain.train.loop import Stage, fit
from wsi_stain.train.mine import MineStage
from wsi_stain.train.score import ScoreStage

CPU = torch.device("cpu")


class Line:
    """Least squares on y = 2 x + 1: a stage whose optimum is known."""

    def __init__(self) -> None:
        self.net = nn.Linear(1, 1)
        nn.init.zeros_(self.net.weight)
        nn.init.zeros_(self.net.bias)
        self.memory: dict[str, torch.Tensor] = {}
        self.fail_at = -1
        self.calls = 0

    def draw(self, rng: np.random.Generator) -> torch.Tensor:
        """Places on the line."""
        return torch.from_numpy(rng.standard_normal((8, 1))).float()

    def loss(
        self, x: torch.Tensor, rng: np.random.Generator, generator: torch.Generator
    ) -> torch.Tensor:
        """Squared error of one batch."""
        self.calls += 1
        errors: torch.Tensor = (self.net(x) - 2.0 * x - 1.0).square()
        return errors * float("nan") if self.calls == self.fail_at else errors

    def evaluate(self) -> dict[str, float]:
        """Slope and intercept."""
        return {"slope": self.net.weight.item(), "at_0": self.net.bias.item()}


@pytest.fixture
def config() -> TrainConfig:
    """Six steps of two samples."""
    return TrainConfig(
        stage="score",
        bundle="none",
        data=DataConfig(root="."),
        samples=12,
        batch=2,
        lr=1e-2,
        warmup_samples=6,
        checkpoint_every=4,
        evaluate_every=2,
        net=NetSpec(channels=(16, 16), blocks=1),
        critic=CriticSpec(channels=(8, 8, 8), embed=4, negatives=4),
    )


def _stop_after(n_steps: int) -> Callable[[], bool]:
    asked = iter(range(n_steps + 1))
    return lambda: next(asked) == n_steps


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "checkpoint.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.mark.parametrize("kind", ["score", "noise", "mine", "smile"])
def test_resumed_run_is_bit_equal_when_stopped_half_way(
    kind: str, config: TrainConfig, tissue_144: ImageSet, tmp_path: Path
) -> None:
    def build() -> Stage:
        if kind in ("score", "noise"):
            return ScoreStage(config, tissue_144, tissue_144, CPU)
        return MineStage(config, tissue_144, tissue_144, CPU)

    config = structs.replace(config, evaluate_every=6)  # each time costs more than all six steps
    if kind == "noise":
        config = structs.replace(config, net=structs.replace(config.net, predict="noise"))
    if kind in ("mine", "smile"):
        critic = structs.replace(config.critic, loss=kind)
        config = structs.replace(config, stage="mine", critic=critic)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    fit(build(), config, whole, ignore)
    fit(build(), config, halves, ignore, _stop_after(3))
    assert load_average(halves)[1] == 6
    fit(build(), config, halves, ignore)
    first, second = _tensors(whole), _tensors(halves)
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    curve = {row["samples"]: row for row in _rows(whole) if row["loss"] is not None}
    again = {row["samples"]: row for row in _rows(halves) if row["loss"] is not None}
    assert curve == again
    assert list(curve) == [6, 12]


def test_line_is_found_when_trained(config: TrainConfig, tmp_path: Path) -> None:
    config = structs.replace(
        config, samples=1200, lr=0.05, ema_decay=0.9, weight_decay=0.0, evaluate_every=1200
    )
    stage = Line()
    fit(stage, config, tmp_path, ignore)
    average, samples = load_average(tmp_path)
    assert samples == 1200
    assert float(average["weight"]) == pytest.approx(2.0, abs=0.02)
    assert float(average["bias"]) == pytest.approx(1.0, abs=0.02)
    assert stage.net.weight.item() == pytest.approx(2.0, abs=0.02)
    # The curve is that of the averaged weights, and the live ones came back after it.
    assert _rows(tmp_path)[-1]["held_out"]["slope"] == pytest.approx(
        float(average["weight"]), abs=1e-5
    )
    assert torch.equal(_tensors(tmp_path)["net.weight"], stage.net.weight)


def test_average_follows_its_formula_when_young(config: TrainConfig, tmp_path: Path) -> None:
    weights: list[float] = []

    class Watched(Line):
        def loss(
            self, x: torch.Tensor, rng: np.random.Generator, generator: torch.Generator
        ) -> torch.Tensor:
            weights.append(self.net.weight.item())
            return super().loss(x, rng, generator)

    stage = Watched()
    fit(stage, config, tmp_path, ignore)
    weights.append(stage.net.weight.item())
    expected = weights[0]
    for step, value in enumerate(weights[1:]):
        decay = min(config.ema_decay, (1 + step) / (10 + step))
        expected = decay * expected + (1.0 - decay) * value
    assert float(load_average(tmp_path)[0]["weight"]) == pytest.approx(expected, rel=1e-4)


def test_events_tell_the_story_when_listened_to(config: TrainConfig, tmp_path: Path) -> None:
    events: list[Event] = []
    fit(Line(), config, tmp_path, events.append)
    assert events[0] == Event("train", "start", done=0, total=12)
    assert [e.done for e in events if e.kind == "advance"] == [2, 4, 6, 8, 10, 12]
    assert events[-1] == Event("train", "finish", done=12, total=12)
    measures = [e.text for e in events if e.kind == "note" and e.text.startswith("{")]
    assert [json.loads(text)["samples"] for text in measures] == [2, 4, 6, 8, 10, 12, 12]
    assert all(json.loads(text)["held_out"] for text in measures)


def test_run_goes_on_when_stopped_before_its_first_step(
    config: TrainConfig, tmp_path: Path
) -> None:
    fit(Line(), config, tmp_path, ignore, lambda: True)
    assert load_average(tmp_path)[1] == 0
    fit(Line(), config, tmp_path, ignore)
    assert load_average(tmp_path)[1] == 12


def test_nothing_is_trained_when_the_budget_is_spent(config: TrainConfig, tmp_path: Path) -> None:
    fit(Line(), config, tmp_path, ignore)
    before = _tensors(tmp_path)
    stage = Line()
    fit(stage, config, tmp_path, ignore)
    assert stage.calls == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in _tensors(tmp_path).items())


def test_bad_loss_is_named_when_it_is_not_finite(config: TrainConfig, tmp_path: Path) -> None:
    stage = Line()
    stage.fail_at = 4
    with pytest.raises(DeviceError, match="loss became nan before sample 8") as caught:
        fit(stage, config, tmp_path, ignore)
    assert "last checkpoint is sound" in caught.value.hint
    weights, samples = load_average(tmp_path)
    assert samples == 4  # checkpoint_every=4
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())


def test_old_checkpoint_stays_when_writing_the_next_fails(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(Line(), structs.replace(config, samples=4), tmp_path, ignore)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()

    def full_disk(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OutputError, match="No space left on device"):
        fit(Line(), config, tmp_path, ignore)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    monkeypatch.undo()
    fit(Line(), config, tmp_path, ignore)
    assert load_average(tmp_path)[1] == 12
    assert not (tmp_path / "checkpoint.safetensors.part").exists()


def test_folder_is_refused_when_another_run_trains_in_it(
    config: TrainConfig, tmp_path: Path
) -> None:
    def look() -> bool:
        with pytest.raises(LockedError, match="Another run") as caught:
            fit(Line(), config, tmp_path, ignore)
        assert "--run" in caught.value.hint
        return True

    fit(Line(), config, tmp_path, ignore, look)
    fit(Line(), config, tmp_path, ignore)  # the folder is free again


@pytest.mark.parametrize("other", ["mine", "refine"])
def test_checkpoint_of_another_stage_is_refused_when_resumed(
    other: Literal["mine", "refine"], config: TrainConfig, tmp_path: Path
) -> None:
    fit(Line(), config, tmp_path, ignore)
    with pytest.raises(ConfigError, match="another stage or net") as caught:
        fit(Line(), structs.replace(config, stage=other), tmp_path, ignore)
    assert "--run" in caught.value.hint
    with pytest.raises(ConfigError, match=f"is of stage score, not {other}"):
        load_average(tmp_path, other)


def test_checkpoint_of_another_shape_is_refused_when_resumed(
    config: TrainConfig, tmp_path: Path
) -> None:
    fit(Line(), config, tmp_path, ignore)
    wide, renamed = Line(), Line()
    wide.net = nn.Linear(2, 1)
    renamed.net = nn.Sequential(nn.Linear(1, 1))  # type: ignore[assignment]
    for stage in (wide, renamed):
        with pytest.raises(ConfigError, match="another stage or net"):
            fit(stage, config, tmp_path, ignore)


@pytest.mark.parametrize("data", [b"", b"not safetensors", b"\x08\x00\x00\x00\x00\x00\x00\x00{"])
def test_damaged_checkpoint_is_refused_when_resumed(
    data: bytes, config: TrainConfig, tmp_path: Path
) -> None:
    (tmp_path / "checkpoint.safetensors").write_bytes(data)
    with pytest.raises(ConfigError, match="cannot be read"):
        fit(Line(), config, tmp_path, ignore)


def test_average_is_refused_when_there_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_average(tmp_path)


def test_frozen_weights_stay_when_others_train(config: TrainConfig, tmp_path: Path) -> None:
    stage = Line()
    stage.net.bias.requires_grad_(False)
    fit(stage, config, tmp_path, ignore)
    assert stage.net.bias.item() == 0.0
    assert stage.net.weight.item() != 0.0
    assert set(load_average(tmp_path)[0]) == {"weight"}


@pytest.mark.parametrize("n_threads", [1, 3])
def test_batches_are_the_same_when_threads_draw_them_ahead(n_threads: int) -> None:
    def draw(rng: np.random.Generator) -> float:
        time.sleep(0.01 * rng.random())  # so that threads overtake one another
        return float(rng.random())

    def batches(n: int) -> list[tuple[float, float]]:
        with Feed(draw, lambda step: np.random.SeedSequence([7, step]), n) as feed:
            drawn = [feed.take(step) for step in range(5, 25)]
        return [(batch, float(rng.random())) for batch, rng in drawn]

    assert batches(n_threads) == batches(0)


def test_fault_of_a_crop_ends_the_training_when_a_thread_meets_it() -> None:
    def draw(rng: np.random.Generator) -> float:
        raise ValueError("no such crop")

    with (
        Feed(draw, np.random.SeedSequence, 2) as feed,
        pytest.raises(ValueError, match="no such crop"),
    ):
        feed.take(0)
