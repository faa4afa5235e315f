"""Shards get done, whatever raises, dies or is interrupted: the same tests over all executors.

Tasks are made inside functions, so that they travel to workers by value: a test module cannot be
imported there.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest

from wsi_stain import dispatch
from wsi_stain.cluster import visible_devices
from wsi_stain.cluster.parent import prepare_parent, start_method
from wsi_stain.config import ClusterConfig
from wsi_stain.dispatch import Executor, ShardsFailed, Step, open_executor
from wsi_stain.errors import DeviceError, SlideError, WsiStainError

Kind = Literal["serial", "dask"]
Task = Callable[[int], Any]


def start(
    kind: Kind = "dask", workers: int = 2, devices: int = 0, attempts: int = 2, **more: Any
) -> AbstractContextManager[Executor]:
    config = ClusterConfig(executor=kind, workers=workers, attempts=attempts, **more)
    return open_executor(config, lambda _: devices)


@pytest.fixture(scope="module")
def dask_executor() -> Iterator[Executor]:
    with start() as executor:
        yield executor


@pytest.fixture(params=["serial", "dask"])
def executor(request: pytest.FixtureRequest) -> Executor:
    if request.param == "serial":
        with start("serial") as serial:
            return serial
    found: Executor = request.getfixturevalue("dask_executor")
    return found


def collect(executor: Executor, task: Task, count: int) -> tuple[list[int], WsiStainError | None]:
    """Run; give the numbers that came out, and the error at the end."""
    numbers: list[int] = []
    try:
        for number, _ in executor.run(task, range(count)):
            numbers.append(number)
    except WsiStainError as error:
        return numbers, error
    return numbers, None


def failing_task(numbers: dict[int, Exception], log: Path | None = None) -> Task:
    def task(number: int) -> int:
        if log is not None:
            with log.open("a") as stream:
                stream.write(f"{number}\n")
        if number in numbers:
            raise numbers[number]
        return number

    return task


def killing_task(number_that_kills: int, flag: Path | None = None) -> Task:
    """Kill the worker's process: once if there is a flag file to set, else each time."""

    def task(number: int) -> int:
        if number == number_that_kills and not (flag is not None and flag.exists()):
            if flag is not None:
                flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    return task


# ---- all executors --------------------------------------------------------------------------


def test_every_shard_gives_its_own_result_once(executor: Executor) -> None:
    found = list(executor.run(lambda number: number * number, range(3, 53)))
    assert sorted(found) == [(number, number * number) for number in range(3, 53)]


def test_nothing_happens_when_there_are_no_shards(executor: Executor) -> None:
    assert list(executor.run(lambda number: number, [])) == []


def test_shard_is_tried_again_when_it_raises_once(executor: Executor, tmp_path: Path) -> None:
    def task(number: int) -> int:
        flag = tmp_path / str(number)
        if number == 4 and not flag.exists():
            flag.touch()
            raise OSError("for a moment")
        return number

    numbers, error = collect(executor, task, 9)
    assert error is None
    assert sorted(numbers) == list(range(9))


