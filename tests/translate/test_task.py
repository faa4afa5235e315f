"""What workers are told: one arithmetic for all of them."""

from __future__ import annotations

import pytest

from wsi_stain.errors import DeviceError
from wsi_stain.translate import task
from wsi_stain.translate.bundle import fast_dtype, pick_device
from wsi_stain.translate.task import Arithmetic, arithmetic, cuda_here, in_common

FAST, PLAIN = Arithmetic("cpu", "torch.bfloat16"), Arithmetic("cpu", "torch.float32")
GPU = Arithmetic("cuda", "torch.bfloat16")


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([FAST, FAST], FAST),
        ([GPU, GPU], GPU),
        ([PLAIN], PLAIN),
        ([FAST, PLAIN, FAST], PLAIN),
        ([GPU, FAST], PLAIN),
    ],
)
def test_workers_compute_as_all_of_them_can(
    answers: list[Arithmetic], expected: Arithmetic
) -> None:
    assert in_common(answers) == in_common(answers[::-1]) == expected


def test_arithmetic_is_that_of_the_nets() -> None:
    assert arithmetic("cpu") == ("cpu", str(fast_dtype(pick_device("cpu"))))
    assert arithmetic("auto") == (pick_device("auto").type, str(fast_dtype(pick_device("auto"))))


def test_torch_is_asked_for_devices_only_where_a_driver_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsi_stain.translate.bundle.count_cuda_devices", {"auto": 3}.__getitem__)
    monkeypatch.setattr(task, "may_have_cuda", lambda: True)
    assert (cuda_here("cpu"), cuda_here("auto")) == (0, 3)
    monkeypatch.setattr(task, "may_have_cuda", lambda: False)
    assert cuda_here("auto") == 0


def test_cuda_that_was_asked_for_and_is_not_there_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(task, "may_have_cuda", lambda: False)
    with pytest.raises(DeviceError, match="CUDA was asked for"):
        cuda_here("cuda")
