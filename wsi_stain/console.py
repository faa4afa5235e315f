"""What a person sees in the terminal: plan, bars with ETA or plain lines, summary.

In: events, tables. Out: text on stdout and stderr. Not here: any decision.

Facts and results go to stdout, progress and errors to stderr, so that pipes stay clean.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from wsi_stain.manifest import Event

__all__ = [
    "ArchiveDisplay",
    "ProgressDisplay",
    "plan_rows",
    "print_archive",
    "print_facts",
    "print_summary",
    "summary_rows",
]

STAGE_NAMES = {
    "run": "note",
    "pace": "try this machine",
    "plan": "find tissue, plan",
    "fill": "read patches",
    "overview": "keep H&E pictures",
    "fit": "fit color",
    "translate": "translate",
    "write": "stitch and write",
    "validate": "validate",
    "uncertainty": "write uncertainty",
    "annotate": "outline for QuPath",
    "quantify": "measure stain",
    "report": "report",
    "train": "train",
}
UNITS = {"fill": "tiles", "translate": "tiles", "write": "rows", "train": "samples"}
PLAIN_EVERY_S = 15.0
SUMMARY_KEYS = frozenset(
    {"output", "run folder", "size", "pixel size um", "bytes", "tiles", "seconds", "flags"}
    | {"notes", "note", "report"}
)


class _CountColumn(MofNCompleteColumn):
    """Done of total; empty for a stage that counts nothing."""

    def render(self, task: Task) -> Text:
        """Draw one cell."""
        return super().render(task) if task.total and task.total > 1 else Text()


class _LeftColumn(TimeRemainingColumn):
    """Time left; empty once a stage is over."""

    def render(self, task: Task) -> Text:
        """Draw one cell."""
        return Text() if task.finished else Text("ETA ") + super().render(task)


class _Display:
    """Bars on a terminal, plain lines elsewhere; used by `with`, while there is something to show.

    Parameters
    ----------
    columns
        What a bar has.
    quiet
        Show nothing but errors.
    """

    def __init__(self, *columns: ProgressColumn, quiet: bool) -> None:
        console = Console(stderr=True)
        self._quiet = quiet
        self._live = console.is_terminal and not quiet
        self._progress = Progress(*columns, console=console, disable=not self._live)
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _say(self, lines: Iterable[str]) -> None:
        for line in () if self._quiet else lines:
            if self._live:
                self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)
            else:
                print(line, file=sys.stderr, flush=True)  # noqa: T201


class ProgressDisplay(_Display):
    """Listens to events: one bar per stage on a terminal, plain lines elsewhere.

    Parameters
    ----------
    quiet
        Show nothing but errors.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__(
            TextColumn("{task.description:<18}"),
            BarColumn(bar_width=24),
            _CountColumn(),
            TextColumn("{task.fields[rate]:>13}"),
            TimeElapsedColumn(),
            _LeftColumn(),
            quiet=quiet,
        )
        self._began: dict[str, tuple[float, int]] = {}
        self._printed_s = 0.0

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if self._quiet:
            return
        if event.kind == "start":
            self._began[event.stage] = (time.monotonic(), event.done)
        if self._live:
            self._draw(event)
        else:
            self._write(event)
        if event.stage == "plan" and event.facts:
            self._say(_aligned(plan_rows(event.facts)))

    def _draw(self, event: Event) -> None:
        if event.kind == "note":
            self._say([event.text])
            return
        name = STAGE_NAMES.get(event.stage, event.stage)
        if event.stage not in self._bars:
            total = event.total or None
            self._bars[event.stage] = self._progress.add_task(name, total=total, rate="")
        bar = self._bars[event.stage]
        if event.kind == "finish":
            total = event.total or 1
            self._progress.update(bar, total=total, completed=total)
        elif event.total:
            self._progress.update(
                bar, total=event.total, completed=event.done, rate=self._rate(event)
            )

    def _rate(self, event: Event) -> str:
        per_s = self._per_s(event)
        return f"{per_s:.1f} {UNITS.get(event.stage, '')}/s" if per_s else ""

    def _per_s(self, event: Event) -> float:
        """Units per second since the stage began; 0 while it is too early to say."""
        began_s, done = self._began.get(event.stage, (time.monotonic(), event.done))
        seconds = time.monotonic() - began_s
        return (event.done - done) / seconds if seconds > 0.5 else 0.0

    def _write(self, event: Event) -> None:
        name = STAGE_NAMES.get(event.stage, event.stage)
        now_s = time.monotonic()
        if event.kind == "note":
            self._say([event.text if event.stage == "workers" else f"{name}: {event.text}"])
        elif event.kind == "finish":
            began_s, _ = self._began.get(event.stage, (now_s, 0))
            self._say([f"{name}: done in {now_s - began_s:.1f} s"])
        elif event.kind == "advance" and now_s - self._printed_s > PLAIN_EVERY_S:
            self._printed_s = now_s
            per_s = self._per_s(event)
            parts = [f"{name}: {event.done}/{event.total}"]
            if per_s:
                left = duration((event.total - event.done) / per_s)
                parts += [self._rate(event), f"{left} left"]
            self._say([", ".join(parts)])


