"""Files that are no slide get one clear line, never a hang or a traceback of another library."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import tifffile

from wsi_stain.errors import SlideError
from wsi_stain.geometry import Size
from wsi_stain.slides.image import SlideSource
from wsi_stain.slides.slide_facts import check_sizes

Pixels = npt.NDArray[np.uint8]


def _refusal(path: Path) -> str:
    with pytest.raises(SlideError) as caught:
        SlideSource.open(path, mpp=0.5)
    error = caught.value
    assert error.exit_code == 3
    assert str(path) in error.message
    assert "\n" not in str(error)
    return error.message


def test_open_refuses_when_file_is_missing(tmp_path: Path) -> None:
    assert "No such file" in _refusal(tmp_path / "none.svs")


def test_open_refuses_when_file_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "empty.svs"
    path.touch()
    assert "empty" in _refusal(path)


def test_open_refuses_when_path_is_a_folder(tmp_path: Path) -> None:
    assert "folder" in _refusal(tmp_path)


@pytest.mark.timeout(20)
def test_open_refuses_at_once_when_file_is_a_pipe(tmp_path: Path) -> None:
    path = tmp_path / "pipe.svs"
    os.mkfifo(path)
    assert "pipe" in _refusal(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_open_refuses_when_permission_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "locked.svs"
    path.write_bytes(b"II*\0")
    path.chmod(0)
    assert "permission" in _refusal(path)


@pytest.mark.parametrize("name", ["notes.svs", "notes.tif", "notes.mrxs", "notes.ndpi"])
def test_open_refuses_when_text_is_renamed(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("this is not a slide\n" * 500)
    _refusal(path)


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.98])
def test_open_refuses_when_slide_is_truncated(
    tmp_path: Path, synthetic_slide: Path, kept: float
) -> None:
    data = synthetic_slide.read_bytes()
    path = tmp_path / "cut.tiff"
    path.write_bytes(data[: int(len(data) * kept)])
    _refusal(path)


@pytest.mark.parametrize("kept", [0.1, 0.6, 0.7, 0.9])
def test_open_refuses_when_real_svs_is_truncated(
    tmp_path: Path, shared_data: Path, kept: float
) -> None:
    data = (shared_data / "slides/CMU-1-Small-Region.svs").read_bytes()
    path = tmp_path / "cut.svs"
    path.write_bytes(data[: int(len(data) * kept)])
    _refusal(path)


def test_open_refuses_when_only_later_pictures_were_cut_off(
    tmp_path: Path, he_pixels: Pixels, write_slide: Callable[..., Path]
) -> None:
    # OpenSlide takes the levels that are left for the whole slide.
    path = write_slide(tmp_path / "s.svs", he_pixels, 0.5, levels=3, kind="aperio", codec="jpeg")
    with tifffile.TiffFile(path) as tiff:
        last = tiff.pages[-1].offset
    os.truncate(path, last - 10)
    assert "is truncated" in _refusal(path)


@pytest.mark.parametrize("head", [b"II*\0", b"II+\0", b"MM\0*"])
def test_open_refuses_when_tiff_is_garbage_after_its_magic(tmp_path: Path, head: bytes) -> None:
    path = tmp_path / "noise.tif"
    path.write_bytes(head + np.random.default_rng(3).bytes(5000))
    _refusal(path)


def test_open_refuses_when_the_codec_is_a_list(tmp_path: Path, he_pixels: Pixels) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, he_pixels[:300, :300], photometric="rgb", rowsperstrip=64)
    with tifffile.TiffFile(path) as tiff:
        at = tiff.pages.first.tags[259].offset
    with path.open("r+b") as file:
        file.seek(at + 4)
        file.write((2).to_bytes(4, "little"))
    assert "as its codec" in _refusal(path)


def test_open_refuses_when_places_of_tiles_are_no_integers(
    tmp_path: Path, he_pixels: Pixels
) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, he_pixels[:300, :300], photometric="rgb", tile=(128, 128))
    with tifffile.TiffFile(path) as tiff:
        at = tiff.pages.first.tags[324].offset
    with path.open("r+b") as file:
        file.seek(at + 2)
        file.write((11).to_bytes(2, "little"))  # float32
    assert "damaged" in _refusal(path)


def test_open_refuses_when_picture_has_16_bits(tmp_path: Path) -> None:
    path = tmp_path / "deep.tif"
    pixels = np.zeros((300, 300, 3), np.uint16)
    tifffile.imwrite(path, pixels, photometric="rgb", tile=(128, 128))
    assert "8-bit RGB" in _refusal(path)


def test_open_refuses_when_channels_are_planes(tmp_path: Path) -> None:
    path = tmp_path / "planes.ome.tif"
    pixels = np.zeros((4, 256, 256), np.uint8)
    tifffile.imwrite(path, pixels, photometric="minisblack", metadata={"axes": "CYX"})
    assert "CYX" in _refusal(path)


def test_open_refuses_when_strip_is_too_large_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsi_stain.slides.tiff_read.LARGEST_SEGMENT_BYTES", 100_000)
    path = tmp_path / "strip.tif"
    pixels = np.full((300, 300, 3), 200, np.uint8)
    tifffile.imwrite(path, pixels, photometric="rgb", rowsperstrip=300)
    with pytest.raises(SlideError, match="not tiled") as caught:
        SlideSource.open(path, mpp=0.5)
    assert "vips tiffsave" in caught.value.hint


def test_open_refuses_when_slide_is_fluorescence(shared_data: Path) -> None:
    assert "not brightfield" in _refusal(shared_data / "slides/fluorescence_dapi.ndpi")


@pytest.mark.parametrize("name", ["pathml_small.dcm", "dicom_jpeg", "dicom_j2k"])
def test_open_tells_why_when_dicom_is_refused(shared_data: Path, name: str) -> None:
    path = shared_data / "slides" / name
    assert "refused by OpenSlide" in _refusal(path if path.is_file() else min(path.iterdir()))


def test_check_sizes_refuses_when_a_side_is_absurd() -> None:
    check_sizes(Path("a"), [Size(2**31 - 1, 1)])
    for size in (Size(0, 5), Size(5, -1), Size(2**31, 5)):
        with pytest.raises(SlideError, match="cannot be"):
            check_sizes(Path("a"), [size])
