"""The record of an archive: what came of each of many slides in one output folder.

In: what happened to slides. Out: `archive.json`, and back. Not here: running them (`archive`), the
page that shows them (`evaluate/archive_page`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from wsi_stain.errors import OutputError
from wsi_stain.files import atomic_write_bytes
from wsi_stain.manifest import MANIFEST_SCHEMA, read_json

__all__ = ["ARCHIVE_FILE", "ArchiveRecord", "ArchiveSlide", "read_archive", "write_archive"]

ARCHIVE_FILE = "archive.json"


class ArchiveSlide(msgspec.Struct, kw_only=True):
    """One slide of an archive; paths are relative to the folder that holds the record."""

    name: str
    state: Literal["pending", "running", "done", "skipped", "failed"] = "pending"
    output: str = ""  # the pyramid
    run: str = ""  # the run folder
    tiles: int = 0
    seconds: float = 0.0
    flags: list[str] = []  # doubts about this result, for a machine
    notes: list[str] = []  # remarks for a person
    error: str = ""  # one line
    next: str = ""  # the command to type next
    # Of tissue pixels in the fields that the run kept, 0 to 1; None: not measured.
    positive_fraction: float | None = None


class ArchiveRecord(msgspec.Struct, kw_only=True, omit_defaults=False):
    """The content of `archive.json`, the record of many slides in one output folder."""

    schema: int = MANIFEST_SCHEMA
    state: Literal["running", "finished"] = "running"
    begun_utc: str
    finished_utc: str = ""
    bundle: str
    slides: list[ArchiveSlide] = []

    def of_state(self, state: str) -> list[ArchiveSlide]:
        """Give the slides in a state."""
        return [slide for slide in self.slides if slide.state == state]


def write_archive(path: Path, record: ArchiveRecord) -> None:
    """Replace `archive.json` at `path`, whole."""
    text = msgspec.json.format(msgspec.json.encode(record), indent=2)
    atomic_write_bytes(path, text + b"\n")


def read_archive(path: Path) -> ArchiveRecord:
    """Read `archive.json`.

    Raises
    ------
    OutputError
        Missing, damaged, or written by a later version.
    """
    hint = "Give the output folder of wsi-stain batch."
    raw = read_json(path, "Archive record", hint)
    try:
        return msgspec.convert(raw, ArchiveRecord)
    except msgspec.ValidationError as error:
        raise OutputError(f"Archive record {path} is damaged: {error}.", hint=hint) from error
