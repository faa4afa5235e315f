"""What a person sees in the terminal: bars with ETA, plain lines, one-line errors.

In: events, errors, tables. Out: text on stdout and stderr. Not here: any decision.

Facts and results go to stdout, progress and errors to stderr, so that pipes stay clean.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from wsi_stain.manifest import Event

__all__ = ["ProgressDisplay", "print_facts"]

STAGE_NAMES = {
    "run": "note",
    "plan": "find tissue, plan",
    "fill": "read patches",
    "overview": "keep H&E pictures",
    "fit": "fit color",
    "translate": "translate",
    "write": "stitch and write",
    "validate": "validate",
    "report": "report",
    "train": "train",
}
PLAIN_EVERY_S = 15.0


class ProgressDisplay:
    """Listens to events: one bar per stage on a terminal, plain lines elsewhere.

    Parameters
    ----------
    quiet
        Show nothing but errors.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        console = Console(stderr=True)
        self._live = console.is_terminal and not quiet
        self._progress = Progress(
            TextColumn("{task.description:<18}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:>12}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
        )
        self._bars: dict[str, TaskID] = {}
        self._began: dict[str, tuple[float, int]] = {}
        self._printed_s = 0.0

    def __enter__(self) -> ProgressDisplay:
        self._progress.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.__exit__(kind, error, trace)

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

    def _draw(self, event: Event) -> None:
        if event.kind == "note":
            self._progress.console.print(event.text, highlight=False, markup=False)
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
        began, done = self._began.get(event.stage, (time.monotonic(), event.done))
        seconds = time.monotonic() - began
        return f"{(event.done - done) / seconds:.1f} /s" if seconds > 0.5 else ""

    def _write(self, event: Event) -> None:
        name = STAGE_NAMES.get(event.stage, event.stage)
        now = time.monotonic()
        if event.kind == "note":
            print(f"{name}: {event.text}", file=sys.stderr, flush=True)  # noqa: T201
        elif event.kind == "finish":
            began, _ = self._began.get(event.stage, (now, 0))
            print(f"{name}: done in {now - began:.1f} s", file=sys.stderr, flush=True)  # noqa: T201
        elif event.kind == "advance" and now - self._printed_s > PLAIN_EVERY_S:
            self._printed_s = now
            began, done = self._began.get(event.stage, (now, event.done))
            rate = (event.done - done) / max(1e-9, now - began)
            left_s = (event.total - event.done) / rate if rate > 0 else float("inf")
            text = f"{name}: {event.done}/{event.total}, {rate:.2f} /s, {left_s:.0f} s left"
            print(text, file=sys.stderr, flush=True)  # noqa: T201


def print_facts(facts: Iterable[tuple[str, object]]) -> None:
    """Print name and value, aligned; a list or mapping on one line, an empty one not at all."""
    rows = [(name, _plain(value)) for name, value in facts if value not in ([], {}, "")]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")  # noqa: T201


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(part)}" for name, part in value.items())
    if isinstance(value, list) and len(value) == 2 and all(isinstance(v, int) for v in value):
        return " x ".join(map(str, value))
    if isinstance(value, list | tuple):
        return ", ".join(_plain(part) for part in value)
    return str(value)
