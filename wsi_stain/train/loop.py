"""One loop for all stages: optimizer, moving average, checkpoints, held-out curve, events.

In: a `Stage` and a `TrainConfig`. Out: `checkpoint.safetensors` and `log.jsonl` in the run
folder. Not here: losses, nets, data.

**Invariant**: all randomness of step k comes from (seed, k), so a resumed run follows the loss
curve of an undisturbed one. Checkpoints are safetensors, not pickles, and replaced atomically.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from wsi_stain.config import TrainConfig
from wsi_stain.errors import ConfigError, DeviceError, OutputError
from wsi_stain.manifest import Event, Listener

__all__ = ["Stage", "fit", "load_average"]

CHECKPOINT = "checkpoint.safetensors"
LOG = "log.jsonl"


class Stage(Protocol):
    """What a training stage brings: a net, a loss per sample, a held-out measure."""

    @property
    def net(self) -> nn.Module:
        """What is trained; parameters that want no gradient are left alone."""
        ...

    @property
    def memory(self) -> dict[str, torch.Tensor]:
        """Tensors beside the net that the loss updates in place; empty for most stages."""
        ...

    def loss(self, rng: np.random.Generator, generator: torch.Generator) -> torch.Tensor:
        """Loss of one batch, one number per sample or position; all randomness is passed in."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Held-out numbers by name; the loop puts the averaged weights in the net meanwhile."""
        ...


@dataclass
class _State:
    """What a checkpoint holds."""

    step: int
    samples: int
    seconds: float
    average: dict[str, torch.Tensor]
    optimizer: torch.optim.AdamW


