"""Run tasks over shard numbers: in this process, or on the workers of a Dask cluster.

In: tasks, numbers, settings. Out: results as they come. Not here: what a shard is, torch, where
workers come from and how tasks get there (`cluster`), what all executors promise (`executor`).

A worker unpacks a task once; after that only numbers travel, and results should be small (a task's
real input and output are files). One worker is one process, on one CUDA device or one core. It does
one shard of a step at a time, so two threads of a worker keep a device busy: one reads while the
other translates. Among the shards of a slide those that were begun go first.

What ended together is fetched together, and what follows from it is sent together: the scheduler
works by the message more than by the shard.

A worker that dies in mid-shard is replaced and its shard redone. A shard whose workers die again
and again is tried once more by itself, since a neighbor may have been to blame, before it counts
as failed.
"""

from __future__ import annotations

import contextlib
import copy
import queue
import threading
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from wsi_stain import __version__
from wsi_stain.cluster import (
    Crew,
    Parcels,
    ask_all,
    introduce,
    open_crew,
    open_parcels,
    run_shard,
    was_killed,
    workers_for,
)
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
    chains_of,
    raise_failures,
)
from wsi_stain.manifest import Event, Listener, ignore

if TYPE_CHECKING:
    from distributed import Future

__all__ = [
    "DaskExecutor",
    "Done",
    "Executor",
    "SerialExecutor",
    "ShardsFailed",
    "Step",
    "open_executor",
]

T = TypeVar("T")
POLL_S = 5.0
MOST_STEPS = 16  # more than a slide has
LOST_PAUSE_S = 0.05
START_S = 60.0  # for a worker to import what it needs


class _Outcome(NamedTuple):
    """What came of a step of a shard: a result, or an error."""

    chain: Chain
    result: Any
    error: BaseException | None


