"""Atomic, durable writes: a reader sees the old file or the new one, never a part of it.

In: bytes, paths. Out: files. Not here: what the files mean.

A write goes to a temporary file in the same folder, is flushed to the disk, then takes the name
by `os.replace`; the folder is flushed last, so that a power cut cannot lose the name.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wsi_stain.errors import DiskFullError, OutputError, WsiStainError

__all__ = [
    "OLD_SUFFIX",
    "PART_SUFFIX",
    "atomic_write_bytes",
    "cannot_write",
    "flush_to_disk",
    "flush_tree",
    "land_folder",
    "refuse_existing",
    "remove_any",
    "replace_durably",
    "sha256_any",
    "sha256_file",
    "size_bytes",
    "writing",
]

PART_SUFFIX = ".part"
OLD_SUFFIX = f".old{PART_SUFFIX}"
FILE_MODE = 0o644
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write a small file so that it is whole or not there.

    The file gets mode 0644 less the umask, whatever mode an older file had.

    Parameters
    ----------
    path
        Final name; its folder exists.
    data
        The whole content.

    Raises
    ------
    OutputError
        The folder is missing or read-only, or the disk is full; the old file is untouched.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}{PART_SUFFIX}")
    with writing(path):
        # O_EXCL: the name is ours alone, so no other writer can change what we replace with.
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
            replace_durably(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def writing(path: Path, what: str = "") -> Iterator[None]:
    """Give refusals of the file system in a block their words, as `cannot_write`.

    Raises
    ------
    OutputError
        In place of an `OSError`; errors of ours pass, though some are of that class, too.
    """
    try:
        yield
    except WsiStainError:
        raise
    except OSError as error:
        raise cannot_write(path, error, what) from error


def cannot_write(path: Path, error: OSError, what: str = "") -> OutputError:
    """Word a refusal of the file system: which file, why, and how much space there is.

    Parameters
    ----------
    path
        File or folder that was written to; it need not exist.
    error
        What the system said.
    what
        Words for the thing that could not be written; empty: the path.

    Returns
    -------
    OutputError
        A `DiskFullError` where space or quota is at its end.
    """
    reason = f"{what or path} cannot be written: {error.strerror or error}"
    if error.errno not in NO_SPACE:
        hint = "Check the folder and its permissions, or choose another one: --out DIR."
        return OutputError(f"{reason}.", hint=hint)
    there = next(folder for folder in path.absolute().parents if folder.is_dir())
    return DiskFullError(
        f"{reason} ({shutil.disk_usage(there).free:,} bytes free).",
        hint="Free space, then type the same command again: it goes on from here. Or choose "
        "another folder: --out DIR.",
    )


def make_folder(path: Path) -> None:
    """Make a folder, and those above it; one that is there is fine.

    Raises
    ------
    OutputError
        It cannot be made, or a file is there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise cannot_write(path, error) from error
        raise OutputError(
            f"Folder {path} cannot be made: {error.strerror}.",
            hint="Choose a folder that can be written.",
        ) from error


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Refuse to write where something lies, unless it may be replaced.

    Raises
    ------
    OutputError
        It exists.
    """
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists already.", hint="Use --overwrite to replace it.")


def replace_durably(part: Path, path: Path) -> None:
    """Give a finished temporary file its final name, on the disk and not only in the cache.

    Parameters
    ----------
    part
        Finished file, in the folder of `path`; on failure it stays under this name.
    path
        Final name; replaced if it exists.

    Raises
    ------
    OSError
        As the file system says.
    """
    flush_to_disk(part)
    os.replace(part, path)
    flush_to_disk(path.parent)


def sha256_file(path: Path) -> str:
    """Digest a file, hex, in constant memory."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def flush_to_disk(path: Path) -> None:
    """Force a file, or a folder's list of names, out of the cache and on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_tree(folder: Path) -> None:
    """Force a folder, all its files and folders out of the cache and on the disk."""
    for path in (folder, *folder.rglob("*")):
        flush_to_disk(path)


def land_folder(part: Path, path: Path) -> None:
    """Give a finished folder, already flushed, its final name.

    A folder cannot replace another, so an old one steps aside first: for a moment there is none
    under the name, never a part of one.

    Raises
    ------
    OSError
        As the file system says.
    """
    old = path.with_name(path.name + OLD_SUFFIX)
    remove_any(old)
    if path.exists():
        path.replace(old)
    part.replace(path)
    flush_to_disk(path.parent)
    remove_any(old)


def remove_any(path: Path) -> None:
    """Remove a file or a whole folder; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def size_bytes(path: Path) -> int:
    """Measure a file, or all files of a folder."""
    files = path.rglob("*") if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files if file.is_file())


def sha256_any(path: Path) -> str:
    """Digest a file, or a folder: then of the lines ``<digest>  <name in the folder>``, sorted."""
    if not path.is_dir():
        return sha256_file(path)
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    lines = "".join(f"{sha256_file(path / name)}  {name}\n" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()
