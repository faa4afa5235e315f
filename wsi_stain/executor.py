"""What an executor is: steps of work on shards, results, failures; and the serial one.

In: tasks, shard numbers. Out: results as they come. Not here: what a shard is; workers, which are
in `dispatch`.

Work may have several steps. A shard's next step starts as soon as its last one ended, whatever
other shards do; shards are begun in the order of their numbers.

Failure policy, the same for all executors: a shard that raises is tried again, up to `attempts`
times; the other shards go on to the end; then the failed ones are named in one error. Only a full
disk ends all at once: what the others make could not be kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

from wsi_stain.errors import DeviceError, DiskFullError, WsiStainError

__all__ = [
    "RESUME_HINT",
    "Chain",
    "Done",
    "Executor",
    "Failure",
    "SerialExecutor",
    "ShardsFailed",
    "Step",
    "StepRunner",
    "Task",
    "chains_of",
    "raise_failures",
]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
NAMED_SHARDS = 10
ERROR_TEXT_CHARS = 300
RESUME_HINT = "Finished shards are kept: the same command tries only the failed ones again."


class Task(Protocol[T_co]):
    """What is done to one shard: can be pickled, and may be called twice with the same number."""

    def __call__(self, number: int, /) -> T_co:
        """Do shard `number`."""
        ...


@dataclass(frozen=True)
class Step:
    """One step of the work.

    Attributes
    ----------
    name
        What it is called in results.
    task
        What is done to a shard.
    numbers
        The shards that need it; a shard that does not goes on to its next step at once.
    """

    name: str
    task: Task[Any]
    numbers: Collection[int]


class Done(NamedTuple):
    """A step of one shard that ended well."""

    step: str
    number: int
    result: Any


class Executor(Protocol):
    """Something that can run tasks over numbers."""

    def ask(self, question: Callable[[str], T], about: str) -> list[T]:
        """Have a question answered by all who will translate and are there; at least one is.

        Asked once: who asks the same later, for another slide, hears the same.

        Raises
        ------
        DeviceError
            Nobody answers, or the answer is this.
        """
        ...

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

    def run_steps(self, steps: Sequence[Step]) -> Iterator[Done]:
        """Run steps on the shards that need them, each shard's in this order.

        A shard whose step failed takes no further step.

        Parameters
        ----------
        steps
            First to last.

        Yields
        ------
        Done
            In order of completion.

        Raises
        ------
        WsiStainError, ShardsFailed
            As `run`.
        DiskFullError
            At once.
        """
        ...

    def ranked(self, rank: int) -> Executor:
        """Give this executor to one of several slides at once; the lowest rank goes first."""
        ...


class ShardsFailed(DeviceError):
    """Shards that failed after all attempts (exit code 7)."""


@dataclass(frozen=True)
class Failure:
    """A shard that was given up, and why."""

    number: int
    error: BaseException


@dataclass(frozen=True)
class Chain:
    """A shard and the steps, by number, that it still has to take."""

    number: int
    steps: tuple[int, ...]


def chains_of(steps: Sequence[Step]) -> list[Chain]:
    """Give each shard its steps; by number where there are several steps, else as given."""
    numbers = dict.fromkeys(number for step in steps for number in step.numbers)
    needed = [frozenset(step.numbers) for step in steps]
    return [
        Chain(number, tuple(i for i, those in enumerate(needed) if number in those))
        for number in (numbers if len(steps) == 1 else sorted(numbers))
    ]


class StepRunner(ABC):
    """What all executors do with work of one step."""

    def ask(self, question: Callable[[str], T], about: str) -> list[T]:
        """See `Executor.ask`: here."""
        return [question(about)]

    @abstractmethod
    def run_steps(self, steps: Sequence[Step]) -> Iterator[Done]:
        """See `Executor.run_steps`."""

    def run(self, task: Task[T], numbers: Sequence[int]) -> Iterator[tuple[int, T]]:
        """See `Executor.run`."""
        for done in self.run_steps([Step("task", task, numbers)]):
            yield done.number, done.result

    def ranked(self, rank: int) -> Executor:
        """See `Executor.ranked`."""
        return self


@dataclass(frozen=True)
class SerialExecutor(StepRunner):
    """Runs shards one after the other in this process: the reference, and for debugging.

    Attributes
    ----------
    attempts
        How often a shard that raises is tried in all.
    """

    attempts: int = 2

    def run_steps(self, steps: Sequence[Step]) -> Iterator[Done]:
        """See `Executor.run_steps`; a shard takes all its steps before the next one begins."""
        chains, failures = chains_of(steps), list[Failure]()
        for chain in chains:
            for step in chain.steps:
                result = self._try(steps[step].task, chain.number)
                if isinstance(result, Failure):
                    failures.append(result)
                    break
                yield Done(steps[step].name, chain.number, result)
        raise_failures(failures, len(chains), self.attempts)

    def _try(self, task: Task[T], number: int) -> T | Failure:
        """Do a shard's step, up to `attempts` times."""
        for attempt in range(1, self.attempts + 1):
            try:
                return task(number)
            except DiskFullError:
                raise
            # As wide as a process: whatever ends a shard is the shard's, and named in the end.
            except Exception as error:
                if attempt == self.attempts:
                    return Failure(number, error)
        raise AssertionError("no attempt")


def raise_failures(failures: list[Failure], total: int, attempts: int) -> None:
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
