"""Memory that runs out halves the batch; the tiles stay what they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from wsi_stain.config import SampleConfig
from wsi_stain.errors import DeviceError
from wsi_stain.stain.normalize import StainTransform
from wsi_stain.stain.start import StartTransform
from wsi_stain.translate.bundle import load_bundle
from wsi_stain.translate.headroom import Headroom, is_out_of_memory
from wsi_stain.translate.networks import ScoreNet
from wsi_stain.translate.task import TranslateTask
from wsi_stain.translate.worker import translate_tiles

WHITE = (243.0, 243.0, 244.0)
EYE = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
STAIN = StainTransform(
    method="macenko",
    white=WHITE,
    target_white=WHITE,
    od_map=EYE,
    stain_od=(EYE[0], EYE[1]),
    stain_c99=(1.0, 1.0),
    n_stained=0,
)


def cuda_error(batch: int) -> None:
    """Raise what CUDA's allocator raises."""
    raise torch.cuda.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {batch} GiB.")


def cpu_error(batch: int) -> None:
    """Have the CPU's allocator raise for real: 2^62 bytes are nowhere."""
    torch.empty(2**62 * batch // batch, dtype=torch.uint8)


@pytest.mark.parametrize("refuse", [cuda_error, cpu_error])
def test_batch_halves_and_tiles_stay_within_one_grey_level(
    refuse: Callable[[int], None], tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = TranslateTask(
        store=Path("store"),
        bundle=str(tiny_bundle),
        sample=SampleConfig(steps=2, batch_tiles=4),
        start=StartTransform(kind="stain", stain=STAIN, target_white=WHITE, rows=EYE),
        white=WHITE,
        map_scale=0.4,
        seed=5,
        device="cpu",
        key="key",
    )
    bundle = load_bundle(str(tiny_bundle), torch.device("cpu"))
    he = np.random.default_rng(0).integers(60, 190, (5, 96, 96, 3)).astype(np.uint8)
    places = np.array([[64 * i, 0] for i in range(5)], np.int64)
    whole = translate_tiles(bundle, task, he, places).ihc
    seen: list[int] = []
    inner = ScoreNet.inner

    def tight(self: ScoreNet, x: torch.Tensor, log_noise: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        if len(x) > 1:
            refuse(len(x))
        return inner(self, x, log_noise)

    monkeypatch.setattr(ScoreNet, "inner", tight)
    headroom = Headroom(4)
    made = translate_tiles(bundle, task, he, places, headroom).ihc
    assert headroom.batch_tiles == 1
    assert seen[:3] == [4, 2, 1]
    assert set(seen[3:]) == {1}, "what did not fit once is not tried again"
    assert np.abs(made.astype(int) - whole.astype(int)).max() <= 1


def test_every_tile_is_done_once_when_memory_runs_out_midway() -> None:
    headroom, left = Headroom(4), [3]

    def work(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        left[0] -= 1
        if left[0] == 0:
            cuda_error(4)
        return rows

    done = np.concatenate(headroom.run(work, 11))
    assert done[:11].tolist() == list(range(11))
    assert headroom.batch_tiles == 2


def test_device_without_room_for_one_tile_is_named() -> None:
    with pytest.raises(DeviceError, match="too little memory for one tile") as caught:
        Headroom(2).run(lambda rows: cuda_error(1), 3)
    assert "--workers 1" in caught.value.hint


def test_other_errors_pass() -> None:
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))

    def work(rows: npt.NDArray[np.int64]) -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        Headroom(2).run(work, 3)
