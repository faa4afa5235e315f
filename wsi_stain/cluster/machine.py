"""What this machine offers to workers: cores, CUDA devices.

In: the operating system. Out: numbers and names. Not here: torch, Dask.
"""

from __future__ import annotations

import os

__all__ = ["available_cores", "count_workers", "visible_devices"]

# What the processor does for a tile, and the launching of what the device does, take several times
# as long as the device: one process alone leaves it idle most of the time.
MOST_PER_DEVICE = 4
CORES_PER_WORKER = 2


def available_cores() -> int:
    """Count the cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def count_workers(asked: int, n_devices: int) -> int:
    """Choose how many processes translate.

    Parameters
    ----------
    asked
        Setting; 0 leaves the choice to this machine.
    n_devices
        CUDA devices that they share in turn; 0: the processor does all.
    """
    if asked or not n_devices:
        return asked or available_cores()
    share = available_cores() // (CORES_PER_WORKER * n_devices)
    return n_devices * max(1, min(MOST_PER_DEVICE, share))


def visible_devices(count: int) -> tuple[str, ...]:
    """Name `count` CUDA devices as this process sees them: numbers, or what a scheduler set."""
    given = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    names = given if any(given) else [str(index) for index in range(count)]
    return tuple(names[:count])