class DaskExecutor(StepRunner):
    """Runs shards on the workers of a Dask cluster.

    May be used by several threads at once, each with steps of its own: their shards share the
    workers.

    Memory bound: for each caller the scheduler holds the bookkeeping of at most two shards per
    worker, and of those just fetched; workers hold results until then.

    Parameters
    ----------
    crew
        The workers.
    parcels
        Where they find tasks.
    attempts
        How often a shard that raises is tried in all.
    """

    def __init__(self, crew: Crew, parcels: Parcels, *, attempts: int = 2) -> None:
        self._crew, self._client, self._parcels = crew, crew.client, parcels
        self._attempts = attempts
        self._answers: dict[tuple[Any, str], list[Any]] = {}
        self._asking = threading.Lock()
        self._rank = 0

    def ask(self, question: Callable[[str], T], about: str) -> list[T]:
        """See `Executor.ask`."""
        known = (question, about)
        with self._asking:
            if known not in self._answers:
                self._answers[known] = _ask(self._crew, question, about)
            return self._answers[known]

    def ranked(self, rank: int) -> DaskExecutor:
        """See `Executor.ranked`: the same workers; may be used from another thread."""
        other = copy.copy(self)
        other._rank = rank
        return other

    def run_steps(self, steps: Sequence[Step]) -> Iterator[Done]:
        """See `Executor.run_steps`."""
        chains, failures, suspects = chains_of(steps), list[Failure](), list[Chain]()
        with self._parcels.sent([step.task for step in steps]) as tasks:
            for first_try in (True, False):
                waiting = chains if first_try else suspects
                for chain, result, error in self._finished(
                    steps, tasks, waiting, alone=not first_try
                ):
                    if error is None:
                        yield Done(steps[chain.steps[0]].name, chain.number, result)
                    elif first_try and was_killed(error):
                        suspects.append(chain)
                    else:
                        failures.append(Failure(chain.number, _given_up(error)))
        raise_failures(failures, len(chains), self._attempts)

    def _finished(
        self, steps: Sequence[Step], tasks: int, chains: Iterable[Chain], *, alone: bool
    ) -> Iterator[_Outcome]:
        """Keep a window of shards in the cluster; give each step as it ends, well or not."""
        waiting, running = deque(chains), dict[Any, Chain]()
        window = _Window(self._crew, one=alone)
        ended: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        run = uuid.uuid4().hex
        outcomes, following = list[_Outcome](), list[Chain]()
        try:
            while waiting or running or following:
                room = max(0, window.size() - len(running) - len(following))
                fresh = [waiting.popleft() for _ in range(min(room, len(waiting)))]
                for future, chain in self._submit(steps, tasks, run, [*following, *fresh]):
                    running[future] = chain
                    future.add_done_callback(ended.put)
                yield from outcomes
                outcomes = self._outcomes(running, ended)
                following = _following(outcomes)
            yield from outcomes
        finally:
            # A caller that stops early wants no more of it; callbacks would keep them alive.
            if running:
                with contextlib.suppress(OSError, CancelledError, RuntimeError):
                    self._client.cancel(list(running))

    def _submit(
        self, steps: Sequence[Step], tasks: int, run: str, chains: Iterable[Chain]
    ) -> Iterator[tuple[Future[Any], Chain]]:
        """Send shards: those of one step in one message."""
        by_step = defaultdict(list)
        for chain in chains:
            by_step[chain.steps[0]].append(chain)
        for step, group in by_step.items():
            name = steps[step].name
            futures = self._client.map(
                run_shard,
                [chain.number for chain in group],
                key=[(f"{name}-{run}", chain.number) for chain in group],
                parcel=self._parcels.parcel(tasks),
                step=step,
                pure=False,
                retries=self._attempts - 1,
                priority=step - self._rank * MOST_STEPS,
                fifo_timeout="0 ms",
                resources=dict(self._crew.places.get(name, {})) or None,
            )
            yield from zip(futures, group, strict=True)

    def _outcomes(
        self, running: dict[Future[Any], Chain], ended: queue.SimpleQueue[Future[Any]]
    ) -> list[_Outcome]:
        """Wait until shards end; fetch what came of all that have, and forget them."""
        futures = self._take(ended)
        well = [future for future in futures if future.status == "finished"]
        try:
            # A result may be lost with its worker, and its shard fail when it is made again.
            fetched = self._client.gather(well, errors="skip")
        except CancelledError as error:
            raise _scheduler_lost() from error
        except OSError:  # the way to the scheduler broke: the futures tell what became of it
            fetched = []
        if len(fetched) < len(well):  # their status tells the rest the next time
            for future in futures:
                future.add_done_callback(ended.put)
            return []
        results = dict(zip(well, fetched, strict=True))
        return [
            _Outcome(running.pop(future), results.get(future), _error_of(future))
            for future in futures
        ]

    def _take(self, ended: queue.SimpleQueue[Future[Any]]) -> list[Future[Any]]:
        """Wait until a future ends; give all that have by then."""
        while True:
            futures = [self._next(ended)]
            with contextlib.suppress(queue.Empty):
                while True:
                    futures.append(ended.get_nowait())
            if any(future.status == "cancelled" for future in futures):
                raise _scheduler_lost()
            lost = [future for future in futures if future.status in ("pending", "lost")]
            if lost:
                # Results whose worker died before they were fetched: they are being made again.
                time.sleep(LOST_PAUSE_S)
            for future in lost:
                future.add_done_callback(ended.put)
            if settled := [future for future in futures if future not in lost]:
                return settled

    def _next(self, ended: queue.SimpleQueue[Future[Any]]) -> Future[Any]:
        """Wait until a future ends; fail where no worker is left to end any."""
        alone_since_s: float | None = None
        while True:
            try:
                return ended.get(timeout=POLL_S)
            except queue.Empty:
                alone_since_s = self._check_alive(alone_since_s)

    def _check_alive(self, alone_since_s: float | None) -> float | None:
        """Tell since when no worker is there that could go on; fail where it has been too long."""
        if self._client.status in ("closing", "closed"):
            raise _scheduler_lost()
        workers = self._client.scheduler_info(n_workers=-1)["workers"]
        if able := workers_for(workers, self._crew.places):
            self._crew.waiting.end(len(able))
            return None
        self._crew.waiting.tell(0)
        alone_since_s = alone_since_s or time.monotonic()
        if time.monotonic() - alone_since_s > self._crew.wait_s:
            what = f"All workers{_where(self._crew)}"
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


