"""Run one task over shard numbers: in this process, or on workers of a local Dask cluster.

In: a task, numbers, settings. Out: results as they come. Not here: what a shard is, torch, how a
cluster is started (`cluster`).

The task is sent to each worker once; after that only numbers travel, and results should be small
(a task's real input and output are files). One worker is one process with one thread, on one
CUDA device or one core.

Failure policy, the same for all executors: a shard that raises is tried again, up to `attempts`
times; the other shards go on to the end; then the failed ones are named in one error. A worker
that dies in mid-shard is replaced and its shard redone. A shard whose workers die again and again
is tried once more by itself, since a neighbor may have been to blame, before it counts as failed.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from wsi_stain.cluster import available_cores, local_cluster, visible_devices
from wsi_stain.config import ClusterConfig
from wsi_stain.errors import DeviceError, WsiStainError

if TYPE_CHECKING:
    from distributed import Client, Future

__all__ = [
    "DaskExecutor",
    "Executor",
    "SerialExecutor",
    "ShardsFailed",
    "Task",
    "open_executor",
]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
POLL_S = 5.0
NO_WORKER_S = 60.0
NAMED_SHARDS = 10
ERROR_TEXT_CHARS = 300
RESUME_HINT = "Finished shards are kept: the same command tries only the failed ones again."


class Task(Protocol[T_co]):
    """What is done to one shard: can be pickled, and may be called twice with the same number."""

    def __call__(self, number: int, /) -> T_co:
        """Do shard `number`."""
        ...


class Executor(Protocol):
    """Something that can run a task over numbers."""

    def run(self, task: Task[T], numbers: Sequence[int]) -> Iterator[tuple[int, T]]:
        """Run `task` on each number.

        Parameters
        ----------
        task
            See `Task`.
        numbers
            Shard numbers.

        Yields
        ------
        tuple
            Number and result, in order of completion.

        Raises
        ------
        WsiStainError
            After all others are done, where every failed shard failed with one: the first, with
            the failed shards named.
        ShardsFailed
            After all others are done, where shards failed in any other way.
        """
        ...


class ShardsFailed(DeviceError):
    """Shards that failed after all attempts (exit code 7)."""


@dataclass(frozen=True)
class Failure:
    """A shard that was given up, and why."""

    number: int
    error: BaseException


@dataclass(frozen=True)
class SerialExecutor:
    """Runs shards one after the other in this process: the reference, and for debugging.

    Attributes
    ----------
    attempts
        How often a shard that raises is tried in all.
    """

    attempts: int = 2

    def run(self, task: Task[T], numbers: Sequence[int]) -> Iterator[tuple[int, T]]:
        """See `Executor.run`; here the order is that of `numbers`."""
        failures = []
        for number in numbers:
            try:
                result = self._try(task, number)
            except Exception as error:
                failures.append(Failure(number, error))
            else:
                yield number, result
        _raise_failures(failures, len(numbers), self.attempts)

    def _try(self, task: Task[T], number: int) -> T:
        for _ in range(self.attempts - 1):
            with contextlib.suppress(Exception):
                return task(number)
        return task(number)


class DaskExecutor:
    """Runs shards on the workers of a Dask cluster.

    Memory bound: the scheduler holds at most two shards' bookkeeping per worker, and workers hold
    results only until they are yielded.

    Parameters
    ----------
    client
        Connected to a cluster whose workers have one thread each.
    n_workers
        How many workers the cluster has when all are up.
    attempts
        How often a shard that raises is tried in all.
    """

    def __init__(self, client: Client, *, n_workers: int, attempts: int = 2) -> None:
        self._client = client
        self._window = 2 * n_workers
        self._attempts = attempts

    def run(self, task: Task[T], numbers: Sequence[int]) -> Iterator[tuple[int, T]]:
        """See `Executor.run`."""
        name = f"task-{uuid.uuid4().hex}"
        failures, suspects = [], []
        self._send(task, name)
        try:
            for number, future in self._finished(name, numbers, self._window):
                if future.status == "finished":
                    yield number, future.result()
                elif _was_killed(future):
                    suspects.append(number)
                else:
                    failures.append(Failure(number, _error_of(future)))
            for number, future in self._finished(name, suspects, 1):
                if future.status == "finished":
                    yield number, future.result()
                else:
                    failures.append(Failure(number, _error_of(future)))
        finally:
            # Frees what the task loaded. After an interrupt the cluster may be gone already.
            with contextlib.suppress(OSError):
                self._client.unregister_worker_plugin(name)
        _raise_failures(failures, len(numbers), self._attempts)

    def _send(self, task: Task[Any], name: str) -> None:
        """Give the task to all workers; a worker that dies in between breaks one attempt."""
        for last in (False, False, True):
            try:
                self._client.register_plugin(_carrier(task), name=name)
            except OSError as error:
                if last:
                    raise DeviceError(f"The task cannot be sent to workers: {error}.") from error
            else:
                return

    def _finished(
        self, name: str, numbers: Iterable[int], window: int
    ) -> Iterator[tuple[int, Future[Any]]]:
        """Keep at most `window` shards in the cluster; give each as it ends, well or not."""
        waiting, running = deque(numbers), dict[Any, int]()
        while waiting or running:
            while waiting and len(running) < window:
                number = waiting.popleft()
                future = self._client.submit(
                    _run_shard, name, number, pure=False, retries=self._attempts - 1
                )
                running[future] = number
            for future in self._wait(list(running)):
                # A result whose worker died since is pending again, and stays with us.
                if future.status != "pending":
                    yield running.pop(future), future

    def _wait(self, futures: list[Future[Any]]) -> Iterable[Future[Any]]:
        """Wait until a future ends; fail where no worker is left to end any."""
        from distributed import wait

        alone_since_s: float | None = None
        while True:
            try:
                return list(wait(futures, timeout=POLL_S, return_when="FIRST_COMPLETED").done)
            except TimeoutError:
                pass
            except CancelledError as error:
                raise DeviceError("The workers' scheduler was lost.", hint=RESUME_HINT) from error
            if self._client.scheduler_info(n_workers=1)["workers"]:
                alone_since_s = None
                continue
            alone_since_s = alone_since_s or time.monotonic()
            if time.monotonic() - alone_since_s > NO_WORKER_S:
                raise DeviceError(
                    f"All workers died and none came back within {NO_WORKER_S:.0f} s.",
                    hint=RESUME_HINT,
                )


def open_executor(
    config: ClusterConfig, count_devices: Callable[[ClusterConfig], int]
) -> AbstractContextManager[Executor]:
    """Give a context manager that starts what `config` asks for, and stops it at the end.

    Parameters
    ----------
    config
        Executor, workers, attempts, memory.
    count_devices
        Counts the CUDA devices the run may use; 0 means: work on the cores.

    Raises
    ------
    DeviceError
        On entering: workers cannot be started.
    """
    if config.executor == "serial":
        return contextlib.nullcontext(SerialExecutor(config.attempts))
    return _local_dask(config, visible_devices(count_devices(config)))


@contextmanager
def _local_dask(config: ClusterConfig, devices: Sequence[str]) -> Iterator[Executor]:
    n_workers = config.workers or len(devices) or available_cores()
    memory_bytes = config.memory_limit_mb * 2**20
    with local_cluster(n_workers, devices, memory_bytes, attempts=config.attempts) as client:
        yield DaskExecutor(client, n_workers=n_workers, attempts=config.attempts)


def _carrier(task: Callable[[int], Any]) -> Any:
    """Wrap a task so that each worker gets it once; a restarted worker gets it again."""
    import signal

    from distributed import Worker, WorkerPlugin

    class Carrier(WorkerPlugin):
        def __init__(self) -> None:
            self.task = task

        def setup(self, worker: Worker) -> None:
            # Ctrl-C reaches the whole process group; only the main process answers to it.
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    return Carrier()


def _run_shard(name: str, number: int) -> Any:
    """Run on a worker: find the task that was sent, do one shard."""
    from distributed import get_worker

    carrier: Any = get_worker().plugins[name]
    return carrier.task(number)


def _was_killed(future: Future[Any]) -> bool:
    from distributed import KilledWorker

    return isinstance(future.exception(), KilledWorker)


def _error_of(future: Future[Any]) -> BaseException:
    if _was_killed(future):
        return ShardsFailed(
            "Workers died on it each time (killed, crashed or out of memory)",
            hint="Try fewer workers (--workers) or smaller batches (--batch). " + RESUME_HINT,
        )
    error = future.exception()
    return error if isinstance(error, BaseException) else DeviceError(f"lost ({future.status})")


def _raise_failures(failures: list[Failure], total: int, attempts: int) -> None:
    """Name the failed shards in one error: of their own class where they share one of ours."""
    if not failures:
        return
    ordered = sorted(failures, key=lambda failure: failure.number)
    first = ordered[0].error
    numbers = ", ".join(str(failure.number) for failure in ordered[:NAMED_SHARDS])
    more = ", ..." if len(ordered) > NAMED_SHARDS else ""
    tried = f"{attempts} attempts" if attempts > 1 else "1 attempt"
    shards = f"{len(ordered)} of {total} shards failed after {tried}: {numbers}{more}"
    classes = {type(failure.error) for failure in ordered}
    if isinstance(first, WsiStainError) and len(classes) == 1:
        message = f"{first.message.rstrip('.')} ({shards})."
        raise type(first)(message, hint=first.hint or RESUME_HINT) from first
    text = " ".join(str(first).split())[:ERROR_TEXT_CHARS]
    message = f"{shards}; the first with {type(first).__name__}: {text.rstrip('.')}."
    raise ShardsFailed(message, hint=RESUME_HINT) from first
