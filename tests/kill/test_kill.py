"""Runs killed at random moments end with the same bytes; ``kill.py`` beside this does more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

KILLER = Path(__file__).with_name("kill.py")


@pytest.mark.parametrize(
    ("kills", "seed"), [(3, 2), pytest.param(40, 1, marks=pytest.mark.slow)], ids=["3", "40"]
)
@pytest.mark.timeout(3600)
def test_killed_runs_end_with_the_same_bytes(kills: int, seed: int) -> None:
    command = [sys.executable, str(KILLER), "--kills", str(kills), "--seed", str(seed)]
    # A script's own folder is first on its path: the package beside the tests must be named.
    environment = {"PYTHONPATH": str(KILLER.parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills in" in done.stdout
    assert done.stdout.endswith("0 faults\n")
