"""Workers of a scheduler that runs already: who may connect, who does what."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from wsi_stain.config import ClusterConfig, RunConfig, resolve_run_config
from wsi_stain.dispatch import Done, Executor, Step, open_executor
from wsi_stain.errors import ConfigError, DeviceError

Start = Callable[[dict[str, Path] | None], Any]


def config(address: str, tls: dict[str, Path] | None = None, **more: Any) -> ClusterConfig:
    files: dict[str, Any] = {f"tls_{name}": str(path) for name, path in (tls or {}).items()}
    return ClusterConfig(executor="address", scheduler=address, **files, **more)


def where_task() -> Callable[[int], tuple[int, str]]:
    """Tell on which worker a shard was done."""

    def task(number: int) -> tuple[int, str]:
        from distributed import get_worker  # noqa: PLC0415 - it runs on a worker

        time.sleep(0.02)
        return number, str(get_worker().name)

    return task


def run_both(executor: Executor, numbers: range) -> list[Done]:
    fill, translate = where_task(), where_task()
    steps = [Step("fill", fill, numbers), Step("translate", translate, numbers)]
    return list(executor.run_steps(steps))


# ---- addresses that are refused before any work ------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"scheduler": "tcp://node7:8786"}, "plain TCP to node7"),
        ({"scheduler": "tcp://10.0.0.7:8786"}, "insecure_tcp"),
        ({"scheduler": "tcp://[fe80::1]:8786"}, "plain TCP to fe80::1"),
        ({"scheduler": "tls://node7:8786"}, "tls_ca"),
        ({"scheduler": "node7:8786"}, "not tls://host:port"),
        ({"scheduler": "inproc://node7/1"}, "not tls://host:port"),
        ({"scheduler": ""}, "--scheduler"),
        ({"executor": "dask", "scheduler": "tcp://127.0.0.1:1"}, "is for executor"),
        ({"executor": "slurm"}, "needs `workers`"),
    ],
)
def test_address_that_is_not_safe_is_refused(settings: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve_run_config(
            {
                f"cluster.{name}": value
                for name, value in ({"executor": "address"} | settings).items()
            }
        )


@pytest.mark.parametrize(
    "settings",
    [
        {"scheduler": "tcp://127.0.0.1:8786"},
        {"scheduler": "tcp://localhost:8786"},
        {"scheduler": "tcp://[::1]:8786"},
        {"scheduler": "tcp://node7:8786", "insecure_tcp": True},
        {"scheduler": "tls://node7:8786", "tls_ca": "a", "tls_cert": "b", "tls_key": "c"},
    ],
)
def test_address_that_is_safe_is_taken(settings: dict[str, Any]) -> None:
    assert ClusterConfig(executor="address", **settings).is_remote
    assert msgspec.convert({"cluster": settings | {"executor": "address"}}, RunConfig)


def test_key_that_others_can_read_is_refused(certificates: dict[str, Path], tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    key.write_text(certificates["key"].read_text())
    key.chmod(0o640)
    with (
        pytest.raises(ConfigError, match=r"can be read by others \(mode 640\)") as caught,
        open_executor(config("tls://127.0.0.1:9", certificates | {"key": key}), lambda _: 0),
    ):
        pass
    assert caught.value.hint == f"chmod 600 {key}"


def test_missing_certificate_is_named(certificates: dict[str, Path], tmp_path: Path) -> None:
    broken = certificates | {"ca": tmp_path / "none.pem"}
    with (
        pytest.raises(ConfigError, match=r"none\.pem cannot be read"),
        open_executor(config("tls://127.0.0.1:9", broken), lambda _: 0),
    ):
        pass


# ---- a real scheduler and workers, as processes of their own -----------------------------------


def test_workers_over_tls_do_what_their_resources_are_for(
    start_dask: Start, certificates: dict[str, Path]
) -> None:
    def answered_by(about: str) -> tuple[str, Any, str]:
        from distributed import get_worker  # noqa: PLC0415 - it runs on a worker

        return about, get_worker().name, uuid.uuid4().hex

    dask = start_dask(certificates)
    dask.start_scheduler()
    dask.start_worker("--name", "gpu", "--resources", "GPU=1")
    dask.start_worker("--name", "cpu")
    dask.wait_for_workers(2)
    assert dask.listening() == {"127.0.0.1"}
    with open_executor(config(dask.address, certificates), lambda _: 1) as executor:
        with ThreadPoolExecutor(3) as pool:  # once for all, also of three at once
            answers = list(
                pool.map(lambda rank: executor.ranked(rank).ask(answered_by, "who"), range(3))
            )
        assert answers[0][0][:2] == ("who", "gpu")
        assert len(answers[0]) == 1
        assert answers == [answers[0]] * 3
        done = run_both(executor, range(20))
        who = {
            step: {d.result[1] for d in done if d.step == step} for step in ("fill", "translate")
        }
        assert who == {"fill": {"cpu", "gpu"}, "translate": {"gpu"}}
        assert sorted(d.number for d in done) == sorted([*range(20), *range(20)])
        share_executor(executor)
    # Without its certificate nobody gets in, with or without encryption.
    for address in (dask.address, dask.address.replace("tls:", "tcp:")):
        knock(address)


def share_executor(executor: Executor) -> None:
    """Several callers at once get each its own results."""
    found: dict[int, list[int]] = {}

    def call(caller: int) -> None:
        numbers = range(100 * caller, 100 * caller + 7)
        found[caller] = sorted(done.number for done in run_both(executor, numbers))

    callers = [threading.Thread(target=call, args=[caller]) for caller in range(4)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert found == {c: sorted([*range(100 * c, 100 * c + 7)] * 2) for c in range(4)}


def knock(address: str) -> None:
    from distributed import Client, Security  # noqa: PLC0415 - only where it is used

    stranger = Security.temporary() if address.startswith("tls:") else None
    with pytest.raises(OSError, match=r"Timed out|closed|certificate|connect"):
        Client(address, security=stranger, timeout=2)


def test_nobody_at_the_address_is_one_clear_line(
    certificates: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsi_stain.cluster.address.CONNECT_S", 1)
    with (
        pytest.raises(DeviceError, match=r"tls://127\.0\.0\.1:9 cannot be reached") as caught,
        open_executor(config("tls://127.0.0.1:9", certificates), lambda _: 0),
    ):
        pass
    assert caught.value.exit_code == 7


def test_scheduler_without_workers_is_told_apart(start_dask: Start) -> None:
    dask = start_dask(None)
    dask.start_scheduler()
    with (
        pytest.raises(DeviceError, match=r"No worker of tcp://127\.0\.0\.1") as caught,
        open_executor(config(dask.address, wait_s=1), lambda _: 0),
    ):
        pass
    assert "wait_s" in caught.value.hint
