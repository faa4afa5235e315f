"""Room 3 of 4: what a worker is told of a slide, and what it says back. Loads no torch.

In: settings, fits, paths. Out: the frozen task, the report of a shard. Not here: the work, which
is in `worker`.

Who only hands out work needs no torch, which takes a second to import and 200 MB; so the work is
imported where it is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from wsi_stain.config import SampleConfig
from wsi_stain.doctor import may_have_cuda
from wsi_stain.stain.start import StartTransform

__all__ = ["Arithmetic", "ShardReport", "TranslateTask", "arithmetic", "cuda_here", "in_common"]


FLOAT32 = "torch.float32"


class Arithmetic(NamedTuple):
    """What shards are computed on, and in which precision: the picture depends on both."""

    device: Literal["cpu", "cuda"]
    dtype: str


def arithmetic(asked: str) -> Arithmetic:
    """Tell what "auto", "cuda" or "cpu" is where this runs.

    Raises
    ------
    DeviceError
        CUDA was asked for and there is none.
    """
    from wsi_stain.translate.bundle import fast_dtype, pick_device

    device = pick_device(asked)
    return Arithmetic("cpu" if device.type == "cpu" else "cuda", str(fast_dtype(device)))


def in_common(answers: Sequence[Arithmetic]) -> Arithmetic:
    """Settle what all can do, so that a picture is computed in one way wherever it is.

    Where one has no device, none uses its own; where one lacks units for bfloat16, or devices
    differ, all take float32.
    """
    first = answers[0]
    if all(answer == first for answer in answers):
        return first
    kinds = {answer.device for answer in answers}
    return Arithmetic("cpu" if "cpu" in kinds else "cuda", FLOAT32)


def cuda_here(asked: str) -> int:
    """Count the CUDA devices for "auto", "cuda" or "cpu", as torch sees them; it may not be asked.

    Raises
    ------
    DeviceError
        CUDA was asked for and there is none.
    """
    if asked == "cpu" or (asked == "auto" and not may_have_cuda()):
        return 0
    from wsi_stain.translate.bundle import count_cuda_devices

    return count_cuda_devices(asked)


@dataclass(frozen=True)
class ShardReport:
    """What a worker says about a finished shard."""

    n_tiles: int
    seconds: float
    device: str
    dtype: str
    asked_tiles: int = 0  # a batch
    batch_tiles: int = 0  # fewer than that where memory ran out


@dataclass(frozen=True)
class TranslateTask:
    """Everything a worker needs to translate any shard of one slide; sent to each worker once.

    Attributes
    ----------
    store
        Path of the patch store.
    bundle
        Bundle folder or name.
    sample
        Solver and guidance settings.
    start
        Slide-level start-image transform.
    white
        The slide's glass, grey levels; the glass mask is measured against it.
    map_scale
        99th percentile of the slide's gradient map; none where no term looks at the map.
    seed
        Run seed of the noise field.
    device
        "auto", "cuda" or "cpu".
    key
        Identity of the work: goes into the done marker of each shard.
    dtype
        Precision of the score net, as `Arithmetic` names it; empty: the fastest of the device.
    """

    store: Path
    bundle: str
    sample: SampleConfig
    start: StartTransform
    white: tuple[float, float, float]
    map_scale: float | None
    seed: int
    device: str
    key: str
    dtype: str = ""

    def __call__(self, shard: int) -> ShardReport:
        """Translate one shard and mark it done."""
        from wsi_stain.translate.worker import translate_shard

        return translate_shard(self, shard)
