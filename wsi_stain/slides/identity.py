"""Is this a file worth opening, and which one is it?

Room 1 of 4. In: a path. Out: an error, or a digest of the content. Not here: image formats.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from wsi_stain.errors import SlideError

__all__ = ["check_file", "companions", "content_digest"]

BLOCK_BYTES = 1 << 20
_FORMATS = "Give an H&E slide: SVS, NDPI, MRXS, SCN, BIF, DICOM, OME-TIFF or tiled TIFF."


def check_file(path: Path) -> None:
    """Refuse what can't be a slide, without opening it (a pipe would block for ever).

    Raises
    ------
    SlideError
        Missing, a folder, a pipe or device, empty, or not readable.
    """
    try:
        status = path.stat()
        if (path / "zarr.json").is_file():  # an OME-Zarr is a folder
            return
    except OSError as error:
        raise SlideError(f"Slide {path} cannot be opened: {error.strerror}.") from error
    if stat.S_ISDIR(status.st_mode):
        raise SlideError(
            f"Slide {path} is a folder.",
            hint="Give one file (the .mrxs beside its folder, one .dcm of a series), or the folder "
            "to wsi-stain batch.",
        )
    if not stat.S_ISREG(status.st_mode):
        raise SlideError(f"Slide {path} is a pipe or a device, not a file.", hint=_FORMATS)
    if status.st_size == 0:
        raise SlideError(f"Slide {path} is empty (0 bytes).", hint="Copy it again.")
    if not os.access(path, os.R_OK):
        raise SlideError(f"Slide {path} cannot be opened: no permission to read it.")
    if path.suffix.lower() == ".mrxs" and not path.with_suffix("").is_dir():
        raise SlideError(
            f"Slide {path} lacks the folder {path.stem}/ beside it, which holds its pixels.",
            hint="Copy the folder, too: an MRXS slide is a file and a folder of the same name.",
        )


def content_digest(path: Path) -> str:
    """Identify a slide by content, cheaply: it may have 10 GB.

    SHA-256 over the size and the first, middle and last MiB. For MRXS and DICOM, whose pixels lie
    in further files, over the names and sizes of those too; for OME-Zarr over its metadata and
    the names and sizes of all its files.

    Returns
    -------
    str
        64 hex digits.

    Raises
    ------
    SlideError
        The system refuses to read it.
    """
    try:
        return _folder_digest(path) if path.is_dir() else _file_digest(path)
    except SlideError:
        raise
    except OSError as error:
        raise SlideError(
            f"Slide {path} cannot be read: {error.strerror or error}.", hint="Copy it again."
        ) from error


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    size_bytes = path.stat().st_size
    digest.update(str(size_bytes).encode())
    with path.open("rb") as file:
        for start in (0, (size_bytes - BLOCK_BYTES) // 2, size_bytes - BLOCK_BYTES):
            file.seek(max(0, start))
            digest.update(file.read(BLOCK_BYTES))
    for companion in companions(path):
        digest.update(f"{companion.name}:{companion.stat().st_size}\n".encode())
    return digest.hexdigest()


def _folder_digest(folder: Path) -> str:
    digest = hashlib.sha256((folder / "zarr.json").read_bytes())
    for file in _files(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        digest.update(f"{name}:{file.stat().st_size}\n".encode())
    return digest.hexdigest()


def companions(path: Path) -> list[Path]:
    """List the further files that an MRXS or DICOM slide's pixels lie in.

    Raises
    ------
    SlideError
        One of them is a pipe or a device.
    """
    if path.suffix.lower() == ".mrxs":
        return _files(path.with_suffix("").glob("*"))
    if path.suffix.lower() == ".dcm":
        return _files(path.parent.glob("*.dcm"))
    return []


def _files(entries: Iterable[Path]) -> list[Path]:
    """Leave folders out, and sort; what is neither folder nor file would block who opens it."""
    files = sorted(entry for entry in entries if not entry.is_dir())
    if odd := [file for file in files if not file.is_file()]:
        raise SlideError(f"Part {odd[0]} of a slide is a pipe, a device or a broken link.")
    return files
