"""One run per output: a lock that names its holder and outlives no process.

In: a path. Out: a lock held while the `with` block runs. Not here: what is protected.

Two things hold the lock. The kernel's `flock` goes away with its process, whatever kills it, and
decides on one machine. The file's content (host, process, time) decides between machines, whose
file systems may keep each machine's `flock` to itself, and tells people whom to ask.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shlex
import socket
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec

from wsi_stain.errors import LockedError, OutputError
from wsi_stain.files import writing

__all__ = ["Holder", "OutputLock"]

LOCK_MODE = 0o644
READ_BYTES = 4096
NO_FLOCK = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP})


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds a lock.

    Attributes
    ----------
    host
        Name of the machine.
    pid
        Process number on it.
    process_start
        Tells a process from a later one with the same number; empty where the system does not say.
    since_utc
        When the lock was taken.
    """

    host: str
    pid: Annotated[int, msgspec.Meta(ge=1, lt=2**31)]  # to ask the system for any other fails
    process_start: str
    since_utc: str

    @classmethod
    def this_process(cls) -> Holder:
        """Describe this process."""
        pid = os.getpid()
        return cls(
            host=socket.gethostname(),
            pid=pid,
            process_start=_process_start(pid),
            since_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def is_here(self) -> bool:
        """Tell whether the holder ran on this machine."""
        return self.host == socket.gethostname()

    def is_alive(self) -> bool:
        """Tell whether the very same process still runs; only meaningful on its own machine."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # it exists and belongs to another user
        return _process_start(self.pid) == self.process_start

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host} since {self.since_utc}"


class OutputLock:
    """Hold a lock file while a block runs.

    A lock left by a process of this machine that no longer lives is taken over, with a `note`.
    A lock of another machine is never taken over: nothing here can tell whether it still works.

    Parameters
    ----------
    path
        The lock file; its folder exists. Removed at the end.
    flag
        How another folder is chosen, for the hint.

    Attributes
    ----------
    note
        What happened on the way that a person may want to know, else empty.

    Raises
    ------
    LockedError
        On entering: held by another process.
    OutputError
        On entering: the file cannot be made.
    """

    def __init__(self, path: Path, flag: str = "--out") -> None:
        self.path, self.flag = path, flag
        self.note = ""
        self._handle: int | None = None

    def __enter__(self) -> OutputLock:
        while self._handle is None:
            handle = self._open()
            try:
                self._claim(handle)
                if _is_file_at(handle, self.path):
                    self._handle = handle
            finally:
                if self._handle is None:
                    os.close(handle)
        return self

    def __exit__(self, *_: object) -> None:
        handle, self._handle = self._handle, None
        if handle is None:
            return
        # Unlink first: who opens the old file in between finds that it has lost its name.
        if _is_file_at(handle, self.path):
            self.path.unlink()
        os.close(handle)

    def _open(self) -> int:
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, LOCK_MODE)
        except OSError as error:
            raise OutputError(
                f"Lock {self.path} cannot be made: {error.strerror}.",
                hint=f"Choose a folder that can be written: {self.flag} DIR.",
            ) from error
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise OutputError(f"Lock {self.path} is no file.", hint="Delete it.")
        return handle

    def _claim(self, handle: int) -> None:
        """Take the kernel's lock, look at who was here before, and sign."""
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise self._held(_read_holder(handle), sure=True) from error
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
            self.note = f"The file system of {self.path} has no locks: start one run at a time."
        if not _is_file_at(handle, self.path):
            return
        holder = _read_holder(handle)
        if holder is not None:
            if not holder.is_here() or holder.is_alive():
                raise self._held(holder, sure=False)
            self.note = f"Took over the lock of {holder}, which no longer runs."
        with writing(self.path):
            os.ftruncate(handle, 0)
            os.pwrite(handle, msgspec.json.encode(Holder.this_process()) + b"\n", 0)
            os.fsync(handle)

    def _held(self, holder: Holder | None, *, sure: bool) -> LockedError:
        hint = f"Wait for it to end, or choose another folder with {self.flag}."
        if holder is None:
            return LockedError(
                f"Another run is just starting on this output ({self.path}).",
                hint=hint,
            )
        if not sure:
            look = ["ps", "-p", str(holder.pid)]
            look = look if holder.is_here() else ["ssh", holder.host, *look]
            remove = shlex.join(["rm", str(self.path)])
            hint += f" If `{shlex.join(look)}` shows that it is dead: {remove}"
        return LockedError(f"Another run works on this output: {holder} ({self.path}).", hint=hint)


def _is_file_at(handle: int, path: Path) -> bool:
    """Tell whether an open file still carries its name: its last holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _read_holder(handle: int) -> Holder | None:
    """Read who signed; `None` where nobody has, or a process died while signing."""
    try:
        return msgspec.json.decode(os.pread(handle, READ_BYTES, 0), type=Holder)
    except msgspec.DecodeError:
        return None


def _process_start(pid: int) -> str:
    """Give the boot and the clock tick at which a process started (Linux only), or nothing.

    A process that was killed but not yet collected by its parent counts as gone.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
    # The name in brackets may hold anything; the state follows it, the start is the 20th field.
    fields = stat.rpartition(b")")[2].split()
    return "" if fields[0] in (b"Z", b"X") else f"{boot}:{fields[19].decode()}"