class ArchiveDisplay(_Display):
    """Listens to an archive: a bar for all slides, one for each slide in work; plain lines else.

    Parameters
    ----------
    total
        Number of slides.
    quiet
        Show nothing but errors.
    """

    def __init__(self, total: int, *, quiet: bool = False) -> None:
        super().__init__(
            TextColumn("{task.description:<42}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            quiet=quiet,
        )
        self._total, self._ended = total, 0
        self._all = self._progress.add_task("slides", total=total)

    def __call__(self, name: str, event: Event) -> None:
        """Show what happened to a slide."""
        if event.stage == "archive":
            self._of_slide(name, event)
        elif event.kind == "note":
            self._say([f"{name}: {event.text}" if name else event.text])
        elif self._live and name in self._bars:
            stage = STAGE_NAMES.get(event.stage, event.stage)
            self._progress.update(
                self._bars[name],
                description=f"  {name[:20]:<20} {stage}",
                completed=event.done,
                total=event.total or None,
            )

    def _of_slide(self, name: str, event: Event) -> None:
        if event.kind == "start" and self._live:
            self._bars[name] = self._progress.add_task(f"  {name[:20]}", total=None)
        if event.kind in ("finish", "note") and name in self._bars:
            self._progress.remove_task(self._bars.pop(name))
        if event.kind == "finish":
            self._ended += 1
            self._progress.update(self._all, completed=self._ended)
            self._say([f"[{self._ended}/{self._total}] {name}: {event.text}"])
        elif event.text:
            self._say([f"{name}: {event.text}"])


def print_archive(
    counts: Mapping[str, int], failed: Iterable[tuple[str, str, str]], record: Path
) -> None:
    """Print the end of an archive on stdout: counts, then each failure and what to do about it."""
    words = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    print(*_aligned([("slides", words or "none"), ("record", str(record))]), sep="\n")  # noqa: T201
    for name, error, following in failed:
        print(f"failed  {name}: {error}\n        next: {following}")  # noqa: T201


def plan_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Word the facts of a plan in four rows: slide, model, plan, needs."""
    um = facts["pixel size um"]
    slide = f"{facts['format']}, {facts['size']}, {um} um/px (from {facts['pixel size from']})"
    out = f"{facts['output size']}, {facts['output pixel size um']} um/px"
    needs = (
        f"about {duration(60 * facts['minutes (about)'])}, "
        f"{megabytes(facts['memory MB (about)'])} of memory, "
        f"{megabytes(facts['scratch disk MB'])} of scratch disk, "
        f"{megabytes(facts['output MB (about)'])} for the output"
    )
    return [
        ("slide", slide),
        ("model", _model(facts)),
        ("plan", f"{facts['tiles'].replace(' of ', ' tiles of ', 1)} -> {out}"),
        *([("seeds", str(facts["seeds"]))] if "seeds" in facts else []),
        ("needs", needs),
        *(("note", note) for note in facts.get("notes", ())),
    ]


def _model(facts: Mapping[str, Any]) -> str:
    """Word model and solver; a bundle without a net has none."""
    if "solver" not in facts:
        return str(facts["bundle"])
    n = facts["evaluations a tile"]
    return f"{facts['bundle']}; {facts['solver']}, {n} evaluation{'s'[: n > 1]} a tile"


def summary_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Word the end of a run: files, flags, time per stage, and whatever else is in the summary."""
    picture = f"{summary['size']}, {summary['pixel size um']} um/px, {summary['tiles']} tiles"
    if "bytes" in summary:
        picture += f", {megabytes(summary['bytes'] / 1e6)}"
    seconds = dict(summary["seconds"])
    whole = seconds.pop("in all")
    times = [f"{STAGE_NAMES.get(name, name)} {duration(s)}" for name, s in seconds.items()]
    others = [(n, _plain(v)) for n, v in summary.items() if n not in SUMMARY_KEYS and v]
    return [
        ("virtual IHC", str(summary["output"])),
        ("picture", picture),
        ("run folder", str(summary["run folder"])),
        *others,
        ("flags", "; ".join(summary.get("flags", ())) or "none"),
        ("time", f"{', '.join(times)}; beside each other, {duration(whole)} in all"),
        *_what_next(summary),
        ("note", str(summary["note"])),
    ]


def _what_next(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name the page, and the command for what is not there yet."""
    if "report" in summary:
        shown = [("report", str(summary["report"]))]
        command = ["wsi-stain", "quantify", str(summary["output"])]
    else:
        shown, command = [], ["wsi-stain", "report", str(summary["run folder"])]
    return [*shown, ("next", shlex.join(command))]


def print_summary(summary: Mapping[str, Any]) -> None:
    """Print the end of a run on stdout."""
    print(*_aligned(summary_rows(summary)), sep="\n")  # noqa: T201


def print_facts(facts: Iterable[tuple[str, object]]) -> None:
    """Print name and value, aligned; a list or mapping on one line, an empty one not at all."""
    rows = [(name, _plain(value)) for name, value in facts if value not in ([], {}, "")]
    print(*_aligned(rows), sep="\n")  # noqa: T201


def duration(seconds: float) -> str:
    """Word a time: "0.4 s", "64 s", "12 min", "3.1 h"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def megabytes(size_mb: float) -> str:
    """Word a size: "0.3 MB", "31.9 MB", "1.8 GB"."""
    return f"{size_mb:.1f} MB" if size_mb < 1000 else f"{size_mb / 1000:.1f} GB"


def _aligned(rows: Iterable[tuple[str, str]]) -> list[str]:
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    return [f"{name:<{width}}  {value}" for name, value in rows]


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(part)}" for name, part in value.items())
    if isinstance(value, list) and len(value) == 2 and all(isinstance(v, int) for v in value):
        return " x ".join(map(str, value))
    if isinstance(value, list | tuple):
        return ", ".join(_plain(part) for part in value)
    return str(value)
