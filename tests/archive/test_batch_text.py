"""What `batch` prints for a person to type: with the folders that records leave out."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from wsi_stain.archive.wording import next_command, without_folders
from wsi_stain.errors import MppUnknownError, SlideError
from wsi_stain.verbs.batch import _runnable


@pytest.mark.parametrize("folder", ["slides", "my slides", "/data/x"])
@pytest.mark.parametrize("name", ["a.svs", "a b.svs", "it's.svs"])
@pytest.mark.parametrize("out", ["out", "my results/batch 1", "/data/y/out"])
@pytest.mark.parametrize("error", [MppUnknownError("no pixel size"), SlideError("damaged")])
def test_command_can_be_typed_where_the_record_names_no_folder(
    folder: str, name: str, out: str, error: Exception
) -> None:
    slide = Path(folder, name)
    command = next_command(error, slide, Path(out))
    recorded = without_folders(command, [slide.parent, Path(out)])
    assert folder not in recorded
    assert not Path(out).is_absolute() or out not in recorded
    typed = shlex.split(_runnable(recorded, slide, Path(out)))
    assert str(slide) in typed
    assert typed == shlex.split(command)
