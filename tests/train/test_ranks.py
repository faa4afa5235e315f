"""Ranks: two processes take the step that one takes with the joint batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from wsi_stain.config import DataConfig, TrainConfig
from wsi_stain.errors import ConfigError
from wsi_stain.manifest import ignore
from wsi_stain.train.loop import fit
from wsi_stain.train.ranks import ALONE, Ranks, join_ranks


class Plane:
    """Least squares; rank r of n takes every n-th sample of one joint batch."""

    def __init__(self, ranks: Ranks) -> None:
        self.net = nn.Linear(3, 1)
        nn.init.constant_(self.net.weight, 0.1)
        nn.init.zeros_(self.net.bias)
        self.memory: dict[str, torch.Tensor] = {}
        self.part = slice(ranks.rank, None, ranks.size)
        self.calls = 0

    def draw(self, rng: np.random.Generator) -> torch.Tensor:
        """This rank's part of a batch that the number of the call tells."""
        x = torch.from_numpy(np.random.default_rng(self.calls).standard_normal((8, 3))).float()
        self.calls += 1
        return x[self.part]

    def loss(
        self, x: torch.Tensor, rng: np.random.Generator, generator: torch.Generator
    ) -> torch.Tensor:
        """Squared error of this rank's part."""
        errors: torch.Tensor = (self.net(x) - x.sum(1, keepdim=True)).square()
        return errors

    def evaluate(self) -> dict[str, float]:
        """Intercept."""
        return {"bias": self.net.bias.item()}


def train(folder: Path) -> None:
    """Train as one of the ranks that torchrun started, or alone."""
    config = TrainConfig(
        stage="score",
        bundle="none",
        data=DataConfig(root="."),
        samples=48,
        batch=8,
        lr=1e-2,
        warmup_samples=0,
        evaluate_every=16,
        checkpoint_every=16,
    )
    # In bfloat16, where the processor has it, halves are rounded otherwise than the whole.
    exact = mock.patch("wsi_stain.train.loop.fast_dtype", return_value=torch.float32)
    with exact, join_ranks("cpu") as ranks:
        stage = Plane(ranks)
        fit(stage, config, folder, ignore, ranks=ranks)
        weights = torch.cat([p.detach().flatten() for p in stage.net.parameters()])
        np.save(folder / f"rank-{ranks.rank}-of-{ranks.size}.npy", weights.numpy())


def test_two_processes_take_the_steps_of_one_with_the_joint_batch(tmp_path: Path) -> None:
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    for folder in (alone, pair):
        folder.mkdir()
    train(alone)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words += ["--nproc-per-node", "2", __file__, str(pair)]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (np.load(pair / f"rank-{rank}-of-2.npy") for rank in (0, 1))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, np.load(alone / "rank-0-of-1.npy"), rtol=1e-5)
    whole, halves = (load_file(folder / "checkpoint.safetensors") for folder in (alone, pair))
    for name, tensor in whole.items():
        np.testing.assert_allclose(halves[name], tensor, rtol=1e-4, atol=1e-7, err_msg=name)
    # Threads that outlive the group abort the process now and then, where Python ends.
    assert not [name for name in (pair / "threads").read_text().split() if "gloo" in name]
    # Only the first writes: as many lines as one process wrote.
    lines = [(folder / "log.jsonl").read_text().count("\n") for folder in (alone, pair)]
    assert lines[0] == lines[1] > 0


def test_batch_that_cannot_be_shared_is_refused() -> None:
    assert Ranks(1, 4).share(8) == 2
    with pytest.raises(ConfigError, match="batch of 6 cannot be split over 4"):
        Ranks(0, 4).share(6)


def test_a_process_of_its_own_is_alone() -> None:
    with join_ranks("cpu") as ranks:
        assert ranks is ALONE
        assert ranks.leads
        assert ranks.any(True)
        assert not ranks.any(False)


if __name__ == "__main__":
    train(Path(sys.argv[1]))
    if os.environ["RANK"] == "1":
        names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
        Path(sys.argv[1], "threads").write_text("".join(names))
