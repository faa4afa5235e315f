"""How many heaps the threads of this process share.

In: nothing. Out: nothing. Not here: workers, which have settings of their own (`quiet`).

The C library of Linux gives threads heaps of their own, up to eight for each core, and what is
freed on one stays with it. A process that reads, stitches and encodes in threads then holds the
largest arrays of each of them.
"""

from __future__ import annotations

import ctypes
import os
import sys

__all__ = ["share_heaps"]

M_ARENA_MAX = -8  # malloc.h
HEAPS = 2


def share_heaps() -> None:
    """Let all threads share two heaps, unless the environment says how many.

    For a process of our own alone, before it has threads; does nothing where the C library has no
    such setting.
    """
    asked = "MALLOC_ARENA_MAX" in os.environ or "arena_max" in os.environ.get("GLIBC_TUNABLES", "")
    if asked or sys.platform != "linux":
        return
    # Of glibc; musl has one heap.
    settle = getattr(ctypes.CDLL(None), "mallopt", None)
    if settle is not None:
        settle(M_ARENA_MAX, HEAPS)
