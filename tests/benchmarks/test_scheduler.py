"""The simulation of an archive runs, and its slides are as many and as large as it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).with_name("bench_scheduler.py")


def test_simulation_tells_its_figures() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH), "--quick"], capture_output=True, text=True, check=True
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    figures = {row["figure"].partition(",")[0]: row["value"] for row in rows}
    assert len(figures) == len(rows) == 8
    assert 0 < figures["efficiency"] <= 1
    assert 0 < figures["scheduler CPU per shard"] < 1000
    assert all("of 6 slides" in row["figure"] for row in rows)


def test_slides_have_the_shards_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH.parent))
    import bench_scheduler  # noqa: PLC0415 - a script's folder is on the path from here on

    sizes = bench_scheduler.slide_sizes(1000, 15_625)
    assert sum(sizes) == pytest.approx(15_625, rel=0.01)
    assert min(sizes) < 5 < 40 < max(sizes)
