"""What a person hears while workers are waited for: now and then, with what Slurm says."""

from __future__ import annotations

import pytest

from wsi_stain.cluster.slurm import queue_line
from wsi_stain.cluster.waiting import Waiting


def test_line_comes_late_once_and_sparsely() -> None:
    clock, heard = [100.0], list[str]()
    asked: list[int] = []

    def look() -> str:
        asked.append(1)
        return "job 17 PENDING (Resources)"

    told = Waiting(heard.append, 2, look, lambda: clock[0])
    for second in range(200):
        clock[0] = 100.0 + second
        told.tell(0)
    assert heard == ["waiting for workers: 0 of 2, job 17 PENDING (Resources)"] * 4
    assert len(asked) == 4, "Slurm is asked no more often than it is told"
    told.end(1)
    told.end(2)
    assert heard[4:] == ["workers: 1 of 2 are there"]


def test_nothing_is_said_when_workers_come_at_once() -> None:
    clock, heard = [100.0], list[str]()
    told = Waiting(heard.append, 2, str, lambda: clock[0])
    told.tell(0)
    clock[0] += 0.5
    told.end(2)
    assert heard == []


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        ("17|PENDING|Resources\n", "job 17 PENDING (Resources)"),
        (
            "17|PENDING|Priority\n18|PENDING|Priority\n19|RUNNING|None\n",
            "jobs 17, 18 PENDING (Priority), job 19 RUNNING",
        ),
        ("17|PENDING|(a | b)\n", "job 17 PENDING ((a | b))"),
        ("", ""),
    ],
)
def test_jobs_of_one_state_are_told_together(answer: str, line: str) -> None:
    assert queue_line(answer) == line