def test_shard_is_given_up_after_all_attempts_and_others_go_on(
    executor: Executor, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    numbers, error = collect(
        executor, failing_task({2: ValueError("bad\nthing"), 6: KeyError("k")}, log), 20
    )
    assert sorted(numbers) == [number for number in range(20) if number not in (2, 6)]
    assert isinstance(error, ShardsFailed)
    assert error.exit_code == 7
    assert error.message == (
        "2 of 20 shards failed after 2 attempts: 2, 6; the first with ValueError: bad thing."
    )
    assert "same command" in error.hint
    assert isinstance(error.__cause__, ValueError)
    tried = log.read_text().split()
    assert [tried.count(str(number)) for number in range(8)] == [1, 1, 2, 1, 1, 1, 2, 1]


def test_error_of_ours_keeps_class_hint_and_exit_code(executor: Executor) -> None:
    broken = SlideError("Slide a.svs is cut off.", hint="Copy it again.")
    numbers, error = collect(executor, failing_task({1: broken, 3: broken}), 5)
    assert sorted(numbers) == [0, 2, 4]
    assert type(error) is SlideError
    assert error.exit_code == 3
    assert str(error) == (
        "Slide a.svs is cut off (2 of 5 shards failed after 2 attempts: 1, 3). Copy it again."
    )


def test_error_is_about_shards_when_classes_are_mixed(executor: Executor) -> None:
    _, error = collect(executor, failing_task({1: SlideError("Cut."), 3: ValueError("v")}), 5)
    assert type(error) is ShardsFailed


def test_list_of_shards_is_cut_when_long(executor: Executor) -> None:
    _, error = collect(executor, failing_task(dict.fromkeys(range(12), ValueError("v"))), 13)
    assert error is not None
    assert "12 of 13 shards failed after 2 attempts: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...;" in str(
        error
    )


def test_executor_serves_again_when_a_caller_stopped_early(executor: Executor) -> None:
    results = executor.run(lambda number: number, range(30))
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert sorted(executor.run(lambda number: -number, range(3))) == [(0, 0), (1, -1), (2, -2)]


def test_order_is_that_of_the_numbers_when_serial() -> None:
    with start("serial") as executor:
        assert [n for n, _ in executor.run(lambda number: number, [5, 1, 3])] == [5, 1, 3]


def test_interrupt_passes_through_when_serial() -> None:
    def task(number: int) -> int:
        raise KeyboardInterrupt

    with start("serial") as executor, pytest.raises(KeyboardInterrupt):
        list(executor.run(task, range(3)))


# ---- Dask: what travels ---------------------------------------------------------------------


def test_results_come_as_they_end_when_shards_differ(
    dask_executor: Executor, tmp_path: Path
) -> None:
    def task(number: int) -> int:
        if number == 5:
            time.sleep(0.3)  # what ended before is heard of by then, from either worker
            (tmp_path / "five").touch()
        end_s = time.monotonic() + 60
        while number == 0 and not (tmp_path / "five").exists() and time.monotonic() < end_s:
            time.sleep(0.01)
        if number == 0:
            time.sleep(0.3)  # nor does it overtake the fifth on the way
        return number

    numbers, _ = collect(dask_executor, task, 8)
    assert sorted(numbers) == list(range(8))
    assert numbers.index(0) > 3


def test_task_travels_once_per_worker(dask_executor: Executor, tmp_path: Path) -> None:
    class Counting:
        def __init__(self, log: Path) -> None:
            self.log = log

        def __setstate__(self, state: dict[str, Any]) -> None:
            self.__dict__.update(state)
            with self.log.open("a") as stream:
                stream.write(f"{os.getpid()}\n")

        def __call__(self, number: int) -> int:
            return os.getpid()

    log = tmp_path / "log"
    workers = {pid for _, pid in dask_executor.run(Counting(log), range(40))}
    arrivals = [pid for pid in log.read_text().split() if int(pid) in workers]
    assert len(workers) == 2
    assert len(arrivals) == 2


def test_graph_stays_small_when_there_are_many_shards(dask_executor: Executor) -> None:
    from distributed import default_client  # noqa: PLC0415 - as dispatch: only where it is used

    client = default_client()
    most = 0
    for _ in dask_executor.run(lambda number: number, range(60)):
        most = max(most, len(client.futures))
    # Two for each of two workers, and those that ended together and were just fetched.
    assert 2 < most <= 4 + 4


def test_worker_has_one_thread_and_no_device_when_on_cores(dask_executor: Executor) -> None:
    def task(number: int) -> tuple[str | None, ...]:
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        return tuple(os.environ.get(name) for name in (*names, "CUDA_VISIBLE_DEVICES"))

    found = {result for _, result in dask_executor.run(task, range(8))}
    assert found == {("1", "1", "1", "")}


def test_opencv_has_one_thread_when_worker_is_one_of_several(dask_executor: Executor) -> None:
    def task(number: int) -> int:
        import cv2  # noqa: PLC0415 - the task travels by value

        return cv2.getNumThreads()

    assert {count for _, count in dask_executor.run(task, range(2))} == {1}


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux")
def test_worker_has_its_imports_when_it_begins(dask_executor: Executor) -> None:
    def task(number: int) -> tuple[bool, int]:
        import gc  # noqa: PLC0415 - the task travels by value

        return "wsi_stain.translate.worker" in sys.modules, gc.get_freeze_count()

    for _, (is_there, n_frozen) in dask_executor.run(task, range(2)):
        assert is_there
        assert n_frozen > 10_000


def test_workers_are_forked_where_that_is_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    assert start_method() == "forkserver"
    monkeypatch.setattr("sys.platform", "darwin")
    assert start_method() == "spawn"


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux")
def test_parent_of_workers_never_begins_with_cuda() -> None:
    # A fork of a process that uses CUDA cannot use it.
    program = """
        import importlib, torch
        from wsi_stain.cluster.parent import IMPORTS
        for name in IMPORTS:
            importlib.import_module(name)
        print(torch.cuda.is_initialized())
    """
    code = textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux")
def test_environment_is_left_alone_when_workers_are_prepared() -> None:
    before = dict(os.environ)
    prepare_parent()
    assert dict(os.environ) == before


def _run_with_parent(program: str) -> str:
    """Run a program that may call `find_parent`; give what it prints."""
    finder = """
        import psutil

        def find_parent():
            name = "multiprocessing." + "forkserver"  # a child shows this text until it is its own
            found = []
            while not found:
                found = [p for p in psutil.Process().children() if name in str(p.cmdline())]
            (parent,) = found
            return parent
    """
    code = textwrap.dedent(finder) + textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux")
def test_parent_of_workers_hears_no_interrupt_when_it_imports() -> None:
    program = """
        from wsi_stain.cluster.parent import prepare_parent
        prepare_parent()
        parent = find_parent()
        print(open(f"/proc/{parent.pid}/status").read())
        parent.kill()
    """
    output = _run_with_parent(program)
    masks = dict(line.split(":", 1) for line in output.splitlines() if ":" in line)
    assert int(masks["SigBlk"], 16) & 1 << (signal.SIGINT - 1)


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux")
def test_parent_of_workers_ends_at_once_when_the_work_fails() -> None:
    program = """
        from wsi_stain.cluster.parent import begin_early
        from wsi_stain.config import ClusterConfig
        try:
            with begin_early(ClusterConfig()):
                parent = find_parent()
                raise KeyError
        except KeyError:
            print(parent.wait(timeout=10))
    """
    assert _run_with_parent(program).split() == [f"-{signal.SIGTERM.value}"]


def test_numpy_has_one_thread_when_worker_is_one_of_several(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists() or "libscipy_openblas64_" not in maps.read_text():
        pytest.skip("numpy's BLAS cannot be asked here")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)

    def task(number: int) -> int:
        import ctypes  # noqa: PLC0415 - the task travels by value

        lines = Path("/proc/self/maps").read_text().splitlines()
        blas = next(line.split()[-1] for line in lines if "libscipy_openblas64_" in line)
        count: int = ctypes.CDLL(blas).scipy_openblas_get_num_threads64_()
        return count

    with start(workers=1) as executor:
        assert [count for _, count in executor.run(task, [0])] == [1]


def test_each_worker_sees_its_own_device_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_parent()  # it outlives the workers, and keeps a socket in the folder for such
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def task(number: int) -> tuple[int, str]:
        time.sleep(0.05)
        return os.getpid(), os.environ["CUDA_VISIBLE_DEVICES"]

    with start(workers=2, devices=2, readers=1) as executor:
        steps = [Step(name, task, range(12)) for name in ("fill", "translate")]
        done = list(executor.run_steps(steps))
        assert len(os.listdir(tmp_path)) == 1
    found = {one.result for one in done if one.step == "translate"}
    assert sorted(device for _, device in found) == ["4", "7"]
    assert len({pid for pid, _ in found}) == 2
    # The third sees no device, and only reads.
    assert {one.result[1] for one in done if one.step == "fill"} == {"4", "7", ""}
    assert not any(alive(pid) for pid, _ in found)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("given", "count", "expected"),
    [
        (None, 2, ("0", "1")),
        ("", 0, ()),
        ("2,3", 2, ("2", "3")),
        ("2, 3", 1, ("2",)),
        ("MIG-a,MIG-b", 2, ("MIG-a", "MIG-b")),
    ],
)
def test_devices_are_named_as_the_process_sees_them(
    monkeypatch: pytest.MonkeyPatch, given: str | None, count: int, expected: tuple[str, ...]
) -> None:
    if given is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert visible_devices(count) == expected


