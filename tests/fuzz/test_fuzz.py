"""Forty-four cases of the fuzzer, four of each target; ``make fuzz N=1000`` runs more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FUZZER = Path(__file__).with_name("fuzz.py")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_damaged_input_ends_as_documented() -> None:
    command = [sys.executable, str(FUZZER), "--cases", "44", "--seed", "1"]
    done = subprocess.run(
        command, cwd=FUZZER.parents[2], env=_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("44 cases, 0 failed\n")


def _environment() -> dict[str, str]:
    # A script's own folder is first on its path: the package beside the tests must be named.
    return {"PYTHONPATH": str(FUZZER.parents[2]), "OMP_NUM_THREADS": "1"}
