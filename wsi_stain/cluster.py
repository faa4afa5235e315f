"""A Dask cluster of this machine: one process with one thread per core or CUDA device.

In: numbers of workers, device names, memory. Out: a connected client. Not here: tasks, torch.

The cluster listens on the loopback address only, shows no dashboard, keeps its files in a private
folder that goes with it, and says nothing: what matters becomes an error of ours.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from wsi_stain.errors import DeviceError

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["available_cores", "local_cluster", "visible_devices"]

LOOPBACK = "127.0.0.1"
START_TIMEOUT_S = 60
MEMORY_SHARE = 0.75


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


@contextmanager
def local_cluster(
    n_workers: int, devices: Sequence[str], memory_bytes: int, *, attempts: int
) -> Iterator[Client]:
    """Run a Dask cluster that only this machine can reach.

    Parameters
    ----------
    n_workers
        Processes to start; they share `devices` in turn.
    devices
        Values for CUDA_VISIBLE_DEVICES; none: workers see no device.
    memory_bytes
        For all workers together; a worker beyond its part is killed. 0: three quarters of what
        the machine, or its control group, has.
    attempts
        A task that kills this many workers is given up.

    Raises
    ------
    DeviceError
        Workers cannot be started.
    """
    import dask
    from distributed import Client, SpecCluster

    with (
        tempfile.TemporaryDirectory(prefix="wsi-stain-") as folder,
        dask.config.set(_dask_settings(folder)),
        _quiet_logs(),
    ):
        try:
            cluster = SpecCluster(
                scheduler=_scheduler_spec(attempts),
                workers=_worker_specs(n_workers, devices, memory_bytes, folder),
                silence_logs=logging.CRITICAL,
            )
        except (RuntimeError, OSError, TimeoutError) as error:
            raise DeviceError(
                f"{n_workers} worker processes could not be started: {error}.",
                hint="In a script, call this below `if __name__ == '__main__':`; "
                "or set cluster.executor = 'serial' in a recipe.",
            ) from error
        with cluster, Client(cluster) as client:
            yield client


def _scheduler_spec(attempts: int) -> dict[str, Any]:
    from distributed import Scheduler

    options = {
        "host": LOOPBACK,
        "port": 0,
        "protocol": "tcp://",
        "dashboard": False,
        "dashboard_address": f"{LOOPBACK}:0",
        "allowed_failures": attempts - 1,
    }
    return {"cls": Scheduler, "options": options}


def _worker_specs(
    n_workers: int, devices: Sequence[str], memory_bytes: int, folder: str
) -> dict[int, dict[str, Any]]:
    from distributed import Nanny
    from distributed.system import MEMORY_LIMIT

    memory_bytes = memory_bytes or int(MEMORY_SHARE * MEMORY_LIMIT)
    n_threads = max(1, available_cores() // n_workers) if devices else 1
    options: dict[str, Any] = {
        # On a device one thread reads the next shard while the other translates.
        "nthreads": 2 if devices else 1,
        "host": LOOPBACK,
        "protocol": "tcp://",
        "dashboard": False,
        "dashboard_address": f"{LOOPBACK}:0",
        "local_directory": folder,
        "memory_limit": memory_bytes // n_workers,
        "death_timeout": START_TIMEOUT_S,
        "silence_logs": logging.CRITICAL,
        "preload": [],
        "config": _dask_settings(folder),
    }
    return {
        index: {
            "cls": Nanny,
            "options": {
                **options,
                "env": _worker_environment(
                    devices[index % len(devices)] if devices else "", n_threads
                ),
            },
        }
        for index in range(n_workers)
    }


def _worker_environment(device: str, n_threads: int) -> dict[str, str]:
    """Set before any task imports numpy or torch: they read it once."""
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {"CUDA_VISIBLE_DEVICES": device} | dict.fromkeys(threads, str(n_threads))


def _dask_settings(folder: str) -> dict[str, Any]:
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
        "distributed.scheduler.http.routes": [],
        "distributed.worker.http.routes": [],
        "distributed.worker.daemon": True,
        # Dask tells malloc to give every freed block back at once; a net frees and takes the same
        # megabytes all the time, and clearing the pages anew took two fifths of the time.
        "distributed.nanny.pre-spawn-environ": {
            "MALLOC_TRIM_THRESHOLD_": str(2**28),
            "MALLOC_MMAP_THRESHOLD_": str(2**23),  # above: whole shards, given back when freed
        },
        "distributed.admin.tick.limit": "10 minutes",
    }


@contextmanager
def _quiet_logs() -> Iterator[None]:
    """Keep Dask's own log lines from the terminal: what matters becomes an error of ours."""
    logger = logging.getLogger("distributed")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
