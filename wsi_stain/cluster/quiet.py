"""What Dask must do and say on our behalf, whatever a user's own Dask files tell it.

In: a folder. Out: settings, environments of workers. Not here: starting anything.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = [
    "PRE_SPAWN",
    "as_environment",
    "dask_settings",
    "memory_environment",
    "quiet_logs",
    "thread_environment",
    "worker_environment",
]

PRE_SPAWN = "distributed.nanny.pre-spawn-environ"
"""The setting that holds the environment in which worker processes are started."""


def dask_settings(folder: str) -> dict[str, Any]:
    """Settle what Dask would take from a user's own files, where it bears on our promises."""
    memory = "distributed.worker.memory."
    return {
        "temporary-directory": folder,
        # A paused worker takes no shards and may never wake: end it and redo its shard instead.
        memory + "target": False,
        memory + "spill": False,
        memory + "pause": False,
        memory + "terminate": 0.95,
        # A worker that takes long to come back must not be struck off.
        "distributed.deploy.lost-worker-timeout": "10 minutes",
        "distributed.scheduler.worker-ttl": None,
        # No pages and no proxies: a page that can reach a worker can run code on it.
        "distributed.scheduler.http.routes": [],
        "distributed.worker.http.routes": [],
        "distributed.worker.daemon": True,
        PRE_SPAWN: memory_environment(),
        "distributed.admin.tick.limit": "10 minutes",
        # What a scheduler and its workers do even when nothing happens: sample their own threads
        # 100 times a second, tick 50 times a second, look for copies of results to drop.
        "distributed.worker.profile.enabled": False,
        "distributed.admin.tick.interval": "500 ms",
        "distributed.admin.system-monitor.interval": "5 s",
        "distributed.scheduler.active-memory-manager.start": False,
    }


def memory_environment() -> dict[str, str]:
    """Let a process keep its memory.

    Dask tells malloc to give every freed block back at once; a net frees and takes the same
    megabytes all the time, and clearing the pages anew took two fifths of the time.
    """
    return {
        "MALLOC_TRIM_THRESHOLD_": str(2**28),
        "MALLOC_MMAP_THRESHOLD_": str(2**23),  # above: whole shards, given back when freed
        # A task runs in a thread, and a thread's own heap is given back whatever the above.
        "MALLOC_ARENA_MAX": "1",
    }


def worker_environment() -> dict[str, str]:
    """Settle in what environment a worker of this machine begins.

    Dask imports numpy before it sets a worker's own environment: by then BLAS has counted the
    cores, and after every product its idle threads would spin on those of the other workers.
    """
    return thread_environment(1) | memory_environment()


def as_environment(settings: dict[str, Any]) -> dict[str, str]:
    """Give settings to a Dask process that is started by a command: as environment variables."""
    return {
        "DASK_" + name.upper().replace(".", "__").replace("-", "_"): _literal(value)
        for name, value in settings.items()
    }


def _literal(value: Any) -> str:
    """Word a value as Python does: that is how Dask reads it back."""
    return value if isinstance(value, str) else repr(json.loads(json.dumps(value)))


def thread_environment(n_threads: int) -> dict[str, str]:
    """Bound the threads of numerical libraries: they read it once, when they are imported."""
    names = (
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "OPENCV_FOR_THREADS_NUM",
    )
    return dict.fromkeys(names, str(n_threads))


@contextmanager
def quiet_logs() -> Iterator[None]:
    """Keep Dask's own log lines from the terminal: what matters becomes an error of ours."""
    logger = logging.getLogger("distributed")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
