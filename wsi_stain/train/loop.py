"""One loop for all stages: optimizer, moving average, held-out curve, events.

In: a `Stage` and a `TrainConfig`. Out: checkpoint, `log.jsonl`, `curve.png` and samples in the run
folder. Not here: losses, nets, data, what a checkpoint looks like.

**Invariant**: all randomness of step k comes from (seed, k), and from the rank where there are
several, so a resumed run follows the loss curve of an undisturbed one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from wsi_stain.cluster import available_cores
from wsi_stain.config import TrainConfig
from wsi_stain.errors import DeviceError
from wsi_stain.files import make_folder
from wsi_stain.lock import OutputLock
from wsi_stain.manifest import Event, Listener, ignore
from wsi_stain.train.checkpoint import Progress, load_into, resume, save, trained
from wsi_stain.train.curve import Curve, Row
from wsi_stain.train.feed import Feed
from wsi_stain.train.ranks import ALONE, Ranks
from wsi_stain.translate.bundle import fast_dtype

__all__ = ["Painter", "Stage", "fit"]

LOCK = "train.lock"
MOST_THREADS = 12  # that draw crops; a batch each is in memory


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

    def draw(self, rng: np.random.Generator) -> Any:
        """Draw a batch: the work of the processor, which a thread may do steps ahead."""
        ...

    def loss(
        self, batch: Any, rng: np.random.Generator, generator: torch.Generator
    ) -> torch.Tensor:
        """Loss of a batch, one number per sample or position; all randomness is passed in."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Held-out numbers by name; the loop puts the averaged weights in the net meanwhile."""
        ...


@runtime_checkable
class Painter(Protocol):
    """A stage that can show what its net makes."""

    def paint(self) -> NDArray[np.uint8]:
        """Draw samples, the same noise each time: uint8 (h, w, 3)."""
        ...


def fit(
    stage: Stage,
    config: TrainConfig,
    folder: Path,
    listener: Listener,
    should_stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
) -> None:
    """Train until `config.samples` have been seen, from the folder's checkpoint if there is one.

    Where `config.flat_gain` is set, training also ends when the held-out curve is flat.

    Parameters
    ----------
    stage
        Net, loss of this rank's share of the batch, held-out measure.
    config
        Budget, optimizer, cadence; its batch is that of all ranks.
    folder
        Run folder; made if absent.
    listener
        Hears one "advance" per step and one "note" per held-out measure.
    should_stop
        Asked before every step; when true, a checkpoint is written and the loop ends.
    ranks
        Which process of how many this is. Only the first writes, measures and speaks.

    Raises
    ------
    ConfigError
        The folder's checkpoint cannot be read, or is of another stage or net.
    DeviceError
        The loss is not finite; the checkpoint on disk is the last good one.
    LockedError
        Another run trains in this folder.
    OutputError
        A checkpoint cannot be written.
    """
    make_folder(folder)
    hear = listener if ranks.leads else ignore
    # Two runs would go on from one checkpoint, each over the other.
    lock = OutputLock(folder / LOCK, "--run") if ranks.leads else None
    with lock or nullcontext():
        if lock is not None and lock.note:
            hear(Event("train", "note", text=lock.note))
        state = resume(stage.net, stage.memory, config, folder)
        _Run(stage, config, folder, state, hear, ranks).go(should_stop)


