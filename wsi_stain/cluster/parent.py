"""The process that workers of this machine are forked from: it imports for all of them, once.

In: nothing. Out: a fork server, made ready in the background. Not here: workers, tasks.

A worker that is spawned takes seconds of a core to import torch and Dask; a fork has them, and
shares their memory. Nothing is used in the parent, so there is nothing that a fork could break: no
thread, no device, no open file. CUDA cannot be forked once it is in use; the parent never uses it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress

from wsi_stain.cluster.quiet import worker_environment
from wsi_stain.config import ClusterConfig

__all__ = ["begin_early", "prepare_parent", "start_method", "warm_up"]

# By name: to import them here would be to wait for them here.
IMPORTS = (
    "distributed.nanny",
    "wsi_stain.slides.fill",
    "wsi_stain.translate.worker",
    "wsi_stain.cluster.settled",
)


def warm_up(config: ClusterConfig) -> None:
    """Begin with the imports of the workers that `config` will ask for, if they are to be forks."""
    if config.executor == "dask" and start_method() == "forkserver":
        prepare_parent()


@contextmanager
def begin_early(config: ClusterConfig) -> Iterator[None]:
    """Begin with those imports before it is known whether workers are needed.

    Where the work fails, the parent ends at once: what it imports is for nobody, and until it is
    done whoever reads this process's output would wait for it.
    """
    warm_up(config)
    with ExitStack() as on_error:
        on_error.callback(_end_parent)
        yield
        on_error.pop_all()


def start_method() -> str:
    """Tell how workers are started: forks where that is safe, on Linux."""
    return "forkserver" if sys.platform == "linux" else "spawn"


def prepare_parent() -> None:
    """Start the parent if there is none; it ends with this process, and after its last worker."""
    from multiprocessing import forkserver, resource_tracker

    # First, by itself: where it has to be started it lets interrupts in again.
    resource_tracker.ensure_running()
    forkserver.set_forkserver_preload(list(IMPORTS))
    with _environment(worker_environment()), _without_interrupts():
        forkserver.ensure_running()


def _end_parent() -> None:
    """End the parent if there is one; the next `prepare_parent` starts another."""
    from multiprocessing import forkserver

    # The standard library has no public way: it lets the server live as long as its starter.
    pid = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    if pid is not None:
        with suppress(ProcessLookupError):  # it has ended by itself
            os.kill(pid, signal.SIGTERM)


@contextmanager
def _environment(more: Mapping[str, str]) -> Iterator[None]:
    """Set variables for a process that is started meanwhile."""
    before = {name: os.environ.get(name) for name in more}
    os.environ.update(more)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Keep Ctrl-C, which reaches the whole process group, from a process started meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
