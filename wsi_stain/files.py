"""Atomic, durable writes: a reader sees the old file or the new one, never a part of it.

In: bytes, paths. Out: files. Not here: what the files mean.

A write goes to a temporary file in the same folder, is flushed to the disk, then takes the name
by `os.replace`; the folder is flushed last, so that a power cut cannot lose the name.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

from wsi_stain.errors import OutputError

__all__ = ["PART_SUFFIX", "atomic_write_bytes", "flush_to_disk", "replace_durably", "sha256_file"]

PART_SUFFIX = ".part"
FILE_MODE = 0o644


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
    try:
        try:
            # O_EXCL: the name is ours alone, so no other writer can change what we replace with.
            handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE)
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        replace_durably(part, path)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror}.",
            hint="Check free space and permissions, or choose another folder with --out.",
        ) from error


def replace_durably(part: Path, path: Path) -> None:
    """Give a finished temporary file its final name, on the disk and not only in the cache.

    Parameters
    ----------
    part
        Finished file, in the folder of `path`; gone afterwards, also on failure.
    path
        Final name; replaced if it exists.

    Raises
    ------
    OSError
        As the file system says.
    """
    try:
        flush_to_disk(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
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
