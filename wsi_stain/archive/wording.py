"""How a slide's failure is told: without folders' names, and with the next thing to type.

In: errors. Out: text. Not here: which errors are tried again.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from wsi_stain.errors import MppUnknownError, NoTissueError, SlideError, WsiStainError

__all__ = ["next_command", "told", "without_folders"]

# A path from the root with at least one folder; a unit such as um/px has nothing before its slash.
_ABSOLUTE = re.compile(r"(?<![\w.:/])/(?:[^\s/:;,'\"()]+/)+(?=[^\s/])")


def without_folders(text: str, folders: Iterable[Path] = ()) -> str:
    """Leave of each path its last name: the rest may tell of people and projects.

    Parameters
    ----------
    text
        A message.
    folders
        Those known to occur in it, which may hold blanks.
    """
    names = {str(form) for folder in folders for form in (folder, folder.absolute())}
    for name in sorted(names - {".", "/"}, key=len, reverse=True):
        text = text.replace(name + "/", "")
    return _ABSOLUTE.sub("", text)


def told(error: BaseException) -> str:
    """Word an error in one line: ours as it is, a bug with its kind."""
    if isinstance(error, WsiStainError):
        return " ".join(error.message.split())
    return " ".join(f"{type(error).__name__}: {error}".split())


def next_command(error: BaseException, slide: Path, out: Path) -> str:
    """Say what to type next about a failed slide."""
    file, folder = shlex.quote(str(slide)), shlex.quote(str(out))
    if isinstance(error, MppUnknownError):
        return f"wsi-stain translate {file} --out {folder} --mpp 0.25"
    if isinstance(error, NoTissueError):
        return f"wsi-stain plan {file} --tissue-min-fraction 0"
    if isinstance(error, SlideError):
        return f"wsi-stain info {file}"
    return error.hint if isinstance(error, WsiStainError) and error.hint else "the same command"
