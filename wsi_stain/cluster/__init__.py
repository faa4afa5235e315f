"""Where the work runs: workers of this machine, Slurm jobs, or a scheduler that runs already.

In: `ClusterConfig`. Out: a `Crew`, and the way of tasks to it. Not here: what tasks do, torch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from wsi_stain.cluster.address import address_crew
from wsi_stain.cluster.asking import ask_all, introduce, was_killed
from wsi_stain.cluster.crew import GPU, Crew, Places, workers_for
from wsi_stain.cluster.heaps import share_heaps
from wsi_stain.cluster.local import local_crew
from wsi_stain.cluster.machine import available_cores, count_workers, visible_devices
from wsi_stain.cluster.parcels import Parcels, open_parcels, run_shard
from wsi_stain.cluster.parent import begin_early
from wsi_stain.cluster.slurm import import_jobqueue, slurm_crew
from wsi_stain.cluster.waiting import Hear, silent
from wsi_stain.config import ClusterConfig

__all__ = [
    "GPU",
    "Crew",
    "Parcels",
    "Places",
    "ask_all",
    "available_cores",
    "begin_early",
    "count_workers",
    "get_ready",
    "introduce",
    "open_crew",
    "open_parcels",
    "run_shard",
    "share_heaps",
    "visible_devices",
    "was_killed",
    "workers_for",
]


def get_ready(config: ClusterConfig) -> None:
    """Do what only the main thread can, before workers are opened in another one."""
    if config.executor == "slurm":
        import_jobqueue()


def open_crew(
    config: ClusterConfig,
    count_devices: Callable[[ClusterConfig], int],
    hear: Hear = silent,
) -> AbstractContextManager[Crew]:
    """Give a context manager that finds or starts workers, and lets go of them at the end.

    Parameters
    ----------
    config
        `executor` says where: "dask" is this machine, "slurm", "address".
    count_devices
        Counts the CUDA devices of the machine it runs on.
    hear
        Hears, now and then, that workers are waited for.

    Raises
    ------
    ConfigError
        On entering: a dashboard is asked for and cannot be, or should not.
    DeviceError
        On entering: no workers.
    """
    if config.executor == "slurm":
        return slurm_crew(config, hear)
    if config.executor == "address":
        return address_crew(config, hear)
    return local_crew(config, visible_devices(count_devices(config)))
