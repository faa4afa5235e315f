"""Workers as Slurm jobs, by dask-jobqueue: one job, one worker, one device.

In: settings. Out: a `Crew`. Not here: what runs on them.

The scheduler runs in this process. All that travels is encrypted and authenticated with a
certificate made for this run; its key lies in a folder that only this user can enter, beside the
jobs' logs, and goes with the run. Jobs that end (walltime, preemption, scancel) are replaced. While
none runs, what Slurm says of those that wait is told.
"""

from __future__ import annotations

import logging
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsi_stain.cluster.address import wait_for_workers
from wsi_stain.cluster.credentials import new_credentials
from wsi_stain.cluster.crew import GPU, Crew, gpu_places
from wsi_stain.cluster.dashboard import check_dashboard, own_link, page_settings
from wsi_stain.cluster.quiet import as_environment, dask_settings, quiet_logs, thread_environment
from wsi_stain.cluster.waiting import Hear, Waiting
from wsi_stain.config import ClusterConfig, SlurmConfig
from wsi_stain.errors import ConfigError, DeviceError
from wsi_stain.files import cannot_write

if TYPE_CHECKING:
    from dask_jobqueue import SLURMCluster
    from distributed import Security

__all__ = ["import_jobqueue", "slurm_crew"]

LOOPBACK = "127.0.0.1"
# A worker says good-bye this long before its walltime, each one a little apart from the others.
LEAVE_MIN = 5
STAGGER_S = 120
ASK_S = 20
LOST_JOB_S = 20
ADAPT_S = 5
# The loss of this many workers is weather, not a fault of the shard that they worked on.
ALLOWED_LOSSES = 3
PRIVATE = 0o700


@contextmanager
def slurm_crew(config: ClusterConfig, hear: Hear) -> Iterator[Crew]:
    """Submit `workers` jobs, and keep as many running.

    Parameters
    ----------
    config
        `slurm`: what a job asks for. `wait_s`: how long a first job may wait in the queue.
    hear
        Hears, now and then, of jobs in the queue while none runs.

    Raises
    ------
    ConfigError
        The shared folder cannot be used, or a dashboard is asked for that cannot be.
    DeviceError
        dask-jobqueue or Slurm is not there, Slurm refuses the job, or no job has started in time.
    """
    import dask
    from distributed import Client

    _check_tools()
    check_dashboard(config)
    if threading.current_thread() is threading.main_thread():
        import_jobqueue()
    with _private_folder(config.slurm) as folder:
        settings = _settings(str(folder))
        with dask.config.set(settings | page_settings(config)), quiet_logs():
            cluster = _start(config, folder, settings)
            with cluster, Client(cluster) as client:
                script = folder / "job.sh"
                script.write_text(cluster.job_script(), encoding="utf-8")
                _ask_slurm(script)
                cluster.adapt(
                    minimum_jobs=config.workers,
                    maximum_jobs=config.workers,
                    interval=f"{ADAPT_S} s",
                )
                waiting = Waiting(hear, config.workers, lambda: _queue(cluster))
                logs = f"(logs: {_logs(config.slurm)})"
                wait_for_workers(client, config.wait_s, logs, waiting)
                yield Crew(
                    client,
                    config.workers,
                    config.wait_s,
                    gpu_places(bool(config.slurm.gres)),
                    is_remote=True,
                    where=f"in Slurm {logs}",
                    waiting=waiting,
                    dashboard=own_link(client, config),
                )


def _queue(cluster: SLURMCluster) -> str:
    """Ask Slurm what its jobs wait for."""
    jobs = [job.job_id for job in list(cluster.workers.values()) if getattr(job, "job_id", None)]
    if not jobs:
        return "no job yet"
    command = ["squeue", "--noheader", "--format=%i|%T|%r", f"--jobs={','.join(jobs)}"]
    try:
        asked = subprocess.run(  # noqa: S603 - fixed
            command, capture_output=True, text=True, check=True, timeout=ASK_S
        )
    except (OSError, subprocess.SubprocessError):
        return "squeue does not answer"
    return queue_line(asked.stdout)


def queue_line(answer: str) -> str:
    """Word what squeue says, jobs of one state and reason together.

    Parameters
    ----------
    answer
        Lines of number, state and reason: ``17|PENDING|Resources``.
    """
    groups: dict[str, list[str]] = {}
    for line in answer.splitlines():
        number, state, reason = line.strip().split("|", 2)
        groups.setdefault(f"{state} ({reason})" if reason != "None" else state, []).append(number)
    return ", ".join(
        f"job{'s' if len(numbers) > 1 else ''} {', '.join(numbers)} {state}"
        for state, numbers in groups.items()
    )


def import_jobqueue() -> None:
    """Import dask-jobqueue, if it is there; call it in the main thread.

    It takes over Ctrl-C as it is imported, which no other thread may do; here Ctrl-C is given back.
    """
    from importlib.util import find_spec

    if find_spec("dask_jobqueue") is None:
        return  # told when workers are started
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    import dask_jobqueue  # noqa: F401

    for number, handler in handlers.items():
        signal.signal(number, handler)


