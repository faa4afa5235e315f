"""What this machine offers to workers: cores, CUDA devices.

In: the operating system. Out: numbers and names. Not here: torch, Dask.
"""

from __future__ import annotations

import os

__all__ = ["available_cores", "visible_devices"]


def available_cores() -> int:
    """Count the cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def visible_devices(count: int) -> tuple[str, ...]:
    """Name `count` CUDA devices as this process sees them: numbers, or what a scheduler set."""
    given = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    names = given if any(given) else [str(index) for index in range(count)]
    return tuple(names[:count])