class _Run:
    """A training under way."""

    def __init__(
        self,
        stage: Stage,
        config: TrainConfig,
        folder: Path,
        state: Progress,
        listener: Listener,
        ranks: Ranks,
    ) -> None:
        self.stage, self.config, self.folder = stage, config, folder
        self.state, self.listener, self.ranks = state, listener, ranks
        self.device = next(stage.net.parameters()).device
        self.curve = Curve.read(folder, config.stage, state.samples)
        self.losses: list[float] = []
        self.latest: torch.Tensor | None = None

    def go(self, should_stop: Callable[[], bool]) -> None:
        self._tell("start")
        with Feed(self.stage.draw, self._seed, self._threads()) as feed:
            self._train(feed, should_stop)
        if self.ranks.leads:
            self._save()
            self._measure()
        if self._is_flat():
            text = (
                f"The held-out curve is flat: {self.config.flat_measures} measures gained less "
                f"than {self.config.flat_gain:.1%} together. Training ends at "
                f"{self.state.samples} samples."
            )
            self.listener(Event("train", "note", text=text))
        self._tell("finish")

    def _train(self, feed: Feed, should_stop: Callable[[], bool]) -> None:
        config, state = self.config, self.state
        began = time.monotonic()
        while state.samples < config.samples and not self.ranks.any(self._is_flat()):
            if self.ranks.any(should_stop()):
                break
            self._step(*feed.take(state.step))
            before, state.samples = state.samples, state.samples + config.batch
            state.step += 1
            self._tell("advance")
            now = time.monotonic()
            state.seconds, began = state.seconds + now - began, now
            self._keep_up(before)
        self._hear_loss()  # by every rank, also those that save nothing

    def _keep_up(self, before: int) -> None:
        """Measure and save where a multiple of the cadence has been passed."""
        if not self.ranks.leads:
            return
        config, samples = self.config, self.state.samples
        if before // config.evaluate_every != samples // config.evaluate_every:
            self._measure()
            self.losses = []
        if before // config.checkpoint_every != samples // config.checkpoint_every:
            self._save()

    def _seed(self, step: int) -> np.random.SeedSequence:
        ranks = self.ranks
        return np.random.SeedSequence(
            [self.config.seed, step] + ([ranks.rank] if ranks.size > 1 else [])
        )

    def _threads(self) -> int:
        """Draw ahead on a device; without one the training needs the cores itself."""
        if self.device.type == "cpu":
            return 0
        return max(1, min(MOST_THREADS, available_cores() // self.ranks.on_this_host() - 1))

    def _step(self, batch: Any, rng: np.random.Generator) -> None:
        config, state, ranks = self.config, self.state, self.ranks
        seed = int(self._seed(state.step).generate_state(1)[0])
        generator = torch.Generator(self.device).manual_seed(seed)
        warm = min(1.0, (state.samples + config.batch) / max(1.0, config.warmup_samples))
        for group in state.optimizer.param_groups:
            group["lr"] = config.lr * warm
        state.optimizer.zero_grad(set_to_none=True)
        low = fast_dtype(self.device) == torch.bfloat16
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=low):
            loss = self.stage.loss(batch, rng, generator).float().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        weights = trained(self.stage.net)
        mean_loss = loss.detach().clone()
        grads = [p.grad for p in weights.values() if p.grad is not None]
        ranks.average([mean_loss, *grads, *self.stage.memory.values()])
        torch.nn.utils.clip_grad_norm_(weights.values(), config.grad_clip)
        state.optimizer.step()
        decay = min(config.ema_decay, (1 + state.step) / (10 + state.step))
        with torch.no_grad():
            live: list[torch.Tensor] = list(weights.values())
            torch._foreach_lerp_(list(state.average.values()), live, 1.0 - decay)
        # The loss before this one is read now: a device that is asked for this one would idle.
        self._hear_loss()
        self.latest = mean_loss

    def _hear_loss(self) -> None:
        """Write down the latest loss, which must be finite before anything is saved."""
        if self.latest is None:
            return
        value, self.latest = float(self.latest), None
        if not np.isfinite(value):
            raise DeviceError(
                f"The training loss became {value} before sample {self.state.samples}.",
                hint="Lower lr; the last checkpoint is sound.",
            )
        self.losses.append(value)

    def _measure(self) -> None:
        """Write one line of the curve and the samples, from the averaged weights."""
        self._hear_loss()
        stage, state = self.stage, self.state
        live = {name: p.detach().clone() for name, p in trained(stage.net).items()}
        load_into(stage.net, state.average)
        stage.net.eval()
        held_out = stage.evaluate()
        if self.config.paint and isinstance(stage, Painter):
            Image.fromarray(stage.paint()).save(self.folder / f"samples-{state.samples:07d}.png")
        stage.net.train()
        load_into(stage.net, live)
        loss = float(np.mean(self.losses)) if self.losses else None
        row = Row(state.samples, state.seconds, loss, held_out)
        self.curve.add(row)
        self.listener(Event("train", "note", text=row.to_json()))
        best = self.curve.rise()
        if best is not None:
            text = (
                f"The held-out curve was best at {best.samples} samples and gets worse: the net "
                "begins to memorize. More images help; so does stopping there (--samples)."
            )
            self.listener(Event("train", "note", text=text))

    def _is_flat(self) -> bool:
        return self.curve.is_flat(self.config.flat_gain, self.config.flat_measures)

    def _save(self) -> None:
        self._hear_loss()
        save(self.stage.net, self.stage.memory, self.config.stage, self.state, self.folder)

    def _tell(self, kind: Literal["start", "advance", "finish"]) -> None:
        self.listener(Event("train", kind, done=self.state.samples, total=self.config.samples))
