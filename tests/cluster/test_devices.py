"""Workers of devices: each its own, and bound to cores by dask-cuda where that is installed."""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any

import pytest

from wsi_stain.cluster import count_workers, devices, local
from wsi_stain.cluster.devices import DevicePlan, plan_devices
from wsi_stain.config import ClusterConfig


class CPUAffinity:
    """Stands in for dask-cuda's plugin."""

    def __init__(self, cores: list[int]) -> None:
        self.cores = cores


@pytest.fixture
def dask_cuda(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Put a stand-in of dask-cuda where it would be imported; gives what it was asked for."""
    asked: list[Any] = []

    def get_cpu_affinity(device: int | str) -> list[int]:
        asked.append(device)
        return [*os.sched_getaffinity(0), 5000] if device != 9 else [5000]

    plugins, utils = ModuleType("dask_cuda.plugins"), ModuleType("dask_cuda.utils")
    plugins.CPUAffinity = CPUAffinity  # type: ignore[attr-defined]
    utils.get_cpu_affinity = get_cpu_affinity  # type: ignore[attr-defined]
    for module in (ModuleType("dask_cuda"), plugins, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(devices, "find_spec", lambda name: object())
    return asked


@pytest.mark.parametrize(
    ("names", "is_installed", "expected"),
    [(["0"], True, True), ([], True, False), (["0"], False, False)],
)
def test_dask_cuda_is_used_where_it_is_and_has_a_device(
    monkeypatch: pytest.MonkeyPatch, names: list[str], is_installed: bool, expected: bool
) -> None:
    monkeypatch.setattr(devices, "find_spec", lambda name: object() if is_installed else None)
    assert plan_devices(names) == DevicePlan(tuple(names), expected)


def test_worker_is_bound_to_the_cores_beside_its_device(dask_cuda: list[Any]) -> None:
    plan = plan_devices(["3", "GPU-a"])
    specs = local._worker_specs(ClusterConfig(readers=1), 3, plan, "/nowhere")
    options = [spec["options"] for spec in specs.values()]
    assert [one["env"]["CUDA_VISIBLE_DEVICES"] for one in options] == ["3", "GPU-a", "3", ""]
    assert dask_cuda == [3, "GPU-a", 3], "numbers as numbers, names as names"
    for one in options[:3]:
        (plugin,) = one["plugins"]
        assert plugin.cores == sorted(os.sched_getaffinity(0)), "no core that is not ours"
    assert "plugins" not in options[3]


def test_cores_that_are_not_ours_bind_nobody(dask_cuda: list[Any]) -> None:
    assert plan_devices(["9"]).plugins("9") == {}


def test_without_dask_cuda_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dask_cuda", None)
    assert DevicePlan(("0",), False).plugins("0") == {}


@pytest.mark.parametrize(
    ("asked", "n_devices", "cores", "expected"),
    [(0, 0, 6, 6), (3, 0, 6, 3), (0, 1, 16, 4), (0, 1, 2, 1), (0, 8, 32, 16), (5, 2, 64, 5)],
)
def test_workers_share_a_device_when_cores_allow(
    monkeypatch: pytest.MonkeyPatch, asked: int, n_devices: int, cores: int, expected: int
) -> None:
    monkeypatch.setattr("wsi_stain.cluster.machine.available_cores", lambda: cores)
    assert count_workers(asked, n_devices) == expected
