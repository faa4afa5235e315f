"""How a worker is bound to its CUDA device: by its environment, and by dask-cuda where it is there.

In: names of devices. Out: what a worker process is started with. Not here: torch, the cluster.

dask-cuda knows which cores lie beside which device, and keeps a worker on them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

__all__ = ["DevicePlan", "plan_devices"]

DASK_CUDA = "dask_cuda"


@dataclass(frozen=True)
class DevicePlan:
    """Which worker gets which device, and who binds it to the cores beside.

    Attributes
    ----------
    devices
        Values for CUDA_VISIBLE_DEVICES, taken in turn; none: workers see no device.
    by_dask_cuda
        Whether dask-cuda binds workers to cores.
    """

    devices: tuple[str, ...]
    by_dask_cuda: bool

    def names(self, n_workers: int) -> list[str]:
        """Name the device of each worker."""
        devices = self.devices or ("",)
        return [devices[index % len(devices)] for index in range(n_workers)]

    def plugins(self, device: str) -> dict[str, Any]:
        """Give what a worker of `device` is started with, by its name as an option of Dask's."""
        if not (self.by_dask_cuda and device):
            return {}
        from dask_cuda.plugins import CPUAffinity
        from dask_cuda.utils import get_cpu_affinity

        beside = set(get_cpu_affinity(int(device) if device.isdigit() else device))
        allowed = sorted(beside & os.sched_getaffinity(0))  # a batch system may give others
        return {"plugins": (CPUAffinity(allowed),)} if allowed else {}


def plan_devices(devices: Sequence[str]) -> DevicePlan:
    """Decide: dask-cuda is used where it is installed and there is a device."""
    return DevicePlan(tuple(devices), bool(devices) and find_spec(DASK_CUDA) is not None)
