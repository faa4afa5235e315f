"""Workers as Slurm jobs: on a real Slurm of one node (see `conftest`)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from msgspec import structs

from wsi_stain.cluster import slurm, waiting
from wsi_stain.cluster.credentials import new_credentials
from wsi_stain.config import BundleSpec, ClusterConfig, RunConfig, SlurmConfig, TileConfig
from wsi_stain.dispatch import open_executor
from wsi_stain.errors import ConfigError, DeviceError
from wsi_stain.manifest import Event
from wsi_stain.pipeline import translate_slide
from wsi_stain.planning import plan_slide
from wsi_stain.translate.bundle import save_nets
from wsi_stain.translate.task import arithmetic

CHECKOUT = Path(__file__).resolve().parents[2]
START_S = 120
Node = Any  # what the fixture `node` gives


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
def test_job_that_slurm_refuses_is_one_clear_line(node: Node, tmp_path: Path) -> None:
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
def test_cancelled_job_changes_no_byte(node: Node, tmp_path: Path, synthetic_slide: Path) -> None:
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
        seen["jobs"] |= set(node.jobs())
        if not seen["cancelled"]:
            seen["listening"] = listening()
            seen["cancelled"] = node.jobs()[:1]
            node.call("scancel", *seen["cancelled"])

    result = translate_slide(synthetic_slide, tmp_path / "slurm", config, listener=listen)
    assert len(seen["cancelled"]) == 1
    assert result.files.output.read_bytes() == local.files.output.read_bytes()
    assert seen["listening"] == {"127.0.0.1"}
    record = result.files.manifest.read_text()
    assert str(tmp_path) not in record
    node.wait_until(lambda: node.jobs() == [], "jobs outlive the run")


@pytest.mark.cluster
def test_lost_jobs_are_replaced_and_devices_are_their_own(node: Node, tmp_path: Path) -> None:
    def task(number: int) -> tuple[str, str]:
        time.sleep(0.5)
        return os.environ["SLURM_JOB_ID"], os.environ["CUDA_VISIBLE_DEVICES"]

    with open_executor(settings(tmp_path), lambda _: 0) as executor:
        assert {answer.device for answer in executor.ask(arithmetic, "auto")} == {"cpu"}
        node.wait_until(lambda: len(node.jobs()) == 2, "two jobs")
        first = set(node.jobs())
        threading.Timer(2.0, lambda: node.call("scancel", sorted(first)[0])).start()
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


@pytest.mark.cluster
def test_queue_is_told_while_jobs_wait(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "EVERY_S", 2.0)
    words = ("--parsable", "--gres=gpu:2", "-o/dev/null", "--wrap=sleep 900")
    holder = node.call("sbatch", *words).strip()
    node.wait_until(lambda: node.jobs() == [holder], "the holder runs")
    heard: list[str] = []

    def listen(event: Event) -> None:
        assert (event.stage, event.kind) == ("workers", "note")
        heard.append(event.text)
        if "PENDING (Resources)" in event.text:
            node.call("scancel", holder)

    try:
        with open_executor(settings(tmp_path), lambda _: 0, listen) as executor:
            found = sorted(executor.run(lambda number: -number, range(4)))
    finally:
        node.cancel_all()
    assert found == [(number, -number) for number in range(4)]
    told = [line for line in heard if "PENDING (Resources)" in line]
    assert re.match(r"waiting for workers: 0 of 2, jobs? \d+.* PENDING \(Resources\)", told[0])
    assert re.fullmatch(r"workers: [12] of 2 are there", heard[-1])


@pytest.mark.cluster
def test_work_goes_on_when_workers_reach_their_lifetime(node: Node, tmp_path: Path) -> None:
    def task(number: int) -> str:
        time.sleep(0.5)
        return os.environ["SLURM_JOB_ID"]

    config = settings(tmp_path, workers=1)
    config = structs.replace(config, slurm=structs.replace(config.slurm, walltime_min=3))
    with open_executor(config, lambda _: 0) as executor:
        found: dict[int, str] = {}
        end_s = time.monotonic() + START_S + 120
        while len(set(found.values())) < 2:
            assert time.monotonic() < end_s, found
            first = len(found)
            new = dict(executor.run(task, range(first, first + 20)))
            assert sorted(new) == [*range(first, first + 20)], "each shard once"
            found |= new
    logs = "".join(path.read_text() for path in (tmp_path / "shared" / "logs").iterdir())
    assert "worker-lifetime-reached" in logs


def test_jobqueue_is_imported_without_taking_ctrl_c() -> None:
    script = (
        "import signal, sys, threading\n"
        "from wsi_stain.cluster import get_ready\n"
        "from wsi_stain.config import ClusterConfig\n"
        "before = signal.getsignal(signal.SIGINT)\n"
        "get_ready(ClusterConfig(executor='slurm', workers=1))\n"
        "assert 'dask_jobqueue' in sys.modules\n"
        "assert signal.getsignal(signal.SIGINT) is before\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, check=True)
