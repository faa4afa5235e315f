"""Training batches drawn ahead, so that a device never waits for a crop.

In: what draws a batch, the randomness of each step. Out: batches in the order of steps. Not here:
what a batch is, losses.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Drawn", "Feed"]


class Drawn(NamedTuple):
    """A batch, and the generator that drew it: the rest of its step goes on from there."""

    batch: Any
    rng: np.random.Generator


class Feed:
    """Draws the batches of the next steps in threads; in the caller's where there are none.

    Parameters
    ----------
    draw
        Draws one batch from a generator; called from several threads at once.
    seed_of
        Gives the randomness of a step.
    n_threads
        How many draw ahead, each one step: 0 draws when asked, which is best where the training
        itself needs the cores.

    Notes
    -----
    **Invariant**: a step's batch depends on its own randomness alone, so that the number of threads
    changes nothing.
    """

    def __init__(
        self,
        draw: Callable[[np.random.Generator], Any],
        seed_of: Callable[[int], np.random.SeedSequence],
        n_threads: int,
    ) -> None:
        self._draw, self._seed_of, self._n_threads = draw, seed_of, n_threads
        self._pool = ThreadPoolExecutor(n_threads, "crops") if n_threads else None
        self._ahead: deque[Future[Drawn]] = deque()

    def __enter__(self) -> Feed:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def take(self, step: int) -> Drawn:
        """Give the batch of a step; steps are asked for one after another."""
        if self._pool is None:
            return self._make(step)
        while len(self._ahead) <= self._n_threads:
            self._ahead.append(self._pool.submit(self._make, step + len(self._ahead)))
        return self._ahead.popleft().result()

    def _make(self, step: int) -> Drawn:
        rng = np.random.default_rng(self._seed_of(step))
        return Drawn(self._draw(rng), rng)