def _following(outcomes: Iterable[_Outcome]) -> list[Chain]:
    """List what comes next of shards whose step ended well."""
    return [
        Chain(chain.number, chain.steps[1:])
        for chain, _, error in outcomes
        if error is None and len(chain.steps) > 1
    ]


def _scheduler_lost() -> DeviceError:
    return DeviceError("The workers' scheduler was lost.", hint=RESUME_HINT)


def open_executor(
    config: ClusterConfig,
    count_devices: Callable[[ClusterConfig], int],
    listener: Listener = ignore,
) -> AbstractContextManager[Executor]:
    """Give a context manager that starts what `config` asks for, and stops it at the end.

    Parameters
    ----------
    config
        Executor, workers, attempts, memory, addresses.
    count_devices
        Counts the CUDA devices the run may use; 0 means: work on the cores. Where workers are on
        other hosts it is asked there.
    listener
        Hears notes of the stage "workers": that they are waited for; where Dask's dashboard is,
        which is also its fact "dashboard".

    Raises
    ------
    ConfigError
        On entering: a dashboard that cannot be.
    DeviceError
        On entering: workers cannot be started or reached, or have another version.
    """
    if config.executor == "serial":
        return contextlib.nullcontext(SerialExecutor(config.attempts))
    return _dask(config, count_devices, listener)


@contextmanager
def _dask(
    config: ClusterConfig,
    count_devices: Callable[[ClusterConfig], int],
    listener: Listener,
) -> Iterator[Executor]:
    def hear(text: str) -> None:
        listener(Event("workers", "note", text=text))

    with open_crew(config, count_devices, hear) as crew:
        if crew.dashboard:
            text, facts = f"Dask's dashboard: {crew.dashboard}", {"dashboard": crew.dashboard}
            listener(Event("workers", "note", text=text, facts=facts))
        if crew.is_remote:
            _meet(crew, config, count_devices)
        with open_parcels(crew.client, ours=not crew.is_remote) as parcels:
            yield DaskExecutor(crew, parcels, attempts=config.attempts)


def _meet(crew: Crew, config: ClusterConfig, count_devices: Callable[[ClusterConfig], int]) -> None:
    """Ask the workers that will translate for their version, and for the devices asked for."""
    for version in _ask(crew, introduce, count_devices, config):
        if version != __version__:
            raise DeviceError(
                f"Workers {crew.where} have wsi-stain {version}, this is {__version__}.",
                hint="Install the same version for all.",
            )


def _ask(crew: Crew, question: Callable[..., T], *about: Any) -> list[T]:
    """Have the workers answer that will translate; at least one does."""
    try:
        answers, errors = ask_all(crew, crew.wait_s + START_S, question, *about)
    except CancelledError as lost:
        raise _scheduler_lost() from lost
    # A worker that was killed says nothing of the others.
    if faults := [error for error in errors if not (answers and was_killed(error))]:
        raise _no_answer(crew, faults[0])
    if not answers:
        raise DeviceError(f"No worker{_where(crew)} answers.", hint=RESUME_HINT)
    return answers


def _no_answer(crew: Crew, error: BaseException) -> BaseException:
    """Word why a worker could not answer."""
    if isinstance(error, DeviceError) or was_killed(error):
        return _given_up(error)
    hint = f"Install wsi-stain {__version__} for all workers, in the same Python version."
    what = f"A worker{_where(crew)} cannot run wsi-stain: {type(error).__name__}: {error}."
    return DeviceError(what, hint=hint if crew.is_remote else "See wsi-stain doctor.")


def _where(crew: Crew) -> str:
    return f" {crew.where}" if crew.where else ""


def _given_up(error: BaseException) -> BaseException:
    if isinstance(error, DiskFullError):
        raise error
    if was_killed(error):
        return ShardsFailed(
            "Workers died on it each time (killed, crashed or out of memory)",
            hint="Try fewer workers (--workers) or smaller batches (--batch). " + RESUME_HINT,
        )
    return error


def _error_of(future: Future[Any]) -> BaseException | None:
    if future.status == "finished":
        return None
    error = future.exception()
    return error if isinstance(error, BaseException) else DeviceError(f"lost ({future.status})")
