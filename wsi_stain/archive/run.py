"""The archive's run: one client, its books, its slides.

In: jobs, orders. Out: pyramids, the archive's record. Not here: how slides share the workers
(`lanes`), how one slide is translated.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from wsi_stain.archive.jobs import Job
from wsi_stain.archive.lanes import ArchiveListener, Lanes, Orders, Workers
from wsi_stain.archive.ledger import Ledger
from wsi_stain.archive.watch import Watch, last_sign
from wsi_stain.archive_record import ArchiveRecord
from wsi_stain.errors import LockedError
from wsi_stain.evaluate.archive_page import write_archive_page
from wsi_stain.files import cannot_write
from wsi_stain.lock import OutputLock
from wsi_stain.manifest import Event

__all__ = ["run_archive"]


def run_archive(jobs: Sequence[Job], orders: Orders, listener: ArchiveListener) -> ArchiveRecord:
    """Translate all slides that are not done; goes on where an earlier run stopped.

    Parameters
    ----------
    jobs
        The slides of this archive, or of this part of it.
    orders
        See `Orders`.
    listener
        Hears what happens; called by one thread at a time.

    Returns
    -------
    ArchiveRecord
        What came of each slide; failures are in it, not raised.

    Raises
    ------
    LockedError
        Another client works on this archive, or on this part of it.
    DiskFullError, OutputError
        The archive's own files cannot be written.
    DeviceError
        No workers can be started.
    """
    files = orders.files
    try:
        files.logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(files.logs, error) from error
    with ExitStack() as stack:
        try:
            stack.enter_context(OutputLock(files.lock))
        except LockedError as error:
            raise LockedError(error.message, hint=f"{error.hint} {last_sign(files)}") from error
        ledger = Ledger(files, jobs, Path(orders.base.bundle).name)
        watch = Watch(files, jobs)

        def listen(name: str, event: Event) -> None:
            watch.hear(name, event)
            listener(name, event)

        lanes = Lanes(jobs, orders, ledger, listen)
        ended = False
        try:
            lanes.work(Workers(orders.base.cluster, lanes.hear_workers))
            ended = not lanes.was_cut_short
        finally:
            ledger.close(ended=ended)
            watch.write("finished" if ended else "stopped")
        write_archive_page(files.out)
    return ledger.record
