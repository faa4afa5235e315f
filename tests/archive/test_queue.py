"""Whose turn it is: order, second attempts, the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from wsi_stain.archive.jobs import Job, make_jobs
from wsi_stain.archive.queue import JobQueue, Turn
from wsi_stain.archive.source import Entry
from wsi_stain.config import RunConfig


@pytest.fixture
def jobs(settle: Callable[..., RunConfig]) -> list[Job]:
    """Three jobs."""
    return make_jobs([Entry(Path(name), name) for name in ("a", "b", "c")], settle())


def test_turns_come_in_order_with_their_ranks(jobs: list[Job]) -> None:
    queue = JobQueue(jobs)
    assert [job.stem for job in queue.upcoming(2)] == ["a", "b"]
    turns = [queue.take() for _ in range(4)]
    assert [t and (t.job.stem, t.attempt, t.rank) for t in turns] == [
        ("a", 1, 0),
        ("b", 1, 1),
        ("c", 1, 2),
        None,
    ]


def test_job_put_back_comes_after_its_wait_and_behind_the_others(jobs: list[Job]) -> None:
    queue = JobQueue(jobs)
    first = queue.take()
    assert first is not None
    queue.put_back(first, 0.2)
    began_s = time.monotonic()
    turns = [queue.take() for _ in range(3)]
    assert [turn.job.stem for turn in turns if turn] == ["b", "c", "a"]
    assert time.monotonic() - began_s > 0.15
    assert turns[2] is not None
    assert turns[2].attempt == 2
    assert queue.take() is None


def test_end_wakes_who_waits(jobs: list[Job]) -> None:
    queue, got = JobQueue(jobs[:1]), list[Turn | None]()
    first = queue.take()
    assert first is not None
    queue.put_back(first, 60.0)
    waiting = threading.Thread(target=lambda: got.append(queue.take()))
    waiting.start()
    queue.end()
    waiting.join(10.0)
    assert got == [None]
