"""How far an archive is, for those who watch from outside: JSON, and text for Prometheus.

In: events of slides. Out: `status.json`, `archive.prom`, replaced whole every few seconds. Not
here: what came of slides in the end (`record`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from wsi_stain.archive.jobs import Job
from wsi_stain.archive.record import ArchiveFiles
from wsi_stain.files import atomic_write_bytes
from wsi_stain.manifest import Event

__all__ = ["SlideStatus", "Status", "Watch", "last_sign"]

WRITE_EVERY_S = 2.0
PREFIX = "wsi_stain_archive"
ENDS = ("done", "skipped", "failed")


class SlideStatus(msgspec.Struct, kw_only=True):
    """A slide in work: each stage's units done and in all (tiles, rows)."""

    name: str
    begun_utc: str
    stages: dict[str, tuple[int, int]] = {}


class Status(msgspec.Struct, kw_only=True):
    """The content of `status.json`."""

    schema: int = 1
    state: Literal["running", "finished", "stopped"] = "running"
    begun_utc: str
    updated_utc: str
    seconds: float
    slides: dict[str, int]  # pending, running, done, skipped, failed
    tiles_done: int  # translated by this client
    tiles_per_second: float
    left_seconds: float | None  # by the slides' sizes; none while nothing is done
    in_work: list[SlideStatus]
    workers: str = ""  # what was said of them last: that they are waited for, and why
    dashboard: str = ""  # of Dask, where it serves one that this host can open


class Watch:
    """Hears what happens to slides and writes it down; called by one thread at a time.

    Parameters
    ----------
    files
        Where to write.
    jobs
        The slides of this client.
    """

    def __init__(self, files: ArchiveFiles, jobs: Iterable[Job]) -> None:
        self._files = files
        self._sizes = {job.name: job.size_bytes() for job in jobs}
        self._counts: Counter[str] = Counter()
        self._in_work: dict[str, SlideStatus] = {}
        self._tiles: Counter[str] = Counter()
        self._before: dict[str, int] = {}
        self._began_s, self._begun_utc = time.monotonic(), _now_utc()
        self._worked_bytes = 0
        self._left_bytes = sum(self._sizes.values())
        self._written_s = 0.0
        self._workers = self._dashboard = ""
        self.write()

    def hear(self, name: str, event: Event) -> None:
        """Take in an event; write where the last time is long enough ago."""
        if event.stage == "workers":
            self._of_workers(event)
        elif event.stage == "archive":
            self._of_slide(name, event)
        elif event.kind != "note" and name in self._in_work:
            self._in_work[name].stages[event.stage] = (event.done, event.total)
            if event.stage == "translate" and event.kind in ("start", "advance"):
                self._count(name, event)
        if time.monotonic() - self._written_s > WRITE_EVERY_S:
            self.write()

    def write(self, state: Literal["running", "finished", "stopped"] = "running") -> None:
        """Write both files.

        Raises
        ------
        OutputError
            The folder refuses.
        """
        status = self.status(state)
        text = msgspec.json.format(msgspec.json.encode(status), indent=1)
        atomic_write_bytes(self._files.status, text + b"\n")
        atomic_write_bytes(self._files.metrics, prometheus_text(status).encode())
        self._written_s = time.monotonic()

    def status(self, state: Literal["running", "finished", "stopped"]) -> Status:
        """Say how far it is."""
        seconds = time.monotonic() - self._began_s
        ended = sum(self._counts[end] for end in ENDS)
        running = len(self._in_work)
        tiles = self._tiles.total()
        return Status(
            state=state,
            begun_utc=self._begun_utc,
            updated_utc=_now_utc(),
            seconds=round(seconds, 1),
            slides={
                "pending": len(self._sizes) - ended - running,
                "running": running,
                **{end: self._counts[end] for end in ENDS},
            },
            tiles_done=tiles,
            tiles_per_second=round(tiles / max(seconds, 1e-3), 3),
            left_seconds=self._left_s(seconds),
            in_work=list(self._in_work.values()),
            workers=self._workers,
            dashboard=self._dashboard,
        )

    def _of_workers(self, event: Event) -> None:
        self._dashboard = event.facts.get("dashboard", self._dashboard)
        if "dashboard" not in event.facts:
            self._workers = event.text
        self._written_s = 0.0  # who waits wants to know now

    def _of_slide(self, name: str, event: Event) -> None:
        if event.kind == "start":
            self._in_work[name] = SlideStatus(name=name, begun_utc=_now_utc())
            return
        self._in_work.pop(name, None)
        if event.kind == "finish":
            end = event.text.partition(":")[0]
            self._counts[end] += 1
            size_bytes = self._sizes.get(name, 0)
            self._left_bytes -= size_bytes
            self._worked_bytes += size_bytes if end == "done" else 0

    def _count(self, name: str, event: Event) -> None:
        """Count tiles of this run alone: what an earlier one had done is where it starts."""
        if event.kind == "start":
            # A second attempt in this run begins with what the first one did.
            self._before[name] = event.done - self._tiles[name]
        else:
            self._tiles[name] = event.done - self._before.get(name, 0)

    def _left_s(self, seconds: float) -> float | None:
        if not self._worked_bytes:
            return None
        return round(seconds * self._left_bytes / self._worked_bytes, 1)


def last_sign(files: ArchiveFiles) -> str:
    """Say when a client of an archive was last heard of: a live one writes every few minutes."""
    try:
        age_s = max(0.0, time.time() - files.status.stat().st_mtime)
    except OSError:
        return "It has written no status yet."
    return f"It last wrote {files.status.name} {age_s / 60:.0f} min ago."


def prometheus_text(status: Status) -> str:
    """Write a status as Prometheus' text format has it (for a textfile collector)."""
    updated_s = datetime.fromisoformat(status.updated_utc).timestamp()
    lines = [_head("slides", "gauge", "Slides by state.")]
    lines += [f'{PREFIX}_slides{{state="{n}"}} {count}' for n, count in status.slides.items()]
    numbers: list[tuple[str, str, Any, str]] = [
        ("tiles_total", "counter", status.tiles_done, "Tiles translated by this client."),
        ("seconds_total", "counter", status.seconds, "Seconds since this client began."),
        ("running", "gauge", int(status.state == "running"), "1 while the client works."),
        ("updated_timestamp_seconds", "gauge", f"{updated_s:.0f}", "When this was written."),
    ]
    if status.left_seconds is not None:
        numbers.append(("left_seconds", "gauge", status.left_seconds, "Projected time left."))
    for name, kind, value, words in numbers:
        lines += [_head(name, kind, words), f"{PREFIX}_{name} {value}"]
    return "\n".join(lines) + "\n"


def _head(name: str, kind: str, words: str) -> str:
    return f"# HELP {PREFIX}_{name} {words}\n# TYPE {PREFIX}_{name} {kind}"


def _now_utc() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
