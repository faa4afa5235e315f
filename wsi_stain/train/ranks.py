"""Several processes that train one net, one per device, started by torchrun.

In: torchrun's environment, as torch.distributed reads it. Out: `Ranks`. Not here: losses, the loop.

Each rank draws its own share of the batch; gradients are averaged before the step, so that all
ranks keep the same weights and a step equals one of a single process with the joint batch.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import distributed

from wsi_stain.errors import ConfigError
from wsi_stain.translate.bundle import pick_device

__all__ = ["ALONE", "Ranks", "join_ranks"]


@dataclass(frozen=True)
class Ranks:
    """Which process of a training this is.

    Attributes
    ----------
    rank, size
        Number of this process, and of how many.
    device
        Where this one trains; none: as the recipe says.
    """

    rank: int
    size: int
    device: torch.device | None = None

    @property
    def leads(self) -> bool:
        """Whether this one writes files, measures and speaks."""
        return self.rank == 0

    def on_this_host(self) -> int:
        """Count the processes of this training on this host: they share its cores."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.size > 1 else 1

    def share(self, batch: int) -> int:
        """Give this rank's part of the joint batch.

        Raises
        ------
        ConfigError
            It can't be split evenly: the average of gradients would not be that of the batch.
        """
        if batch % self.size:
            raise ConfigError(
                f"A batch of {batch} cannot be split over {self.size} processes.",
                hint=f"Set batch to a multiple of {self.size}.",
            )
        return batch // self.size

    def average(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace float32 tensors by their mean over ranks, in place, in one exchange."""
        parts = list(tensors)
        if self.size == 1 or not parts:
            return
        flat = torch.cat([part.flatten() for part in parts])
        distributed.all_reduce(flat)
        flat /= self.size
        means = torch.split(flat, [part.numel() for part in parts])
        for part, mean in zip(parts, means, strict=True):
            part.copy_(mean.view_as(part))

    def any(self, flag: bool) -> bool:
        """Tell whether any rank says so: all must leave the loop at the same step."""
        if self.size == 1:
            return flag
        said = torch.tensor([float(flag)], device=self.device)
        distributed.all_reduce(said, distributed.ReduceOp.MAX)
        return bool(said.item())


ALONE = Ranks(0, 1)


@contextmanager
def join_ranks(asked_device: str) -> Iterator[Ranks]:
    """Join the processes that torchrun started; alone where it did not.

    Parameters
    ----------
    asked_device
        "auto", "cuda" or "cpu", as the recipe says.

    Raises
    ------
    DeviceError
        CUDA is asked for and there is none.
    ConfigError
        More processes than CUDA devices.
    """
    if not distributed.is_torchelastic_launched():
        yield ALONE
        return
    # Its functions take the group that is there when it is imported as their default. An optimizer
    # imports it later: then it would keep the group, whose threads abort where Python ends.
    importlib.import_module("torch.distributed.nn.functional")
    cuda = pick_device(asked_device).type == "cuda"
    distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        place = distributed.get_node_local_rank() if cuda else 0
        if cuda and place >= torch.cuda.device_count():
            raise ConfigError(
                f"Process {place} of this machine has no CUDA device: there are "
                f"{torch.cuda.device_count()}.",
                hint=f"torchrun --nproc-per-node {torch.cuda.device_count()} -m wsi_stain train",
            )
        device = pick_device(asked_device, place)
        if cuda:
            torch.cuda.set_device(device)
        yield Ranks(distributed.get_rank(), distributed.get_world_size(), device)
    finally:
        distributed.destroy_process_group()
