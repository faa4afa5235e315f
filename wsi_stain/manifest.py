"""Events, and the record of a run that a person can read and a program can repeat.

In: what happened. Out: events, `manifest.json`. Not here: decisions, images.

Engines emit `Event`s; only the command line draws bars.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Event", "Listener"]


@dataclass(frozen=True)
class Event:
    """Something a person may want to see.

    Attributes
    ----------
    stage
        Name of the stage: "fill", "fit", "translate", "write", "validate", "train" ...
    kind
        "start" (total is set), "advance" (done units), "note" (text), "finish".
    done, total
        Units of work; what a unit is depends on the stage (tiles, output rows, samples).
    text
        One line for a person, may be empty.
    """

    stage: str
    kind: str
    done: int = 0
    total: int = 0
    text: str = ""


Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Listen to nothing (the default of all engines)."""