def _check_tools() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("dask_jobqueue", "cryptography") if find_spec(name) is None]
    if missing:
        raise DeviceError(
            f"Slurm needs {' and '.join(missing)}, which this installation lacks.",
            hint="pip install 'wsi-stain[slurm]'",
        )
    if shutil.which("sbatch") is None:
        raise DeviceError(
            "There is no sbatch on this host: Slurm's commands are not installed here.",
            hint="Start it on a login node, or give workers by address: --scheduler.",
        )


def _logs(slurm: SlurmConfig) -> Path:
    return Path(slurm.folder).absolute() / "logs"


@contextmanager
def _private_folder(slurm: SlurmConfig) -> Iterator[Path]:
    """Make a folder for the run's key that nobody else can enter, and remove it at the end."""
    shared = Path(slurm.folder).absolute()
    if shlex.quote(str(shared)) != str(shared):
        raise ConfigError(
            f"cluster.slurm.folder is {shared}: job scripts cannot name such a folder.",
            hint="Choose one without spaces and signs.",
        )
    try:
        shared.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix="run-", dir=shared)  # mode 700
    except OSError as error:
        raise cannot_write(shared, error) from error
    with folder as name:
        yield Path(name)


def _settings(folder: str) -> dict[str, Any]:
    # A lost job is replaced soon: Slurm gives a new one another name.
    return dask_settings(folder) | {"distributed.deploy.lost-worker-timeout": f"{LOST_JOB_S} s"}


def _start(config: ClusterConfig, folder: Path, settings: dict[str, Any]) -> SLURMCluster:
    from dask_jobqueue import SLURMCluster

    try:
        cluster = SLURMCluster(
            **_job(config, settings, new_credentials(folder)),
            silence_logs=logging.CRITICAL,
            scheduler_options=_scheduler_options(config),
        )
    except (RuntimeError, OSError, ValueError, TimeoutError) as error:
        raise DeviceError(f"The scheduler for Slurm jobs did not start: {error}.") from error
    return cluster


def _ask_slurm(script: Path) -> None:
    """Have Slurm check the job: one that it refuses would be tried again and again, unheard."""
    command = ["sbatch", "--test-only", str(script)]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - fixed
    if asked.returncode != 0:
        raise DeviceError(
            f"Slurm did not take the job: {' '.join(asked.stderr.split())[-400:]}.",
            hint="Check [cluster.slurm] in the recipe: queue, account, gres, memory_mb.",
        )


def _scheduler_options(config: ClusterConfig) -> dict[str, Any]:
    from distributed.utils import get_ip

    slurm = config.slurm
    where = {"interface": slurm.interface} if slurm.interface else {"host": get_ip()}
    return where | {
        "port": 0,
        "dashboard": config.dashboard,
        "dashboard_address": f"{LOOPBACK}:0",
        "allowed_failures": ALLOWED_LOSSES,
    }


def _job(config: ClusterConfig, settings: dict[str, Any], security: Security) -> dict[str, Any]:
    """Say what a job asks for, and how its worker is started."""
    slurm = config.slurm
    local = as_environment(settings | {"temporary-directory": slurm.scratch})
    exports = local | thread_environment(slurm.cores)
    gres = [f"--gres={slurm.gres}"] if slurm.gres else []
    return {
        "queue": slurm.queue or None,
        "account": slurm.account or None,
        "interface": slurm.interface or None,
        # On a device one thread reads the next shard while the other translates.
        "cores": 2 if slurm.gres else 1,
        "job_cpu": slurm.cores,
        "processes": 1,
        "memory": f"{slurm.memory_mb} MiB",
        "walltime": f"{slurm.walltime_min // 60:02}:{slurm.walltime_min % 60:02}:00",
        "protocol": "tls://",
        "security": security,
        "local_directory": slurm.scratch,
        "log_directory": str(_logs(slurm)),
        "python": shlex.quote(sys.executable),
        "job_name": "wsi-stain",
        "job_extra_directives": [*gres, *slurm.directives],
        "job_script_prologue": [
            *slurm.setup,
            *(f"export {name}={shlex.quote(value)}" for name, value in exports.items()),
        ],
        "worker_extra_args": _worker_arguments(slurm),
    }


def _worker_arguments(slurm: SlurmConfig) -> list[str]:
    lifetime_min = max(1, slurm.walltime_min - LEAVE_MIN)
    stagger_s = min(STAGGER_S, 60 * lifetime_min // 4)  # never below a life of no length
    arguments = ["--lifetime", f"{lifetime_min}m", "--lifetime-stagger", f"{stagger_s}s"]
    # Even the page that tells a worker's health stays on its own host.
    arguments += ["--no-dashboard", "--dashboard-address", f"{LOOPBACK}:0"]
    return [*arguments, "--resources", f"{GPU}=1"] if slurm.gres else arguments
