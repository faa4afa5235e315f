"""Whose turn it is: jobs in order, and those that are to be tried again after a while.

In: jobs. Out: turns, to several threads. Not here: what is done in a turn.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from wsi_stain.archive.jobs import Job

__all__ = ["JobQueue", "Turn"]


@dataclass(frozen=True)
class Turn:
    """A job to do now.

    Attributes
    ----------
    job
        The job.
    attempt
        1 for the first.
    rank
        How many turns were given before; earlier ones go first at the workers.
    """

    job: Job
    attempt: int
    rank: int


class JobQueue:
    """Gives jobs to threads.

    Invariant: a job is with one thread at most.

    Parameters
    ----------
    jobs
        In the order in which they are to be begun.
    """

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._ready = deque((job, 1) for job in jobs)
        self._later: list[tuple[float, int, Job, int]] = []
        self._given = 0
        self._ended = False
        self._moved = threading.Condition()

    def take(self) -> Turn | None:
        """Wait for the next turn; none where nothing is left to begin."""
        with self._moved:
            while not self._ended:
                self._wake()
                if self._ready:
                    job, attempt = self._ready.popleft()
                    self._given += 1
                    return Turn(job, attempt, self._given - 1)
                if not self._later:
                    return None
                self._moved.wait(self._later[0][0] - time.monotonic())
            return None

    def put_back(self, turn: Turn, wait_s: float) -> None:
        """Have a job tried again, not before `wait_s` seconds; call it before the next `take`."""
        with self._moved:
            due_s = time.monotonic() + wait_s
            heapq.heappush(self._later, (due_s, turn.rank, turn.job, turn.attempt + 1))
            self._moved.notify_all()

    def upcoming(self, count: int) -> list[Job]:
        """Show who is next, without giving a turn."""
        with self._moved:
            return [job for job, _ in list(self._ready)[:count]]

    def end(self) -> None:
        """Give no more turns."""
        with self._moved:
            self._ended = True
            self._moved.notify_all()

    def _wake(self) -> None:
        """Move to the front what has waited long enough."""
        while self._later and self._later[0][0] <= time.monotonic():
            _, _, job, attempt = heapq.heappop(self._later)
            self._ready.append((job, attempt))