def fit(
    stage: Stage,
    config: TrainConfig,
    folder: Path,
    listener: Listener,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Train until `config.samples` have been seen, from the folder's checkpoint if there is one.

    Parameters
    ----------
    stage
        Net, loss and held-out measure.
    config
        Budget, optimizer, cadence.
    folder
        Run folder; made if absent.
    listener
        Hears one "advance" per step and one "note" per held-out measure.
    should_stop
        Asked after every step; when true, a checkpoint is written and the loop ends.

    Raises
    ------
    ConfigError
        The folder's checkpoint cannot be read, or is of another stage or net.
    DeviceError
        The loss is not finite; the checkpoint on disk is the last good one.
    OutputError
        A checkpoint cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = _resume(stage, config, folder)
    device = next(stage.net.parameters()).device
    listener(Event("train", "start", done=state.samples, total=config.samples))
    losses: list[float] = []
    began = time.monotonic()
    while state.samples < config.samples and not should_stop():
        losses.append(_step(stage, config, state, device))
        before, state.samples = state.samples, state.samples + config.batch
        state.step += 1
        listener(Event("train", "advance", done=state.samples, total=config.samples))
        now = time.monotonic()
        state.seconds, began = state.seconds + now - began, now
        if before // config.evaluate_every != state.samples // config.evaluate_every:
            _measure(stage, state, folder, losses, listener)
            losses = []
        if before // config.checkpoint_every != state.samples // config.checkpoint_every:
            _save(stage, config, state, folder)
    _save(stage, config, state, folder)
    _measure(stage, state, folder, losses, listener)
    listener(Event("train", "finish", done=state.samples, total=config.samples))


def _step(stage: Stage, config: TrainConfig, state: _State, device: torch.device) -> float:
    seed = np.random.SeedSequence([config.seed, state.step])
    rng = np.random.default_rng(seed)
    generator = torch.Generator(device).manual_seed(int(seed.generate_state(1)[0]))
    warm = min(1.0, (state.samples + config.batch) / max(1.0, config.warmup_samples))
    for group in state.optimizer.param_groups:
        group["lr"] = config.lr * warm
    state.optimizer.zero_grad(set_to_none=True)
    # bf16 autocast pays on CUDA; on a CPU without bf16 units it is a hundred times slower.
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        loss = stage.loss(rng, generator).float().mean()
    value = float(loss.detach())
    if not np.isfinite(value):
        raise DeviceError(
            f"The training loss became {value} at sample {state.samples}.",
            hint="Lower lr; the last checkpoint is sound.",
        )
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(stage.net.parameters(), config.grad_clip)
    state.optimizer.step()
    decay = min(config.ema_decay, (1 + state.step) / (10 + state.step))
    with torch.no_grad():
        weights: list[torch.Tensor] = list(_trained(stage.net).values())
        torch._foreach_lerp_(list(state.average.values()), weights, 1.0 - decay)
    return value


def _measure(
    stage: Stage, state: _State, folder: Path, losses: list[float], listener: Listener
) -> None:
    """Write one line of the curve, from the averaged weights."""
    live = {name: p.detach().clone() for name, p in _trained(stage.net).items()}
    _load_into(stage.net, state.average)
    stage.net.eval()
    held_out = stage.evaluate()
    stage.net.train()
    _load_into(stage.net, live)
    row: dict[str, Any] = {
        "samples": state.samples,
        "seconds": round(state.seconds, 1),
        "loss": round(float(np.mean(losses)), 5) if losses else None,
        "held_out": {name: round(value, 5) for name, value in held_out.items()},
    }
    with (folder / LOG).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    listener(Event("train", "note", text=json.dumps(row)))


def _trained(net: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def _load_into(net: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, p in _trained(net).items():
            p.copy_(weights[name])


def _save(stage: Stage, config: TrainConfig, state: _State, folder: Path) -> None:
    trained = _trained(stage.net)
    tensors = {f"net.{name}": p.detach() for name, p in trained.items()}
    tensors |= {f"average.{name}": tensor for name, tensor in state.average.items()}
    tensors |= {f"memory.{name}": tensor for name, tensor in stage.memory.items()}
    for name, p in trained.items():
        for key in ("exp_avg", "exp_avg_sq"):
            if key in state.optimizer.state[p]:
                tensors[f"{key}.{name}"] = state.optimizer.state[p][key]
    meta = {
        "step": str(state.step),
        "samples": str(state.samples),
        "seconds": str(state.seconds),
        "stage": config.stage,
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


def _resume(stage: Stage, config: TrainConfig, folder: Path) -> _State:
    trained = _trained(stage.net)
    optimizer = torch.optim.AdamW(trained.values(), lr=config.lr, weight_decay=config.weight_decay)
    average = {name: p.detach().clone() for name, p in trained.items()}
    state = _State(0, 0, 0.0, average, optimizer)
    path = folder / CHECKPOINT
    if not path.exists():
        return state
    tensors, meta = _read(path)
    expected = {f"net.{name}": p.shape for name, p in trained.items()}
    expected |= {f"memory.{name}": tensor.shape for name, tensor in stage.memory.items()}
    found = {n: t.shape for n, t in tensors.items() if n.startswith(("net.", "memory."))}
    if meta.get("stage") != config.stage or found != expected:
        raise ConfigError(
            f"Checkpoint {path} belongs to another stage or net.", hint="Use a new --run folder."
        )
    state.step, state.samples = int(meta["step"]), int(meta["samples"])
    state.seconds = float(meta["seconds"])
    _load_into(stage.net, {name: tensors[f"net.{name}"] for name in trained})
    for name, tensor in stage.memory.items():
        tensor.copy_(tensors[f"memory.{name}"])
    for name, p in trained.items():
        state.average[name].copy_(tensors[f"average.{name}"])
        if state.step == 0:  # stopped before the first step: the optimizer has no moments yet
            continue
        optimizer.state[p] = {
            "step": torch.tensor(float(state.step)),
            "exp_avg": tensors[f"exp_avg.{name}"].to(p.device),
            "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(p.device),
        }
    return state


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"Checkpoint {path} cannot be read: {error}") from error


def load_average(folder: Path, stage: str | None = None) -> tuple[dict[str, torch.Tensor], int]:
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
