"""The log of one slide: a line per stage, remark and failure, with the time.

In: events, errors. Out: `logs/<name>.log`, appended to over all attempts. Not here: bars.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TextIO

from wsi_stain.archive.wording import told
from wsi_stain.errors import WsiStainError
from wsi_stain.files import cannot_write
from wsi_stain.manifest import Event

__all__ = ["SlideLog"]

ADVANCE_EVERY_S = 30.0


class SlideLog:
    """Appends lines to a file, which the first one makes; used by `with`.

    Parameters
    ----------
    path
        The log; its folder exists.
    clean
        Takes out of a line what must not be kept.
    """

    def __init__(self, path: Path, clean: Callable[[str], str]) -> None:
        self._path, self._clean = path, clean
        self._advanced_s = time.monotonic()
        self._file: TextIO | None = None

    def __enter__(self) -> SlideLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def hear(self, event: Event) -> None:
        """Write an event, unless it is one of many."""
        if event.kind == "advance":
            if time.monotonic() - self._advanced_s < ADVANCE_EVERY_S:
                return
            self._advanced_s = time.monotonic()
        count = f" {event.done}/{event.total}" if event.total else ""
        self.say(f"{event.stage} {event.kind}{count} {event.text}".rstrip())

    def fail(self, error: BaseException) -> None:
        """Write an error: one line of ours, the whole trace of a bug."""
        self.say(f"failed: {told(error)}")
        if not isinstance(error, WsiStainError):
            self._write(traceback.format_exception(error))

    def say(self, text: str) -> None:
        """Write a line."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._write([f"{now} {text}\n"])

    def _write(self, lines: Iterable[str]) -> None:
        try:
            if self._file is None:
                self._file = self._path.open("a", encoding="utf-8", buffering=1)
            self._file.write(self._clean("".join(lines)))
        except OSError as error:
            raise cannot_write(self._path, error) from error
