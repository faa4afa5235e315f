"""Dask as separate processes, and a real Slurm of one node: started, and killed, by tests.

Slurm needs root and Debian's packages slurm-wlm and munge (`.ci/run` installs them where it can).
Its two GPUs are null devices: Slurm binds and counts them like real ones.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from wsi_stain.cluster.credentials import new_credentials
from wsi_stain.cluster.quiet import as_environment, dask_settings

CHECKOUT = Path(__file__).resolve().parents[2]
LOOPBACK = "127.0.0.1"
START_S = 500  # a busy machine is no failure
SLURM_CONF = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
GresTypes=gpu
SlurmctldPort={port}
SlurmdPort={worker_port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory={memory_mb} Gres=gpu:2 State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass
class DaskProcesses:
    """Scheduler and workers, started by the commands that docs/cluster.md gives."""

    folder: Path
    tls: dict[str, Path] | None
    scheduler: subprocess.Popen[bytes] | None = None
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    address: str = ""

    def start_scheduler(self, port: int = 0) -> str:
        where = ["--host", LOOPBACK, "--port", str(port), "--protocol", self.protocol]
        self.scheduler = self._start("dask_scheduler", *where, name="scheduler")
        self.address = self._address()
        return self.address

    def start_worker(self, *arguments: str) -> subprocess.Popen[bytes]:
        name = f"worker-{len(self.workers)}"
        common = ["--host", LOOPBACK, "--protocol", self.protocol, "--nthreads", "1"]
        worker = self._start("dask_worker", self.address, *common, *arguments, name=name)
        self.workers.append(worker)
        return worker

    def wait_for_workers(self, count: int) -> None:
        log = self.folder / "scheduler.log"
        end_s = time.monotonic() + START_S
        while log.read_text().count("Register worker") < count:
            assert time.monotonic() < end_s, log.read_text()
            time.sleep(0.05)

    def flags(self) -> list[str]:
        """What `wsi-stain translate` is given."""
        if self.tls is None:
            return ["--scheduler", self.address]
        files = [f"--tls-{name}={path}" for name, path in self.tls.items()]
        return ["--scheduler", self.address, *files]

    @property
    def protocol(self) -> str:
        return "tcp://" if self.tls is None else "tls://"

    def listening(self) -> set[str]:
        """Addresses that any of the processes listens on."""
        return {
            connection.laddr.ip
            for process in [self.scheduler, *self.workers]
            if process is not None
            for member in [psutil.Process(process.pid), *children(process.pid)]
            for connection in member.net_connections(kind="inet")
            if connection.status == psutil.CONN_LISTEN
        }

    def stop(self) -> None:
        processes = [process for process in [*self.workers, self.scheduler] if process is not None]
        for process in processes:
            for child in children(process.pid):
                child.kill()
            process.kill()
            process.wait()

    def _start(self, program: str, *arguments: str, name: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.{program}", *arguments]
        command += ["--no-dashboard", "--dashboard-address", f"{LOOPBACK}:0"]
        if self.tls is not None:
            names = {"ca": "ca-file", "cert": "cert", "key": "key"}
            command += [f"--tls-{names[key]}={path}" for key, path in self.tls.items()]
        settings = as_environment(dask_settings(str(self.folder)))
        log = (self.folder / f"{name}.log").open("wb")
        with log:
            # In a session of its own, as on another host: Ctrl-C here is none there.
            return subprocess.Popen(
                command,
                cwd=CHECKOUT,
                env=os.environ | settings,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _address(self) -> str:
        log = self.folder / "scheduler.log"
        end_s = time.monotonic() + START_S
        while "Scheduler at:" not in (text := log.read_text()):
            assert time.monotonic() < end_s, text
            time.sleep(0.05)
        return text.split("Scheduler at:")[1].split()[0]


def children(pid: int) -> list[psutil.Process]:
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of one authority: ca, cert, key (mode 600)."""
    folder = tmp_path_factory.mktemp("tls")
    new_credentials(folder)
    return {name: folder / f"{name}.pem" for name in ("ca", "cert", "key")}


@pytest.fixture
def start_dask(tmp_path: Path) -> Iterator[Callable[[dict[str, Path] | None], DaskProcesses]]:
    """Give the function that makes a `DaskProcesses`; all are killed at the end."""
    made: list[DaskProcesses] = []

    def start(tls: dict[str, Path] | None) -> DaskProcesses:
        folder = tmp_path / f"dask-{len(made)}"
        folder.mkdir()
        made.append(DaskProcesses(folder, tls))
        return made[-1]

    yield start
    for processes in made:
        processes.stop()


@dataclass(frozen=True)
class SlurmNode:
    """A Slurm of this host, and what a test asks of it."""

    folder: Path

    def call(self, *command: object) -> str:
        return _call(*command)

    def jobs(self, state: str = "R") -> list[str]:
        """Numbers of the jobs in a state: those that run, or PD for those that wait."""
        return _call("squeue", "-h", "-t", state, "-o", "%i").split()

    def wait_until(self, true: Callable[[], bool], what: str) -> None:
        end_s = time.monotonic() + START_S
        while not true():
            assert time.monotonic() < end_s, what
            time.sleep(0.1)

    def cancel_all(self) -> None:
        for job in [*self.jobs("R"), *self.jobs("PD")]:
            _call("scancel", job)


def _call(*command: object) -> str:
    words = [str(word) for word in command]
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _stop(pid_file: Path) -> None:
    process = psutil.Process(int(pid_file.read_text()))
    process.terminate()
    process.wait(timeout=30)


@pytest.fixture(scope="session")
def munge() -> Iterator[None]:
    """Slurm's way to know who is who; left alone where it runs already."""
    for name in ("munged", "slurmctld", "slurmd"):
        if shutil.which(name) is None:
            pytest.skip(f"no {name}: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("a Slurm of its own needs root")
    running = "munged" in {process.info["name"] for process in psutil.process_iter(["name"])}
    if not running:
        _call("install", "-d", "-o", "munge", "-g", "munge", "/run/munge")
        _call("runuser", "-u", "munge", "--", shutil.which("munged"))
    yield
    if not running:
        _stop(Path("/run/munge/munged.pid"))


@pytest.fixture(scope="session")
def node(munge: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmNode]:
    """A Slurm of this host with two GPUs that are none."""
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    for name in ("gpu0", "gpu1"):
        _call("mknod", folder / name, "c", "1", "3")
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
    facts = {
        "host": socket.gethostname().split(".")[0],
        "port": _free_port(),
        "worker_port": _free_port(),
        "folder": folder,
        "memory_mb": psutil.virtual_memory().total // 2**20 // 2,
    }
    conf, slurm = folder / "slurm.conf", SlurmNode(folder)
    conf.write_text(SLURM_CONF.format(**facts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(conf))
        _call("slurmctld", "-f", conf)
        _call("slurmd", "-f", conf)
        try:
            slurm.wait_until(
                lambda: _call("sinfo", "-h", "-o", "%T").strip() == "idle", "no idle node"
            )
            yield slurm
        finally:
            slurm.cancel_all()
            _stop(folder / "slurmd.pid")
            _stop(folder / "slurmctld.pid")
