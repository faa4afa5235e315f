"""Workers as Slurm jobs: on a real Slurm of one node, which the test starts and stops itself.

Needs root and Debian's packages slurm-wlm and munge (`.ci/run` installs them where it can). The two
GPUs are null devices: Slurm binds and counts them like real ones.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from wsi_stain.cluster import slurm
from wsi_stain.cluster.credentials import new_credentials
from wsi_stain.config import BundleSpec, ClusterConfig, RunConfig, SlurmConfig, TileConfig
from wsi_stain.dispatch import open_executor
from wsi_stain.errors import ConfigError, DeviceError
from wsi_stain.manifest import Event
from wsi_stain.pipeline import translate_slide
from wsi_stain.planning import plan_slide
from wsi_stain.translate.bundle import save_nets

CHECKOUT = Path(__file__).resolve().parents[2]
START_S = 120
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


def call(*command: object) -> str:
    words = [str(word) for word in command]
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout


def wait_until(true: Callable[[], bool], what: str) -> None:
    end_s = time.monotonic() + START_S
    while not true():
        assert time.monotonic() < end_s, what
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def munge() -> Iterator[None]:
    """Slurm's way to know who is who; left alone where it runs already."""
    for name in ("munged", "slurmctld", "slurmd"):
        if shutil.which(name) is None:
            pytest.skip(f"no {name}: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("a Slurm of its own needs root")
    running = "munged" in {process.info["name"] for process in psutil.process_iter(["name"])}
    if not running:
        call("install", "-d", "-o", "munge", "-g", "munge", "/run/munge")
        call("runuser", "-u", "munge", "--", shutil.which("munged"))
    yield
    if not running:
        stop(Path("/run/munge/munged.pid"))


def stop(pid_file: Path) -> None:
    with_pid = psutil.Process(int(pid_file.read_text()))
    with_pid.terminate()
    with_pid.wait(timeout=30)


@pytest.fixture(scope="module")
def node(munge: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Slurm of this host with two GPUs that are none; gives its folder."""
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    for name in ("gpu0", "gpu1"):
        call("mknod", folder / name, "c", "1", "3")
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
    facts = {
        "host": socket.gethostname().split(".")[0],
        "port": free_port(),
        "worker_port": free_port(),
        "folder": folder,
        "memory_mb": psutil.virtual_memory().total // 2**20 // 2,
    }
    conf = folder / "slurm.conf"
    conf.write_text(SLURM_CONF.format(**facts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(conf))
        call("slurmctld", "-f", conf)
        call("slurmd", "-f", conf)
        try:
            wait_until(lambda: call("sinfo", "-h", "-o", "%T").strip() == "idle", "no idle node")
            yield folder
        finally:
            for job in call("squeue", "-h", "-o", "%i").split():
                call("scancel", job)
            stop(folder / "slurmd.pid")
            stop(folder / "slurmctld.pid")


def settings(folder: Path, **more: Any) -> ClusterConfig:
    job = SlurmConfig(
        queue="batch",
        gres="gpu:1",
        cores=1,
        memory_mb=1500,
        walltime_min=20,
        interface="lo",
        folder=str(folder / "shared"),
        scratch=str(folder),
        directives=("--requeue",),
        # Workers run this checkout, as the test does.
        setup=(f"export PYTHONPATH={CHECKOUT}",),
    )
    given: dict[str, Any] = {"executor": "slurm", "workers": 2, "device": "cpu", "wait_s": 240}
    return ClusterConfig(**(given | more), slurm=job)


def jobs() -> list[str]:
    """Names of jobs that run now."""
    return call("squeue", "-h", "-t", "R", "-o", "%i").split()


# ---- without Slurm ------------------------------------------------------------------------------


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with (
        pytest.raises(DeviceError, match="dask_jobqueue") as caught,
        open_executor(settings(Path("/nowhere")), lambda _: 0),
    ):
        pass
    assert "wsi-stain[slurm]" in caught.value.hint


def test_host_without_slurm_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with (
        pytest.raises(DeviceError, match="no sbatch on this host"),
        open_executor(settings(Path("/nowhere")), lambda _: 0),
    ):
        pass


def test_folder_that_a_job_script_cannot_name_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/sbatch")
    with (
        pytest.raises(ConfigError, match="cannot name such a folder"),
        open_executor(settings(tmp_path / "my slides"), lambda _: 0),
    ):
        pass


def test_workers_elsewhere_need_no_memory_here(synthetic_slide: Path, tmp_path: Path) -> None:
    config = RunConfig(cluster=settings(tmp_path, workers=400))
    plan = plan_slide(synthetic_slide, config)
    with plan.source:
        assert plan.projection.memory_bytes < 2e9


def test_job_script_asks_for_one_device_and_keeps_pages_at_home(tmp_path: Path) -> None:
    from dask_jobqueue import SLURMCluster  # noqa: PLC0415 - only where it is used

    config = settings(tmp_path)
    job = slurm._job(config, slurm._settings(str(tmp_path)), new_credentials(tmp_path))
    options = slurm._scheduler_options(config)
    with SLURMCluster(**job, scheduler_options=options) as cluster:
        script = cluster.job_script()
        assert cluster.scheduler_address.startswith("tls://127.0.0.1:")
    for line in ("#SBATCH --gres=gpu:1", "#SBATCH -p batch", "#SBATCH -t 00:20:00"):
        assert line in script.splitlines()
    for words in ("--resources GPU=1", "--lifetime 15m", "--dashboard-address 127.0.0.1:0"):
        assert words in script
    assert "export DASK_DISTRIBUTED__WORKER__HTTP__ROUTES='[]'" in script
    assert "BEGIN" not in script, "a key in a job script"
    assert f"--tls-key {tmp_path}/key.pem" in script
    for path in tmp_path.glob("*.pem"):
        assert oct(path.stat().st_mode & 0o777) == "0o600"


# ---- a real Slurm -------------------------------------------------------------------------------


@pytest.mark.cluster
def test_job_that_slurm_refuses_is_one_clear_line(node: Path, tmp_path: Path) -> None:
    import msgspec  # noqa: PLC0415 - one use

    config = settings(tmp_path)
    bad = msgspec.structs.replace(
        config, slurm=msgspec.structs.replace(config.slurm, queue="no-such-queue")
    )
    with (
        pytest.raises(DeviceError, match=r"Slurm did not take the job: .*partition") as caught,
        open_executor(bad, lambda _: 0),
    ):
        pass
    assert "queue" in caught.value.hint
    assert list((tmp_path / "shared").glob("run-*")) == []


@pytest.mark.cluster
def test_cancelled_job_changes_no_byte(node: Path, tmp_path: Path, synthetic_slide: Path) -> None:
    bundle = tmp_path / "identity"
    save_nets(bundle, BundleSpec(name="identity", marker="Test", start_image="stain"), {})
    tiles = TileConfig(shard_tiles=2, overlap_px=64)
    base = RunConfig(bundle=str(bundle), tiles=tiles, cluster=ClusterConfig(executor="serial"))
    local = translate_slide(synthetic_slide, tmp_path / "local", base)
    seen: dict[str, Any] = {"jobs": set(), "cancelled": []}
    config = RunConfig(bundle=str(bundle), tiles=tiles, cluster=settings(tmp_path))

    def listen(event: Event) -> None:
        if event.stage != "translate" or event.kind != "advance":
            return
        seen["jobs"] |= set(jobs())
        if not seen["cancelled"]:
            seen["listening"] = listening()
            seen["cancelled"] = jobs()[:1]
            call("scancel", *seen["cancelled"])

    result = translate_slide(synthetic_slide, tmp_path / "slurm", config, listener=listen)
    assert len(seen["cancelled"]) == 1
    assert result.files.output.read_bytes() == local.files.output.read_bytes()
    assert seen["listening"] == {"127.0.0.1"}
    record = result.files.manifest.read_text()
    assert str(tmp_path) not in record
    wait_until(lambda: jobs() == [], "jobs outlive the run")


@pytest.mark.cluster
def test_lost_jobs_are_replaced_and_devices_are_their_own(node: Path, tmp_path: Path) -> None:
    def task(number: int) -> tuple[str, str]:
        time.sleep(0.5)
        return os.environ["SLURM_JOB_ID"], os.environ["CUDA_VISIBLE_DEVICES"]

    with open_executor(settings(tmp_path), lambda _: 0) as executor:
        assert executor.device == "cpu"
        wait_until(lambda: len(jobs()) == 2, "two jobs")
        first = set(jobs())
        threading.Timer(2.0, lambda: call("scancel", sorted(first)[0])).start()
        found: set[tuple[str, str]] = set()
        end_s = time.monotonic() + START_S
        while len({job for job, _ in found}) < 3:
            assert time.monotonic() < end_s, found
            found |= {result for _, result in executor.run(task, range(8))}
    assert {device for _, device in found} == {"0", "1"}
    assert len({job for job, _ in found} - first) == 1


def listening() -> set[str]:
    """Addresses that this process and its jobs' workers listen on."""
    mine = {os.getpid()} | {
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if "distributed.cli.dask_worker" in (process.info["cmdline"] or [])
    }
    members = [child for pid in mine for child in psutil.Process(pid).children(recursive=True)]
    return {
        connection.laddr.ip
        for process in [*map(psutil.Process, mine), *members]
        if process.status() != psutil.STATUS_ZOMBIE
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
