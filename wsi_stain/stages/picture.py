"""The picture is stitched and encoded while shards are still being made.

In: shards, as they get done. Out: the pyramid. Not here: how bands are stitched, how a pyramid is
written (`write`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from wsi_stain.config import BundleSpec
from wsi_stain.manifest import Event
from wsi_stain.write.omezarr import write_omezarr
from wsi_stain.write.stitch import stitch_bands
from wsi_stain.write.tiff import write_pyramid

if TYPE_CHECKING:
    from wsi_stain.stages.run import Run

__all__ = ["Gate", "PictureWriter", "StoppedError"]

WRITERS = {"ome-tiff": write_pyramid, "ome-zarr": write_omezarr}


class StoppedError(Exception):
    """The run ended before the picture: ends the writer's thread, and no user sees it."""


class Gate:
    """Holds the writer back until a shard is done; the last rows until all of the run is.

    Attributes
    ----------
    waited_s
        How long the writer stood here, seconds.
    """

    def __init__(self) -> None:
        self.waited_s = 0.0
        self._open: set[int] = set()
        self._all_open = False
        self._stopped = False
        self._moved = threading.Condition()

    def open(self, shard: int) -> None:
        """Say that a shard is done."""
        with self._moved:
            self._open.add(shard)
            self._moved.notify_all()

    def open_all(self) -> None:
        """Say that all shards are done, and that it is recorded."""
        with self._moved:
            self._all_open = True
            self._moved.notify_all()

    def stop(self) -> None:
        """Send the writer home."""
        with self._moved:
            self._stopped = True
            self._moved.notify_all()

    def wait(self, shard: int | None = None) -> None:
        """Wait for a shard; `None`: for all.

        Raises
        ------
        StoppedError
            The run is over.
        """
        began_s = time.monotonic()
        with self._moved:
            self._moved.wait_for(lambda: self._stopped or self._all_open or (shard in self._open))
            if self._stopped:
                raise StoppedError
        self.waited_s += time.monotonic() - began_s


class PictureWriter:
    """Writes the pyramid in a thread, band by band, as the shards under a band get done.

    Used by `with`: on leaving waits for the finished pyramid, or, after an error, for the thread
    to remove what it began.

    Memory bound: that of `stitch_bands` and of the writer, beside the workers'.

    Parameters
    ----------
    run
        The run.

    Attributes
    ----------
    gate
        Opened shard by shard by who makes them.
    """

    def __init__(self, run: Run) -> None:
        self.gate = Gate()
        self._run = run
        self._read = run.store.tiles_in_order("ihc")
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="picture")
        self._done: Future[float] | None = None

    def __enter__(self) -> PictureWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None and self._done is not None:
                self._run.written(self._done.result())
        finally:
            # After an error, and after Ctrl-C while waiting for the last rows.
            self.gate.stop()
            self._pool.shutdown()

    def start(self) -> None:
        """Begin; the first band waits for its shards."""
        self._done = self._pool.submit(self._write)

    def check(self) -> None:
        """Raise what ended the thread, if it ended: no shard need be made for a full disk."""
        if self._done is not None and self._done.done():
            self._done.result()

    def _write(self) -> float:
        """Write; gives the seconds it took, without those spent at the gate."""
        run = self._run
        scale = run.plan.grid.scale
        write = WRITERS[run.config.write.format]
        facts = write(
            run.files.output,
            scale.size_out,
            self._bands(),
            scale.mpp_out,
            run.config.write,
            name=run.files.name,
        )
        return facts.seconds - self.gate.waited_s

    def _bands(self) -> Iterator[NDArray[np.uint8]]:
        run = self._run
        height_px = run.plan.grid.scale.size_out.height_px
        run.listener(Event("write", "start", total=height_px))
        done_px = 0
        for band in stitch_bands(run.plan.grid, self._tile, white_level(run.plan.spec)):
            done_px += len(band)
            if done_px == height_px:
                # The writer names its file after the last row: not before the record is closed.
                self.gate.wait()
            yield band
            run.listener(Event("write", "advance", done=done_px, total=height_px))

    def _tile(self, index: int) -> NDArray[np.uint8]:
        self.gate.wait(index // self._run.plan.grid.shard_tiles)
        return self._read(index)


def white_level(spec: BundleSpec) -> tuple[int, int, int]:
    """Give the white of the bundle's output as grey levels."""
    red, green, blue = (round(level) for level in spec.color.output_white)
    return red, green, blue
