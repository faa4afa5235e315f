"""Heaps of this process, as the C library counts them; each case is a process of its own."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

HAS_SETTING = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_info")
SCRIPT = """
import ctypes, sys, threading
from wsi_stain.cluster.heaps import share_heaps
if "share" in sys.argv:
    share_heaps()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
together = threading.Barrier(8)
def take():
    together.wait()  # a thread that ends leaves its heap to the next
    libc.malloc(ctypes.c_size_t(50_000))
    together.wait()
threads = [threading.Thread(target=take) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
"""


@pytest.mark.skipif(not HAS_SETTING, reason="the C library has no malloc_info")
@pytest.mark.parametrize(
    ("arguments", "asked", "least", "most"),
    [((), "", 5, 9), (("share",), "", 1, 2), (("share",), "4", 3, 4)],
)
def test_threads_share_two_heaps_or_as_many_as_were_asked_for(
    arguments: tuple[str, ...], asked: str, least: int, most: int
) -> None:
    names = ("MALLOC_", "GLIBC_TUNABLES")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(names)}
    if asked:
        environment["MALLOC_ARENA_MAX"] = asked
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert least <= done.stdout.count("<heap nr=") <= most
