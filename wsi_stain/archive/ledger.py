"""The archive's books while it runs: what came of each slide so far, kept on disk.

In: what threads say. Out: `archive.json`, `archive.csv`, at most every few seconds. Not here:
progress within a slide (`watch`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from wsi_stain.archive.jobs import WHOLE, Job
from wsi_stain.archive.record import ArchiveFiles, merge_parts, save
from wsi_stain.archive_record import ArchiveRecord, ArchiveSlide, read_archive
from wsi_stain.layout import RunFiles

__all__ = ["Ledger"]

SAVE_EVERY_S = 5.0


class Ledger:
    """Holds the record of an archive; for several threads.

    Parameters
    ----------
    files
        Where it is kept.
    jobs
        All slides, in the order of the source.
    bundle
        Name of the model that is used where the list names none.
    """

    def __init__(self, files: ArchiveFiles, jobs: Iterable[Job], bundle: str) -> None:
        self._files = files
        before = _slides_before(files)
        slides = [before.get(job.name, ArchiveSlide(name=job.name)) for job in jobs]
        self._slides = {slide.name: slide for slide in slides}
        self.record = ArchiveRecord(begun_utc=_now_utc(), bundle=bundle, slides=slides)
        self._saved_s = -SAVE_EVERY_S
        self._turn = threading.Lock()
        self._save()

    def enter(self, job: Job, files: RunFiles | None = None, **facts: Any) -> None:
        """Set what is known of a slide; with `files` where its output lies."""
        with self._turn:
            slide = self._slides[job.name]
            if files is not None:
                facts |= {"output": files.output.name, "run": files.folder.name}
            for name, value in facts.items():
                setattr(slide, name, value)
            if time.monotonic() - self._saved_s > SAVE_EVERY_S:
                self._save()

    def known(self, job: Job) -> ArchiveSlide:
        """Give what is known of a slide, from earlier clients too."""
        return self._slides[job.name]

    def close(self, *, ended: bool) -> None:
        """Write the last state; `ended` where no slide was left out."""
        with self._turn:
            for slide in self.record.slides:
                slide.state = "pending" if slide.state == "running" else slide.state
            if ended:
                self.record.state, self.record.finished_utc = "finished", _now_utc()
            self._save()
            if self._files.part.total > 1:
                merge_parts(self._files.out, self._files.part.total)

    def _save(self) -> None:
        save(self._files.record, self.record)
        self._saved_s = time.monotonic()


def _slides_before(files: ArchiveFiles) -> dict[str, ArchiveSlide]:
    """Carry on what an earlier client counted; states and errors are found anew."""
    whole = ArchiveFiles(files.out, WHOLE)
    path = next((path for path in (files.record, whole.record) if path.exists()), None)
    if path is None:
        return {}
    return {
        slide.name: ArchiveSlide(
            name=slide.name,
            tiles=slide.tiles,
            seconds=slide.seconds,
            positive_fraction=slide.positive_fraction,
        )
        for slide in read_archive(path).slides
    }


def _now_utc() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
