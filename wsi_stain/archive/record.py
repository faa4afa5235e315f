"""The files of an archive: `archive.json` for programs, `archive.csv` for tables, those of parts.

In: what came of each slide. Out: both files, replaced whole at each change. Not here: decisions.

Neither file holds a folder's name or anything of a patient beside the slides' own names.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from wsi_stain.archive.jobs import Part
from wsi_stain.archive_record import (
    ARCHIVE_FILE,
    ArchiveRecord,
    ArchiveSlide,
    read_archive,
    write_archive,
)
from wsi_stain.files import atomic_write_bytes

__all__ = ["ArchiveFiles", "merge_parts", "save"]


@dataclass(frozen=True)
class ArchiveFiles:
    """Paths of an archive, or of one part of it.

    Attributes
    ----------
    out
        The output folder.
    part
        Which part; parts have files of their own.
    """

    out: Path
    part: Part

    @property
    def record(self) -> Path:
        """What came of each slide."""
        return self.out / f"archive{self.part.tag}.json"

    @property
    def status(self) -> Path:
        """How far it is."""
        return self.out / f"status{self.part.tag}.json"

    @property
    def metrics(self) -> Path:
        """How far it is, for Prometheus."""
        return self.out / f"archive{self.part.tag}.prom"

    @property
    def lock(self) -> Path:
        """One client per part."""
        return self.out / f"archive{self.part.tag}.lock"

    @property
    def logs(self) -> Path:
        """A log per slide."""
        return self.out / "logs"


def save(path: Path, record: ArchiveRecord) -> None:
    """Write the record and, beside it, its table.

    Raises
    ------
    OutputError
        The folder refuses.
    """
    write_archive(path, record)
    atomic_write_bytes(path.with_suffix(".csv"), _table(record.slides))


def merge_parts(out: Path, total: int) -> None:
    """Write `archive.json` for all parts that have begun; the last part to end sees all.

    Raises
    ------
    OutputError
        A part's file is damaged, or the folder refuses.
    """
    paths = [ArchiveFiles(out, Part(index, total)).record for index in range(1, total + 1)]
    parts = [read_archive(path) for path in paths if path.exists()]
    ended = len(parts) == total and all(part.state == "finished" for part in parts)
    merged = ArchiveRecord(
        state="finished" if ended else "running",
        begun_utc=min(part.begun_utc for part in parts),
        finished_utc=max(part.finished_utc for part in parts) if ended else "",
        bundle=parts[0].bundle,
        slides=sorted(_slides(parts), key=lambda slide: slide.name),
    )
    save(out / ARCHIVE_FILE, merged)


def _slides(parts: Iterable[ArchiveRecord]) -> Iterable[ArchiveSlide]:
    return (slide for part in parts for slide in part.slides)


def _table(slides: Sequence[ArchiveSlide]) -> bytes:
    text = io.StringIO()
    names = [field.name for field in msgspec.structs.fields(ArchiveSlide)]
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(names)
    for slide in slides:
        values = [getattr(slide, name) for name in names]
        rows.writerow(["; ".join(v) if isinstance(v, list) else v for v in values])
    return text.getvalue().encode()
