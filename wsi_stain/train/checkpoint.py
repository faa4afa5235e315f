"""Checkpoints: safetensors, no pickles, replaced atomically.

In: a `Progress`, a stage. Out: `checkpoint.safetensors` in the run folder, and back. Not here: the
loop, what a stage is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from wsi_stain.config import TrainConfig
from wsi_stain.errors import ConfigError, OutputError

__all__ = ["Progress", "load_average", "load_into", "resume", "save", "trained"]

CHECKPOINT = "checkpoint.safetensors"

Tensors = dict[str, torch.Tensor]


@dataclass
class Progress:
    """How far a training has come: what a checkpoint holds beside the net.

    Attributes
    ----------
    step, samples
        Optimizer steps, and samples of all ranks together.
    seconds
        Time spent in steps.
    average
        Moving average of the weights, by name.
    optimizer
        With its moments.
    """

    step: int
    samples: int
    seconds: float
    average: Tensors
    optimizer: torch.optim.AdamW


def trained(net: nn.Module) -> dict[str, nn.Parameter]:
    """Give the parameters that want a gradient, by name."""
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def load_into(net: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy weights into the net's trained parameters."""
    with torch.no_grad():
        for name, p in trained(net).items():
            p.copy_(weights[name])


def save(
    net: nn.Module, memory: Mapping[str, torch.Tensor], stage: str, progress: Progress, folder: Path
) -> None:
    """Write the checkpoint of a run; the one before stays until the new one is whole.

    Raises
    ------
    OutputError
        It cannot be written.
    """
    weights = trained(net)
    tensors: Tensors = {f"net.{name}": p.detach() for name, p in weights.items()}
    tensors |= {f"average.{name}": tensor for name, tensor in progress.average.items()}
    tensors |= {f"memory.{name}": tensor for name, tensor in memory.items()}
    for name, p in weights.items():
        for key in ("exp_avg", "exp_avg_sq"):
            if key in progress.optimizer.state[p]:
                tensors[f"{key}.{name}"] = progress.optimizer.state[p][key]
    meta = {
        "step": str(progress.step),
        "samples": str(progress.samples),
        "seconds": str(progress.seconds),
        "stage": stage,
    }
    part = folder / (CHECKPOINT + ".part")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, meta)
        os.replace(part, folder / CHECKPOINT)
    except (SafetensorError, OSError) as error:
        raise OutputError(
            f"Checkpoint {folder / CHECKPOINT} cannot be written: {error}.",
            hint="Is the disk full? The checkpoint before it is still there.",
        ) from error


def resume(
    net: nn.Module, memory: Mapping[str, torch.Tensor], config: TrainConfig, folder: Path
) -> Progress:
    """Begin anew, or fill net, memory and optimizer from the folder's checkpoint.

    Raises
    ------
    ConfigError
        The checkpoint cannot be read, or is of another stage or net.
    """
    weights = trained(net)
    optimizer = torch.optim.AdamW(weights.values(), lr=config.lr, weight_decay=config.weight_decay)
    average = {name: p.detach().clone() for name, p in weights.items()}
    progress = Progress(0, 0, 0.0, average, optimizer)
    path = folder / CHECKPOINT
    if not path.exists():
        return progress
    tensors, meta = _read(path)
    expected = {f"net.{name}": p.shape for name, p in weights.items()}
    expected |= {f"memory.{name}": tensor.shape for name, tensor in memory.items()}
    found = {n: t.shape for n, t in tensors.items() if n.startswith(("net.", "memory."))}
    if meta.get("stage") != config.stage or found != expected:
        raise ConfigError(
            f"Checkpoint {path} belongs to another stage or net.", hint="Use a new --run folder."
        )
    progress.step, progress.samples = int(meta["step"]), int(meta["samples"])
    progress.seconds = float(meta["seconds"])
    load_into(net, {name: tensors[f"net.{name}"] for name in weights})
    for name, tensor in memory.items():
        tensor.copy_(tensors[f"memory.{name}"])
    for name, p in weights.items():
        progress.average[name].copy_(tensors[f"average.{name}"])
        if progress.step == 0:  # stopped before the first step: the optimizer has no moments yet
            continue
        optimizer.state[p] = {
            "step": torch.tensor(float(progress.step)),
            "exp_avg": tensors[f"exp_avg.{name}"].to(p.device),
            "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(p.device),
        }
    return progress


def load_average(folder: Path, stage: str | None = None) -> tuple[Tensors, int]:
    """Read the averaged weights of a run and how many samples they have seen.

    `stage` is what the checkpoint must be of; none: whatever it is.

    Raises
    ------
    ConfigError
        No checkpoint, a damaged one, or one of another stage.
    """
    path = folder / CHECKPOINT
    tensors, meta = _read(path)
    if stage is not None and meta.get("stage") != stage:
        raise ConfigError(
            f"Checkpoint {path} is of stage {meta.get('stage')}, not {stage}.",
            hint="Name the run folder of that stage.",
        )
    prefix = "average."
    weights = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}
    return weights, int(meta["samples"])


def _read(path: Path) -> tuple[Tensors, dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"Checkpoint {path} cannot be read: {error}") from error
