"""What every benchmark shares: interleaved timing, and one JSON line per figure.

A line is ``{"bench", "figure", "unit", "value", "peer", "peer_value", "ratio", "machine"}`` and
``others``: the share of the machine that other processes took meanwhile. Ratios and CPU seconds
survive a busy machine; wall times count only where `others` is near 0.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from wsi_stain.cluster.quiet import worker_environment

__all__ = ["Action", "Ruler", "Times", "as_worker", "interleave", "start"]

Action = Callable[[], object]

MEANINGFUL_S = 1.0  # of core time: the kernel counts in hundredths


@dataclass(frozen=True)
class Times:
    """Wall and CPU seconds of one action, medians; CPU counts all threads of this process."""

    wall_s: float
    cpu_s: float


def interleave(actions: dict[str, Action], rounds: int) -> dict[str, Times]:
    """Run all actions in turn, A B C A B C ..., so that a change of the machine hits all alike."""
    walls: dict[str, list[float]] = {name: [] for name in actions}
    cpus: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            action()
            walls[name].append(time.perf_counter() - wall_s)
            cpus[name].append(time.process_time() - cpu_s)
    return {
        name: Times(statistics.median(walls[name]), statistics.median(cpus[name]))
        for name in actions
    }


@dataclass
class Ruler:
    """Prints the figures of one benchmark.

    Attributes
    ----------
    bench
        Its name.
    quick
        Small inputs and one round: shows that the benchmark runs, not how fast anything is.
    """

    bench: str
    quick: bool
    _machine: str = field(default_factory=lambda: f"{_cpu_name()}, {os.cpu_count()} cores")
    _seen: tuple[float, float, float] = field(default_factory=lambda: _jiffies())
    _others: float | None = None

    def times(self, actions: dict[str, Action], rounds: int = 7) -> dict[str, Times]:
        """Interleave actions; all of them run once before that, outside of the measurement."""
        if not self.quick:
            for action in actions.values():
                action()
        return interleave(actions, 1 if self.quick else rounds)

    def report(
        self,
        figure: str,
        unit: str,
        value: float,
        peer: str | None = None,
        peer_value: float | None = None,
    ) -> None:
        """Print one figure; the ratio is ``value / peer_value``."""
        ratio = value / peer_value if peer_value else None
        row = {
            "bench": self.bench,
            "figure": figure,
            "unit": unit,
            "value": _short(value),
            "peer": peer,
            "peer_value": None if peer_value is None else _short(peer_value),
            "ratio": None if ratio is None else _short(ratio),
            "machine": self._machine,
            "others": self._share_of_others(),
        }
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()

    def _share_of_others(self) -> float | None:
        """Share of the machine that others took since the last figure, or that second's."""
        now = _jiffies()
        busy_s, total_s, own_s = (a - b for a, b in zip(now, self._seen, strict=True))
        if total_s > MEANINGFUL_S:
            self._seen = now
            self._others = round(max(0.0, busy_s - own_s) / total_s, 2)
        return self._others


def as_worker() -> None:
    """Begin this process anew with the environment of a worker, which malloc reads at its start."""
    wanted = worker_environment()
    if wanted.items() - os.environ.items():
        command = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **wanted})  # noqa: S606


def start(bench: str, doc: str | None) -> Ruler:
    """Read the command line of a benchmark, which is ``[--quick]``."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--quick", action="store_true", help="small and once: does it run?")
    return Ruler(bench, bool(parser.parse_args().quick))


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _jiffies() -> tuple[float, float, float]:
    """Seconds so far: busy and total of the machine's cores, and our own with ended children."""
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    own_s = sum(usage.ru_utime + usage.ru_stime for usage in own)
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0, 0.0, own_s
    ticks = [int(word) for word in stat.read_text().split("\n", 1)[0].split()[1:9]]
    hertz = os.sysconf("SC_CLK_TCK")
    return (sum(ticks) - ticks[3] - ticks[4]) / hertz, sum(ticks) / hertz, own_s


def _short(value: float) -> float:
    return float(f"{value:.4g}")
