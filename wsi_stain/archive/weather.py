"""Which errors may pass by themselves: a hiccup of the storage, a worker that died.

In: an error. Out: whether to try again. Not here: when.
"""

from __future__ import annotations

import errno

from wsi_stain.errors import (
    DeviceError,
    DiskFullError,
    LockedError,
    MppUnknownError,
    OutputError,
    SlideError,
    WsiStainError,
)

__all__ = ["may_pass"]

# What no waiting mends.
_SETTLED = frozenset({errno.ENOENT, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS})


def may_pass(error: BaseException) -> bool:
    """Tell whether the same work may succeed a little later.

    A damaged slide and a slide whose server hiccups cannot be told apart, so both are tried
    again; a missing one is not.
    """
    if isinstance(error, MppUnknownError | DiskFullError):
        return False
    if isinstance(error, LockedError | DeviceError):
        return True
    cause = error.__cause__ if isinstance(error, WsiStainError) else error
    system = isinstance(cause, OSError) and not isinstance(cause, WsiStainError)
    if system and getattr(cause, "errno", None) in _SETTLED:
        return False
    return isinstance(error, SlideError) or (system and isinstance(error, OutputError | OSError))
