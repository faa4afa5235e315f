"""When a device's memory does not hold a batch, the batch is halved.

Room 3 of 4. In: what is done to a batch of tiles. Out: its results, batch by batch. Not here: what
is done to a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from wsi_stain.errors import DeviceError

__all__ = ["Headroom", "is_out_of_memory"]

T = TypeVar("T")
# The CPU's allocator and the libraries of CUDA have no class of their own for it.
WORDS = ("can't allocate memory", "CUDA out of memory", "STATUS_ALLOC_FAILED")


class Headroom:
    """How many tiles a batch may have in this process.

    A batch that did not fit once is not tried again: memory that was tight stays so.

    Parameters
    ----------
    batch_tiles
        As asked for.

    Attributes
    ----------
    batch_tiles
        As it fits so far.
    """

    def __init__(self, batch_tiles: int) -> None:
        self.batch_tiles = batch_tiles

    def run(self, work: Callable[[NDArray[np.int64]], T], n_tiles: int) -> list[T]:
        """Do all tiles in batches of one shape.

        Parameters
        ----------
        work
            Takes the numbers of a batch's tiles, int64 (batch_tiles,); called again with fewer
            after memory ran out.
        n_tiles
            How many there are; the last batch is filled up by repeating the last one.

        Returns
        -------
        list
            Results, batch by batch.

        Raises
        ------
        DeviceError
            Not even one tile fits.
        """
        results: list[T] = []
        first = 0
        while first < n_tiles:
            rows = np.minimum(np.arange(first, first + self.batch_tiles), n_tiles - 1)
            try:
                results.append(work(rows))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.batch_tiles == 1:
                    raise _too_little(error) from error
            else:
                first += self.batch_tiles
                continue
            # Here the error is gone, and with it what its frames held on to.
            self.batch_tiles //= 2
            torch.cuda.empty_cache()
        return results


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error of torch or numpy means: no memory for that much at once."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in WORDS)


def _too_little(error: BaseException) -> DeviceError:
    return DeviceError(
        f"The device has too little memory for one tile: {' '.join(str(error).split())[:200]}",
        hint="End what else uses it, try fewer workers (--workers 1), or --device cpu.",
    )
