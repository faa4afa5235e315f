"""Errors that a user can act on: what is wrong, where, and the next command to type.

In: nothing. Out: the `WsiStainError` family. Not here: printing (only the command line prints).

Each class owns one documented exit code. Each has a second, builtin base, so that code which
calls the library can catch `ValueError` or `OSError` as it would for any other library.
"""

from __future__ import annotations

import struct

__all__ = [
    "DAMAGE",
    "BatchError",
    "BundleError",
    "ConfigError",
    "DeviceError",
    "DiskFullError",
    "LockedError",
    "MppUnknownError",
    "NoTissueError",
    "OutputError",
    "PlanError",
    "SlideError",
    "WsiStainError",
    "in_one_line",
]

QUOTED_CHARS = 200
# What parsers, decoders and arithmetic raise on files that make no sense: all that a strange value
# can cause. What is caught by this name is told as damage of the file at hand.
DAMAGE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


class WsiStainError(Exception):
    """Base of all errors that `wsi-stain` raises on purpose.

    Parameters
    ----------
    message
        One line: what is wrong, which file, the numbers.
    hint
        The next thing to do, as a sentence or a command to type; may be empty.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".rstrip()

    def __reduce__(self) -> tuple[object, ...]:
        # Errors travel from worker processes: keyword-only `hint` needs this to survive pickling.
        return (_rebuild, (type(self), self.message, self.hint))


def _rebuild(cls: type[WsiStainError], message: str, hint: str) -> WsiStainError:
    return cls(message, hint=hint)


class ConfigError(WsiStainError, ValueError):
    """A flag, recipe or list that cannot be used (exit code 2)."""

    exit_code = 2


class SlideError(WsiStainError, OSError):
    """A slide that cannot be read (exit code 3)."""

    exit_code = 3


class MppUnknownError(SlideError):
    """No trustworthy pixel size in the slide, and none given (exit code 3)."""


class NoTissueError(WsiStainError, ValueError):
    """Nothing on the slide looks like tissue (exit code 4)."""

    exit_code = 4


class PlanError(WsiStainError, ValueError):
    """The plan does not fit the allowed memory or disk (exit code 5)."""

    exit_code = 5


class BundleError(WsiStainError, ValueError):
    """A model bundle that is missing, damaged or of an unknown version (exit code 6)."""

    exit_code = 6


class DeviceError(WsiStainError, RuntimeError):
    """A device, worker or cluster failed (exit code 7)."""

    exit_code = 7


class OutputError(WsiStainError, OSError):
    """An output that cannot be written, exists already, or is not sound (exit code 8)."""

    exit_code = 8


class DiskFullError(OutputError):
    """No space, or no quota, for an output (exit code 8): further work cannot be kept either."""


class LockedError(OutputError):
    """An output that another run works on (exit code 8)."""


class BatchError(WsiStainError, RuntimeError):
    """An archive run that ended with failed slides (exit code 9)."""

    exit_code = 9


def in_one_line(error: BaseException) -> str:
    """Quote an error of a library in one line, cut short; its class where it says nothing.

    That of the system comes without its path, which the caller names.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:QUOTED_CHARS] or type(error).__name__
