"""Run tasks over shard numbers: in this process, or on workers of a local Dask cluster.

In: tasks, numbers, settings. Out: results as they come. Not here: what a shard is, torch, how a
cluster is started (`cluster`), what all executors promise (`executor`).

A task is sent to each worker once; after that only numbers travel, and results should be small
(a task's real input and output are files). One worker is one process, on one CUDA device or one
core. It does one shard of a step at a time, so two threads of a worker keep a device busy: one
reads while the other translates.

A worker that dies in mid-shard is replaced and its shard redone. A shard whose workers die again
and again is tried once more by itself, since a neighbor may have been to blame, before it counts
as failed.
"""

from __future__ import annotations

import contextlib
import copy
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from wsi_stain.cluster import available_cores, local_cluster, visible_devices
from wsi_stain.config import ClusterConfig
from wsi_stain.errors import DeviceError, DiskFullError
from wsi_stain.executor import (
    RESUME_HINT,
    Chain,
    Done,
    Executor,
    Failure,
    SerialExecutor,
    ShardsFailed,
    Step,
    StepRunner,
    Task,
    chains_of,
    raise_failures,
)

if TYPE_CHECKING:
    from distributed import Client, Future

__all__ = [
    "DaskExecutor",
    "Done",
    "Executor",
    "SerialExecutor",
    "ShardsFailed",
    "Step",
    "Task",
    "open_executor",
]

POLL_S = 5.0
RANK_SHARDS = 10**9  # more shards than a slide has
NO_WORKER_S = 60.0


class DaskExecutor(StepRunner):
    """Runs shards on the workers of a Dask cluster.

    Memory bound: the scheduler holds at most two shards' bookkeeping per worker, and workers hold
    results only until they are yielded.

    Parameters
    ----------
    client
        Connected to a cluster.
    n_workers
        How many workers the cluster has when all are up.
    attempts
        How often a shard that raises is tried in all.
    places
        Step name to the Dask resources that a worker must have for it, as ``{"GPU": 1}``.
    """

    def __init__(
        self,
        client: Client,
        *,
        n_workers: int,
        attempts: int = 2,
        places: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        self._client = client
        self._window = 2 * n_workers
        self._attempts = attempts
        self._places = places or {}
        self._rank = 0

    def ranked(self, rank: int) -> DaskExecutor:
        """See `Executor.ranked`: the same workers; may be used from another thread."""
        other = copy.copy(self)
        other._rank = rank
        return other

    def run_steps(self, steps: Sequence[Step]) -> Iterator[Done]:
        """See `Executor.run_steps`."""
        chains, failures, suspects = chains_of(steps), list[Failure](), list[Chain]()
        with self._sent(steps) as names:
            for window, first_try in ((self._window, True), (1, False)):
                waiting = chains if first_try else suspects
                for chain, future in self._finished(steps, names, waiting, window):
                    if future.status == "finished":
                        name = steps[chain.steps[0]].name
                        yield Done(name, chain.number, self._result(future))
                    elif first_try and _was_killed(future):
                        suspects.append(chain)
                    else:
                        failures.append(Failure(chain.number, _given_up(future)))
        raise_failures(failures, len(chains), self._attempts)

    @contextmanager
    def _sent(self, steps: Sequence[Step]) -> Iterator[list[str]]:
        """Have the tasks at all workers, each under a name of its own."""
        names = [f"{step.name}-{uuid.uuid4().hex}" for step in steps]
        try:
            for name, step in zip(names, steps, strict=True):
                self._send(step.task, name)
            yield names
        finally:
            # Frees what the tasks loaded. After an interrupt the cluster may be gone already.
            for name in names:
                with contextlib.suppress(OSError, CancelledError):
                    self._client.unregister_worker_plugin(name)

    def _send(self, task: Task[Any], name: str) -> None:
        """Give a task to all workers; a worker that dies in between breaks one attempt."""
        for last in (False, False, True):
            try:
                self._client.register_plugin(_carrier(task), name=name)
            except OSError as error:
                if last:
                    raise DeviceError(f"The task cannot be sent to workers: {error}.") from error
            else:
                return

    def _finished(
        self, steps: Sequence[Step], names: list[str], chains: Iterable[Chain], window: int
    ) -> Iterator[tuple[Chain, Future[Any]]]:
        """Keep at most `window` shards in the cluster; give each step as it ends, well or not."""
        waiting, running = deque(chains), dict[Any, Chain]()

        def submit(chain: Chain) -> None:
            step = chain.steps[0]
            future = self._client.submit(
                _run_shard,
                names[step],
                chain.number,
                pure=False,
                retries=self._attempts - 1,
                priority=-(self._rank * RANK_SHARDS + chain.number),
                resources=dict(self._places.get(steps[step].name, {})) or None,
            )
            running[future] = chain

        while waiting or running:
            while waiting and len(running) < window:
                submit(waiting.popleft())
            for future in self._wait(list(running)):
                # A result whose worker died since is pending again, and stays with us.
                if future.status == "pending":
                    continue
                chain = running.pop(future)
                if future.status == "finished" and len(chain.steps) > 1:
                    submit(Chain(chain.number, chain.steps[1:]))
                yield chain, future

    def _result(self, future: Future[Any]) -> Any:
        try:
            return future.result()
        except CancelledError as error:
            raise _scheduler_lost() from error

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
                raise _scheduler_lost() from error
            if self._client.scheduler_info(n_workers=1)["workers"]:
                alone_since_s = None
                continue
            alone_since_s = alone_since_s or time.monotonic()
            if time.monotonic() - alone_since_s > NO_WORKER_S:
                raise DeviceError(
                    f"All workers died and none came back within {NO_WORKER_S:.0f} s.",
                    hint=RESUME_HINT,
                )


def _scheduler_lost() -> DeviceError:
    return DeviceError("The workers' scheduler was lost.", hint=RESUME_HINT)


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
    import threading

    from distributed import Worker, WorkerPlugin

    class Carrier(WorkerPlugin):
        def __init__(self) -> None:
            self.task = task

        def setup(self, worker: Worker) -> None:
            self.turn = threading.Lock()
            # Ctrl-C reaches the whole process group; only the main process answers to it.
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    return Carrier()


def _run_shard(name: str, number: int) -> Any:
    """Run on a worker: find the task that was sent, do one shard."""
    from distributed import get_worker

    carrier: Any = get_worker().plugins[name]
    with carrier.turn:
        return carrier.task(number)


def _was_killed(future: Future[Any]) -> bool:
    from distributed import KilledWorker

    return isinstance(future.exception(), KilledWorker)


def _given_up(future: Future[Any]) -> BaseException:
    error = _error_of(future)
    if isinstance(error, DiskFullError):
        raise error
    return error


def _error_of(future: Future[Any]) -> BaseException:
    if _was_killed(future):
        return ShardsFailed(
            "Workers died on it each time (killed, crashed or out of memory)",
            hint="Try fewer workers (--workers) or smaller batches (--batch). " + RESUME_HINT,
        )
    error = future.exception()
    return error if isinstance(error, BaseException) else DeviceError(f"lost ({future.status})")
