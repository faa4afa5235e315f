"""Which errors are tried again, and how they are told."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from wsi_stain.archive.weather import may_pass
from wsi_stain.archive.wording import next_command, told, without_folders
from wsi_stain.errors import (
    BundleError,
    DeviceError,
    DiskFullError,
    LockedError,
    MppUnknownError,
    NoTissueError,
    OutputError,
    PlanError,
    SlideError,
)
from wsi_stain.files import cannot_write


def caused(error: Exception, number: int) -> Exception:
    error.__cause__ = OSError(number, "said so")
    return error


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (SlideError("damaged"), True),
        (caused(SlideError("stale"), errno.ESTALE), True),
        (caused(SlideError("missing"), errno.ENOENT), False),
        (MppUnknownError("none"), False),
        (NoTissueError("none"), False),
        (PlanError("large"), False),
        (BundleError("none"), False),
        (DeviceError("workers died"), True),
        (LockedError("held"), True),
        (OutputError("exists already"), False),
        (caused(OutputError("hiccup"), errno.EIO), True),
        (caused(OutputError("read-only"), errno.EROFS), False),
        (cannot_write(Path("/x"), OSError(errno.ENOSPC, "full")), False),
        (OSError(errno.EIO, "hiccup"), True),
        (FileNotFoundError(errno.ENOENT, "gone"), False),
        (ZeroDivisionError("a bug"), False),
    ],
)
def test_error_that_may_pass_is_told_from_one_that_stays(error: Exception, again: bool) -> None:
    assert may_pass(error) is again
    assert isinstance(cannot_write(Path("/x"), OSError(errno.ENOSPC, "")), DiskFullError)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Slide /data/Jane Doe/a.svs is empty.", "Slide a.svs is empty."),
        (
            "Lock /home/me/out/a.run/lock (0.5 um/px by mpp) and/or",
            "Lock lock (0.5 um/px by mpp) and/or",
        ),
        ("no path: 3/16 slides, 1/2", "no path: 3/16 slides, 1/2"),
        ("'/mnt/x/y.tif' cut", "'y.tif' cut"),
    ],
)
def test_folders_are_left_out(text: str, left: str) -> None:
    assert without_folders(text, [Path("/data/Jane Doe"), Path()]) == left


def test_next_command_can_be_typed() -> None:
    slide, out = Path("my slides/a.svs"), Path("out")
    assert "--mpp 0.25" in next_command(MppUnknownError("x"), slide, out)
    assert next_command(SlideError("x"), slide, out) == "wsi-stain info 'my slides/a.svs'"
    assert next_command(OutputError("x", hint="Use --overwrite."), slide, out) == "Use --overwrite."
    assert next_command(ValueError("x"), slide, out) == "the same command"
    assert told(ValueError("two\nlines")) == "ValueError: two lines"
