"""Atomic writes: whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
from pathlib import Path

import pytest

from wsi_stain.errors import OutputError
from wsi_stain.files import atomic_write_bytes, replace_durably, sha256_file


def test_content_and_mode_when_new_and_when_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    atomic_write_bytes(path, b"one")
    path.chmod(0o600)
    umask = os.umask(0o022)
    try:
        atomic_write_bytes(path, b"two")
    finally:
        os.umask(umask)
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert os.listdir(tmp_path) == ["a.json"]


def test_old_file_stays_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    atomic_write_bytes(path, b"old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"a\.json cannot be written: No space left") as caught:
        atomic_write_bytes(path, b"new")
    assert caught.value.exit_code == 8
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_error_names_the_file_when_the_folder_is_missing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"no/b\.json cannot be written: No such file"):
        atomic_write_bytes(tmp_path / "no" / "b.json", b"")


def test_data_is_flushed_before_the_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        real_fsync(handle)

    def replace(source: Path, target: Path) -> None:
        calls.append("replace")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    part = tmp_path / "x.part"
    part.write_bytes(b"x")
    replace_durably(part, tmp_path / "x")
    assert calls == ["file", "replace", "folder"]
    assert os.listdir(tmp_path) == ["x"]


def test_readers_see_whole_files_when_many_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a"
    contents = [bytes([65 + i]) * 50_000 for i in range(4)]
    atomic_write_bytes(path, contents[0])

    def write(content: bytes) -> None:
        for _ in range(5):
            atomic_write_bytes(path, content)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert path.read_bytes() in contents
    assert os.listdir(tmp_path) == ["a"]


def test_digest_equals_hashlib(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(range(256)) * 3000)
    assert sha256_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()
