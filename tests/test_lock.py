"""One run per output, whatever dies."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from wsi_stain.errors import OutputError
from wsi_stain.lock import Holder, OutputLock

HOLD = """
    import sys
    from pathlib import Path
    from wsi_stain.lock import OutputLock
    with OutputLock(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
"""
# Counts how often it found itself alone, and fails loudly when it was not.
COMPETE = """
    import os, sys, time
    from pathlib import Path
    from wsi_stain.errors import OutputError
    from wsi_stain.lock import OutputLock
    lock, inside = Path(sys.argv[1]), Path(sys.argv[1] + ".inside")
    entered = 0
    end_s = time.monotonic() + 1.5
    while time.monotonic() < end_s:
        try:
            with OutputLock(lock):
                os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                time.sleep(0.0005)
                inside.unlink()
                entered += 1
        except OutputError:
            pass
    print(entered)
"""


@contextmanager
def other_process(code: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def write_holder(path: Path, **changes: object) -> Holder:
    holder = msgspec.structs.replace(Holder.this_process(), **changes)
    path.write_bytes(msgspec.json.encode(holder))
    return holder


def test_file_names_the_holder_and_goes_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with OutputLock(path) as lock:
        holder = msgspec.json.decode(path.read_bytes(), type=Holder)
        assert (holder.host, holder.pid) == (socket.gethostname(), os.getpid())
        assert lock.note == ""
    assert not path.exists()
    with OutputLock(path):
        assert path.exists()


def test_lock_goes_when_the_block_raises(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), OutputLock(tmp_path / "lock"):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


def test_second_process_is_told_who_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with other_process(HOLD, path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(OutputError) as caught, OutputLock(path):
            pass
        text = str(caught.value)
        assert f"process {process.pid} on host {socket.gethostname()} since 20" in text
        assert "--out" in text
        assert "delete" not in text
        assert caught.value.exit_code == 8
        assert path.exists()


def test_same_process_cannot_hold_it_twice(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with OutputLock(path):
        with pytest.raises(OutputError, match=f"process {os.getpid()} "), OutputLock(path):
            pass
        assert path.exists()


def test_lock_is_taken_over_when_its_process_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with other_process(HOLD, path) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
        process.wait()
        assert path.exists()
        with OutputLock(path) as lock:
            assert f"Took over the lock of process {process.pid} " in lock.note
            assert msgspec.json.decode(path.read_bytes(), type=Holder).pid == os.getpid()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc (Linux)")
def test_lock_is_taken_over_when_its_number_belongs_to_a_later_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    write_holder(path, process_start="another boot:1")
    with OutputLock(path) as lock:
        assert "no longer runs" in lock.note


def test_lock_is_kept_when_the_kernel_forgot_it_but_the_process_lives(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    write_holder(path)
    words = rf"If `ps -p {os.getpid()}` shows that it is dead: rm "
    with pytest.raises(OutputError, match=words), OutputLock(path):
        pass
    assert path.exists()


def test_lock_of_another_host_is_never_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    write_holder(path, host="elsewhere", pid=2**22 + 1)
    before = path.read_bytes()
    with pytest.raises(OutputError) as caught, OutputLock(path):
        pass
    assert "on host elsewhere since" in str(caught.value)
    look = f"ssh elsewhere ps -p {2**22 + 1}"
    assert f"If `{look}` shows that it is dead: rm {path}" in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"{", b"\xff" * 9000])
def test_lock_is_taken_when_its_process_died_while_signing(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "lock"
    path.write_bytes(content)
    with OutputLock(path):
        assert msgspec.json.decode(path.read_bytes(), type=Holder).pid == os.getpid()


def test_doubt_is_noted_when_the_file_system_has_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handle: int, operation: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    path = tmp_path / "lock"
    with OutputLock(path) as lock:
        assert "has no locks" in lock.note
        with pytest.raises(OutputError, match="Another run works"), OutputLock(path):
            pass
    assert not path.exists()


def test_error_is_clear_when_the_folder_is_missing(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="cannot be made: No such file"),
        OutputLock(tmp_path / "no" / "lock"),
    ):
        pass


def test_only_one_is_inside_when_processes_compete(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with other_process(COMPETE, path) as one, other_process(COMPETE, path) as two:
        counts = [int(process.communicate(timeout=60)[0]) for process in (one, two)]
        assert [one.returncode, two.returncode] == [0, 0]
    assert min(counts) > 0
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("pid", [0, -1, 2**31, 10**30])
def test_lock_is_taken_when_its_number_can_be_of_no_process(tmp_path: Path, pid: int) -> None:
    path = tmp_path / "lock"
    here = socket.gethostname()
    path.write_text(f'{{"host":"{here}","pid":{pid},"process_start":"x","since_utc":"y"}}')
    with OutputLock(path):
        assert msgspec.json.decode(path.read_bytes(), type=Holder).pid == os.getpid()
