"""A Dask cluster of this machine: one process with one thread per core or CUDA device.

In: settings, device names. Out: a `Crew`. Not here: tasks, torch.

The cluster listens on the loopback address only, shows no dashboard unless asked for, keeps its
files in a private folder that goes with it, and says nothing: what matters becomes an error of
ours.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from wsi_stain.cluster.crew import GPU, Crew, gpu_places
from wsi_stain.cluster.dashboard import check_dashboard, own_link, page_settings
from wsi_stain.cluster.devices import DevicePlan, plan_devices
from wsi_stain.cluster.machine import available_cores, count_workers
from wsi_stain.cluster.parent import start_method, warm_up
from wsi_stain.cluster.quiet import (
    PRE_SPAWN,
    dask_settings,
    quiet_logs,
    thread_environment,
    worker_environment,
)
from wsi_stain.config import ClusterConfig
from wsi_stain.errors import DeviceError

__all__ = ["local_crew"]

LOOPBACK = "127.0.0.1"
START_TIMEOUT_S = 300  # a busy machine is no failure
MEMORY_SHARE = 0.75


@contextmanager
def local_crew(config: ClusterConfig, devices: Sequence[str]) -> Iterator[Crew]:
    """Run a Dask cluster that only this machine can reach.

    Parameters
    ----------
    config
        `workers` processes share `devices` in turn; `readers` more see no device and only read.
        A worker beyond its part of `memory_limit_mb` is killed; 0: of three quarters of what the
        machine, or its control group, has. A task that kills `attempts` workers is given up.
    devices
        Values for CUDA_VISIBLE_DEVICES; none: workers see no device.

    Raises
    ------
    DeviceError
        Workers cannot be started.
    """
    import dask
    from distributed import Client, SpecCluster

    check_dashboard(config)
    plan = plan_devices(devices)
    n_workers = count_workers(config.workers, len(devices))
    warm_up(config)
    with (
        tempfile.TemporaryDirectory(prefix="wsi-stain-") as folder,
        dask.config.set(_settings(folder, plan.devices) | page_settings(config)),
        quiet_logs(),
    ):
        try:
            cluster = SpecCluster(
                scheduler=_scheduler_spec(config),
                workers=_worker_specs(config, n_workers, plan, folder),
                silence_logs=logging.CRITICAL,
            )
        except (RuntimeError, OSError, TimeoutError, AssertionError) as error:
            # Dask asserts that a worker runs which it ends for not having started in time.
            raise DeviceError(
                f"{n_workers} worker processes could not be started: {error}.",
                hint="In a script, call this below `if __name__ == '__main__':`; "
                "or set cluster.executor = 'serial' in a recipe.",
            ) from error
        with cluster, Client(cluster) as client:
            yield Crew(
                client,
                n_workers + _readers(config, plan),
                config.wait_s,
                gpu_places(bool(devices)),
                dashboard=own_link(client, config),
            )


def _settings(folder: str, devices: Sequence[str]) -> dict[str, Any]:
    return dask_settings(folder) | {
        PRE_SPAWN: worker_environment(),
        "distributed.worker.multiprocessing-method": start_method(),
    }


def _readers(config: ClusterConfig, plan: DevicePlan) -> int:
    """Without devices every worker reads and translates: readers beside them gain nothing."""
    return config.readers if plan.devices else 0


def _scheduler_spec(config: ClusterConfig) -> dict[str, Any]:
    from distributed import Scheduler

    options = {
        "host": LOOPBACK,
        "port": 0,
        "protocol": "tcp://",
        "dashboard": config.dashboard,
        "dashboard_address": f"{LOOPBACK}:0",
        "allowed_failures": config.attempts - 1,
    }
    return {"cls": Scheduler, "options": options}


def _worker_specs(
    config: ClusterConfig, n_workers: int, plan: DevicePlan, folder: str
) -> dict[int, dict[str, Any]]:
    from distributed import Nanny
    from distributed.system import MEMORY_LIMIT

    memory_bytes = config.memory_limit_mb * 2**20 or int(MEMORY_SHARE * MEMORY_LIMIT)
    n_readers = _readers(config, plan)
    n_threads = max(1, available_cores() // n_workers) if plan.devices else 1
    options: dict[str, Any] = {
        "host": LOOPBACK,
        "protocol": "tcp://",
        "dashboard": False,
        "dashboard_address": f"{LOOPBACK}:0",
        "local_directory": folder,
        "memory_limit": memory_bytes // (n_workers + n_readers),
        "death_timeout": START_TIMEOUT_S,
        "silence_logs": logging.CRITICAL,
        "preload": [],
        "config": _settings(folder, plan.devices),
    }

    def worker(device: str, n_threads: int) -> dict[str, Any]:
        environment = {"CUDA_VISIBLE_DEVICES": device} | thread_environment(n_threads)
        # On a device one thread reads the next shard while the other translates.
        of_device = {"nthreads": 2, "resources": {GPU: 1}} if device else {"nthreads": 1}
        of_device |= plan.plugins(device)
        return {"cls": Nanny, "options": {**options, **of_device, "env": environment}}

    workers = [worker(name, n_threads) for name in plan.names(n_workers)]
    return dict(enumerate([*workers, *(worker("", 1) for _ in range(n_readers))]))
