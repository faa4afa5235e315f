"""Workers and the scheduler are lost in the middle, over TLS: shards are files, so none is lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from wsi_stain.config import ClusterConfig
from wsi_stain.dispatch import open_executor
from wsi_stain.errors import DeviceError

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

N_SHARDS = 40


def marking_task(folder: Path) -> Callable[[int], int]:
    """Do a shard as a store does: a file at the end; what was done twice has two lines."""

    def task(number: int) -> int:
        time.sleep(0.1)
        with (folder / str(number)).open("a") as file:
            file.write("done\n")
        return number

    return task


def pending(folder: Path) -> list[int]:
    return [number for number in range(N_SHARDS) if not (folder / str(number)).exists()]


def kill(process: Any) -> None:
    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()
    process.kill()
    process.wait()


def test_lost_worker_is_not_noticed_and_lost_scheduler_is_told(
    start_dask: Callable[[dict[str, Path]], Any], certificates: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "done"
    folder.mkdir()
    files = {f"tls_{name}": str(path) for name, path in certificates.items()}
    first = start_dask(certificates)
    given: dict[str, Any] = {"executor": "address", "scheduler": first.start_scheduler(), **files}
    victim, _ = first.start_worker("--no-nanny"), first.start_worker("--no-nanny")
    first.wait_for_workers(2)
    seen = 0
    with open_executor(ClusterConfig(**given), lambda _: 0) as executor:
        results = executor.run(marking_task(folder), range(N_SHARDS))
        for seen, _ in enumerate(results, 1):
            if seen == 4:
                kill(victim)
            if seen == 12:
                break
        kill(first.scheduler)
        struck_s = time.monotonic()
        with pytest.raises(DeviceError, match="scheduler was lost") as caught:
            list(results)
        assert caught.value.exit_code == 7
    assert time.monotonic() - struck_s < 60
    left = pending(folder)
    assert 0 < len(left) <= N_SHARDS - seen

    again = start_dask(certificates)
    given["scheduler"] = again.start_scheduler()
    again.start_worker("--no-nanny")
    again.wait_for_workers(1)
    with open_executor(ClusterConfig(**given), lambda _: 0) as executor:
        assert sorted(number for number, _ in executor.run(marking_task(folder), left)) == left
    assert pending(folder) == []
    lines = [(folder / str(number)).read_text().count("\n") for number in range(N_SHARDS)]
    # Only what was in hand when its worker died may have been done twice.
    assert sum(lines) <= N_SHARDS + 2
