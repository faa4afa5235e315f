"""What is said while workers are waited for: a line now and then, not one a second.

In: how many are there. Out: lines. Not here: how long is waited.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["Hear", "Waiting", "silent"]

# Hears a line for a person.
Hear = Callable[[str], None]

FIRST_S = 3.0
EVERY_S = 60.0


def silent(text: str) -> None:
    """Hear nothing."""


class Waiting:
    """Says that workers are waited for; for several threads.

    Parameters
    ----------
    hear
        Hears the lines.
    expected
        How many workers will come.
    look
        Tells what they are waiting for themselves, or nothing: asked for each line.
    now
        The clock, s.
    """

    def __init__(
        self,
        hear: Hear,
        expected: int,
        look: Callable[[], str] = str,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hear, self._expected, self._look, self._now = hear, expected, look, now
        self._due_s = now() + FIRST_S
        self._waits = False
        self._turn = threading.Lock()

    def tell(self, there: int) -> None:
        """Say how many are there, if it is time to."""
        with self._turn:
            if self._now() < self._due_s:
                return
            self._due_s = self._now() + EVERY_S
            self._waits = True
        why = self._look()
        of = f"{there} of {self._expected}" if self._expected else str(there)
        self._hear(f"waiting for workers: {of}{', ' if why else ''}{why}")

    def end(self, there: int) -> None:
        """Say that the waiting is over, if it was spoken of."""
        with self._turn:
            waited, self._waits = self._waits, False
        if waited:
            self._hear(f"workers: {there} of {max(there, self._expected)} are there")
