"""The lines of `results.jsonl`: one per method and image, each with all that made it.

In: rows. Out: lines on the disk, and back. Not here: measuring, averaging.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec

from wsi_stain.errors import OutputError
from wsi_stain.files import atomic_write_bytes

__all__ = ["Row", "append_row", "picture_path", "read_rows", "write_rows"]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One method on one image.

    Attributes
    ----------
    key
        SHA-256 of everything the numbers depend on: a row with the same key is not made again.
    method, kind
        Name in the table; a variant of the model, or a null row.
    group, image, slide
        Image group of the recipe; its name and the stem; slide or patient.
    paired, aligned
        Whether there is a reference, and whether it lies pixel on pixel.
    mpp, width_px, height_px
        Of the judged crop.
    bundle, digests
        Name and digest of the bundle; SHA-256 of the image files, H&E first.
    settings
        Seed, solver, guidance, start image, tiling, device: what the method was told.
    whites
        How the glass of H&E and reference was found.
    seconds, peak_memory_mb
        Cost of painting; largest memory of the process so far.
    scores
        Metric to value.
    """

    key: str
    method: str
    kind: Literal["variant", "null"]
    group: str
    image: str
    slide: str
    paired: bool
    aligned: bool
    metric_version: int
    mpp: float
    width_px: int
    height_px: int
    bundle: dict[str, str]
    digests: tuple[str, ...]
    settings: dict[str, Any]
    whites: dict[str, Any]
    seconds: float
    peak_memory_mb: float
    scores: dict[str, float | None]


def read_rows(path: Path) -> list[Row]:
    """Read the rows of an earlier run; none where there is no file.

    A last line without its end is what a killed run leaves; it is dropped.

    Raises
    ------
    OutputError
        A whole line cannot be decoded.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(msgspec.json.decode(line, type=Row))
        except msgspec.DecodeError as error:
            raise OutputError(
                f"{path}, line {number}, is no result of this version: {error}.",
                hint="Give a new folder with --out, or delete the file.",
            ) from error
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write all rows anew, whole or not at all."""
    atomic_write_bytes(path, b"".join(msgspec.json.encode(row) + b"\n" for row in rows))


def append_row(path: Path, row: Row) -> None:
    """Add one row; it is in the file, and not in a buffer, when this returns."""
    try:
        with path.open("ab") as stream:
            stream.write(msgspec.json.encode(row) + b"\n")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}.") from error


def picture_path(out: Path, image: str, method: str) -> Path:
    """Give the place of a painted picture; `method` "he" and "reference" are the inputs."""
    return out / "pictures" / image / f"{method}.png"