def test_only_this_machine_can_connect(dask_executor: Executor) -> None:
    me = psutil.Process()
    listening = [
        connection.laddr
        for process in [me, *me.children(recursive=True)]
        if process.status() != psutil.STATUS_ZOMBIE
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 3
    assert {address.ip for address in listening} == {"127.0.0.1"}


# ---- Dask: what dies ------------------------------------------------------------------------


def test_shard_is_redone_when_its_worker_is_killed(dask_executor: Executor, tmp_path: Path) -> None:
    numbers, error = collect(dask_executor, killing_task(7, tmp_path / "flag"), 30)
    assert error is None
    assert sorted(numbers) == list(range(30))


def test_all_who_translate_are_asked_and_only_once(dask_executor: Executor) -> None:
    def who(about: str) -> tuple[str, int, float]:
        return about, os.getpid(), time.monotonic()

    with start("serial") as serial:
        assert [answer[:2] for answer in serial.ask(who, "here")] == [("here", os.getpid())]
    answers = dask_executor.ask(who, "there")
    assert {about for about, _, _ in answers} == {"there"}
    assert len({pid for _, pid, _ in answers} - {os.getpid()}) == len(answers) == 2
    assert dask_executor.ranked(1).ask(who, "there") == answers


def test_worker_that_dies_of_a_question_is_named_as_what_it_is() -> None:
    def die(about: str) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with start(workers=1, attempts=1) as executor:
        with pytest.raises(ShardsFailed, match=r"Workers died .*out of memory") as caught:
            executor.ask(die, "")
        assert "--workers" in caught.value.hint
        assert collect(executor, lambda number: number, 2) == ([0, 1], None)


def test_question_that_fails_is_told_with_its_reason(dask_executor: Executor) -> None:
    def fail(about: str) -> None:
        raise ImportError("no such thing")

    with pytest.raises(DeviceError, match="A worker cannot run wsi-stain: ImportError: no such"):
        dask_executor.ask(fail, "")


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_only_the_culprit_fails_when_a_shard_kills_each_worker(workers: int) -> None:
    with start(workers=workers, attempts=1) as executor:
        numbers, error = collect(executor, killing_task(3), 12)
        assert sorted(numbers) == [number for number in range(12) if number != 3]
        assert type(error) is ShardsFailed
        assert error.exit_code == 7
        assert "Workers died on it each time" in error.message
        assert "1 of 12 shards failed after 1 attempt: 3)" in error.message
        assert "--workers" in error.hint
        numbers, error = collect(executor, lambda number: number, 4)
        assert (sorted(numbers), error) == ([0, 1, 2, 3], None)


def test_error_is_ours_when_the_scheduler_forgets_the_work(dask_executor: Executor) -> None:
    from distributed import Future, default_client  # noqa: PLC0415 - only where it is used

    client = default_client()
    results = dask_executor.run(lambda number: time.sleep(0.3), range(20))
    next(results)
    client.cancel([Future(key, client) for key in list(client.futures)], force=True)
    with pytest.raises(DeviceError, match="scheduler was lost"):
        list(results)


def test_error_is_ours_when_no_worker_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed import default_client  # noqa: PLC0415 - only where it is used

    monkeypatch.setattr(dispatch, "POLL_S", 0.1)
    with start(workers=1, wait_s=1) as executor:
        cluster: Any = default_client().cluster
        cluster.scale(0)
        with pytest.raises(DeviceError, match="All workers died"):
            list(executor.run(lambda number: time.sleep(30), range(3)))


@pytest.mark.parametrize(
    "error", [RuntimeError("Nanny failed to start"), AssertionError("Status.starting")]
)
def test_error_is_ours_when_workers_cannot_start(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(**_: Any) -> None:
        raise error

    monkeypatch.setattr("distributed.SpecCluster", refuse)
    with (
        pytest.raises(DeviceError, match="2 worker processes could not be started") as caught,
        start(),
    ):
        pass
    assert "__main__" in caught.value.hint


# Whoever runs the tests may ignore Ctrl-C (a shell's background job does), and children inherit
# that: the script listens to it again.
SCRIPT = """
    import signal
    import time
    import psutil
    from wsi_stain.config import ClusterConfig
    from wsi_stain.dispatch import open_executor

    def main():
        def task(number):
            time.sleep(60)

        with open_executor(ClusterConfig(workers=2), lambda config: 0) as executor:
            print(*[p.pid for p in psutil.Process().children(recursive=True)], flush=True)
            list(executor.run(task, range(4)))

    if __name__ == "__main__":
        signal.signal(signal.SIGINT, signal.default_int_handler)
        main()
"""


@pytest.mark.parametrize("how", ["ctrl-c", "kill"])
def test_no_orphan_stays_when_the_main_process_is_stopped(tmp_path: Path, how: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        time.sleep(1.0)
        if how == "ctrl-c":
            os.killpg(process.pid, signal.SIGINT)  # a terminal signals the whole group
        else:
            process.kill()
        _, errors = process.communicate(timeout=60)
    assert len(pids) >= 2, errors
    end_s = time.monotonic() + 20
    while any(alive(pid) for pid in pids) and time.monotonic() < end_s:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in pids)
    if how == "ctrl-c":
        assert errors.count("Traceback") == 1
        assert errors.rstrip().endswith("KeyboardInterrupt")


def alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
