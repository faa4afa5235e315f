"""Run tasks over shard numbers: in this process, or on the workers of a Dask cluster.

In: tasks, numbers, settings. Out: results as they come. Not here: what a shard is, torch, where
workers come from (`cluster`), what all executors promise (`executor`).

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
import queue
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from wsi_stain import __version__
from wsi_stain.cluster import Crew, open_crew, workers_for
from wsi_stain.config import ClusterConfig
from wsi_stain.errors import DeviceError, DiskFullError
from wsi_stain.executor import (
    RESUME_HINT,
    Chain,
    Device,
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
    from distributed import Future

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
LOST_PAUSE_S = 0.05
START_S = 60.0  # for a worker to import what it needs


class DaskExecutor(StepRunner):
    """Runs shards on the workers of a Dask cluster.

    May be used by several threads at once, each with steps of its own: their shards share the
    workers, those with low numbers first.

    Memory bound: for each caller the scheduler holds at most two shards' bookkeeping per worker,
    and workers hold results only until they are yielded.

    Parameters
    ----------
    crew
        The workers.
    attempts
        How often a shard that raises is tried in all.
    device
        What the workers translate on, where it is known.
    """

    def __init__(self, crew: Crew, *, attempts: int = 2, device: Device | None = None) -> None:
        self._crew, self._client = crew, crew.client
        self._attempts = attempts
        self._device = device

    @property
    def device(self) -> Device | None:
        """See `Executor.device`."""
        return self._device

    def run_steps(self, steps: Sequence[Step]) -> Iterator[Done]:
        """See `Executor.run_steps`."""
        chains, failures, suspects = chains_of(steps), list[Failure](), list[Chain]()
        with self._sent(steps) as name_there:
            for first_try in (True, False):
                waiting = chains if first_try else suspects
                for chain, future in self._finished(
                    steps, name_there, waiting, alone=not first_try
                ):
                    if future.status == "finished":
                        name = steps[chain.steps[0]].name
                        yield Done(name, chain.number, self._result(future))
                    elif first_try and _was_killed(future):
                        suspects.append(chain)
                    else:
                        failures.append(Failure(chain.number, _given_up(future)))
        raise_failures(failures, len(chains), self._attempts)

    @contextmanager
    def _sent(self, steps: Sequence[Step]) -> Iterator[str]:
        """Have the tasks at all workers, under one name: each worker is spoken to once."""
        name = f"{'-'.join(step.name for step in steps)}-{uuid.uuid4().hex}"
        try:
            self._send([step.task for step in steps], name)
            yield name
        finally:
            # Frees what the tasks loaded. After an interrupt the cluster may be gone already.
            with contextlib.suppress(OSError, CancelledError, RuntimeError):
                self._client.unregister_worker_plugin(name)

    def _send(self, tasks: Sequence[Task[Any]], name: str) -> None:
        """Give tasks to all workers; a worker that dies in between breaks one attempt."""
        carrier = _carrier(tasks, ours=not self._crew.is_remote)
        for last in (False, False, True):
            try:
                self._client.register_plugin(carrier, name=name)
            except OSError as error:
                if last:
                    raise DeviceError(f"The task cannot be sent to workers: {error}.") from error
            else:
                return

    def _finished(
        self, steps: Sequence[Step], name: str, chains: Iterable[Chain], *, alone: bool
    ) -> Iterator[tuple[Chain, Future[Any]]]:
        """Keep a window of shards in the cluster; give each step as it ends, well or not."""
        waiting, running = deque(chains), dict[Any, Chain]()
        window = _Window(self._crew, one=alone)
        ended: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()

        def submit(chain: Chain) -> None:
            step = chain.steps[0]
            future = self._client.submit(
                _run_shard,
                name,
                step,
                chain.number,
                pure=False,
                retries=self._attempts - 1,
                priority=-chain.number,
                resources=dict(self._crew.places.get(steps[step].name, {})) or None,
            )
            running[future] = chain
            future.add_done_callback(ended.put)

        try:
            while waiting or running:
                while waiting and len(running) < window.size():
                    submit(waiting.popleft())
                future = self._next(ended)
                if future.status in ("pending", "lost"):
                    # A result whose worker died before it was fetched: it is being made again.
                    time.sleep(LOST_PAUSE_S)
                    future.add_done_callback(ended.put)
                    continue
                chain = running.pop(future)
                if future.status == "finished" and len(chain.steps) > 1:
                    submit(Chain(chain.number, chain.steps[1:]))
                yield chain, future
        finally:
            # A caller that stops early wants no more of it; callbacks would keep them alive.
            if running:
                with contextlib.suppress(OSError, CancelledError, RuntimeError):
                    self._client.cancel(list(running))

    def _result(self, future: Future[Any]) -> Any:
        try:
            return future.result()
        except CancelledError as error:
            raise _scheduler_lost() from error

    def _next(self, ended: queue.SimpleQueue[Future[Any]]) -> Future[Any]:
        """Wait until a future ends; fail where no worker is left to end any."""
        alone_since_s: float | None = None
        while True:
            try:
                future = ended.get(timeout=POLL_S)
            except queue.Empty:
                alone_since_s = self._check_alive(alone_since_s)
                continue
            if future.status == "cancelled":
                raise _scheduler_lost()
            return future

    def _check_alive(self, alone_since_s: float | None) -> float | None:
        """Tell since when no worker is there that could go on; fail where it has been too long."""
        if self._client.status in ("closing", "closed"):
            raise _scheduler_lost()
        workers = self._client.scheduler_info(n_workers=-1)["workers"]
        if workers_for(workers.values(), self._crew.places):
            return None
        alone_since_s = alone_since_s or time.monotonic()
        if time.monotonic() - alone_since_s > self._crew.wait_s:
            what = "All workers" + (f" {self._crew.where}" if self._crew.where else "")
            raise DeviceError(
                f"{what} died and none came back within {self._crew.wait_s:.0f} s.",
                hint=RESUME_HINT,
            )
        return alone_since_s


class _Window:
    """How many shards of one caller may be in the cluster at once: two for each worker.

    Where workers come and go the number follows them, a little behind.
    """

    def __init__(self, crew: Crew, *, one: bool) -> None:
        self._crew, self._one = crew, one
        self._n_workers, self._asked_s = crew.n_workers, time.monotonic()

    def size(self) -> int:
        if self._one:
            return 1
        now_s = time.monotonic()
        if self._crew.is_remote and now_s - self._asked_s > POLL_S:
            there = self._crew.client.scheduler_info(n_workers=0)["n_workers"]
            self._n_workers, self._asked_s = max(self._crew.n_workers, there), now_s
        return 2 * self._n_workers


def _scheduler_lost() -> DeviceError:
    return DeviceError("The workers' scheduler was lost.", hint=RESUME_HINT)


def open_executor(
    config: ClusterConfig, count_devices: Callable[[ClusterConfig], int]
) -> AbstractContextManager[Executor]:
    """Give a context manager that starts what `config` asks for, and stops it at the end.

    Parameters
    ----------
    config
        Executor, workers, attempts, memory, addresses.
    count_devices
        Counts the CUDA devices the run may use; 0 means: work on the cores. Where workers are on
        other hosts it is asked there.

    Raises
    ------
    DeviceError
        On entering: workers cannot be started or reached, or have another version.
    """
    if config.executor == "serial":
        return contextlib.nullcontext(SerialExecutor(config.attempts))
    return _dask(config, count_devices)


@contextmanager
def _dask(
    config: ClusterConfig, count_devices: Callable[[ClusterConfig], int]
) -> Iterator[Executor]:
    with open_crew(config, count_devices) as crew:
        device = _ask_device(crew, config, count_devices) if crew.is_remote else None
        yield DaskExecutor(crew, attempts=config.attempts, device=device)


def _ask_device(
    crew: Crew, config: ClusterConfig, count_devices: Callable[[ClusterConfig], int]
) -> Device:
    """Ask one of the workers that will translate what it has, and whether it is our version."""
    place = dict(crew.places.get("translate", {})) or None
    future = crew.client.submit(_introduce, count_devices, config, pure=False, resources=place)
    try:
        error = future.exception(timeout=crew.wait_s + START_S)
    except TimeoutError as late:
        raise DeviceError(f"No worker {crew.where} answers.", hint=RESUME_HINT) from late
    except CancelledError as lost:
        raise _scheduler_lost() from lost
    if isinstance(error, DeviceError):
        raise error
    if error is not None:
        raise DeviceError(
            f"A worker {crew.where} cannot run wsi-stain: {type(error).__name__}: {error}.",
            hint=f"Install wsi-stain {__version__} for all workers, in the same Python version.",
        ) from error
    version, n_devices = future.result()
    if version != __version__:
        raise DeviceError(
            f"Workers {crew.where} have wsi-stain {version}, this is {__version__}.",
            hint="Install the same version for all.",
        )
    return "cuda" if n_devices else "cpu"


def _introduce(
    count_devices: Callable[[ClusterConfig], int], config: ClusterConfig
) -> tuple[str, int]:
    """Run on a worker: tell version and number of devices."""
    return __version__, count_devices(config)


def _carrier(tasks: Sequence[Task[Any]], *, ours: bool) -> Any:
    """Wrap tasks so that each worker gets them once; a restarted worker gets them again."""
    import signal
    import threading

    from distributed import Worker, WorkerPlugin

    class Carrier(WorkerPlugin):
        def __init__(self) -> None:
            self.tasks = tasks

        def setup(self, worker: Worker) -> None:
            self.turns = [threading.Lock() for _ in tasks]
            if ours:
                # Ctrl-C reaches the whole process group; only the main process answers to it.
                signal.signal(signal.SIGINT, signal.SIG_IGN)

    return Carrier()


def _run_shard(name: str, step: int, number: int) -> Any:
    """Run on a worker: find the task that was sent, do one shard."""
    from distributed import get_worker

    carrier: Any = get_worker().plugins[name]
    with carrier.turns[step]:
        return carrier.tasks[step](number)


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
