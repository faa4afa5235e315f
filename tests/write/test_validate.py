"""Each planted fault is found and named; sound files pass."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import tifffile

from wsi_stain.config import WriteConfig
from wsi_stain.geometry import Region, Size
from wsi_stain.write.tiff import PyramidFacts
from wsi_stain.write.validate import Expected, Validation, validate

Pixels = npt.NDArray[np.uint8]
WritePixels = Callable[..., PyramidFacts]

# Of `he_pixels`: inside the two blobs, and in the lower left corner.
TISSUE = (Region(330, 360, 200, 200), Region(940, 580, 200, 200))
GLASS = (Region(10, 900, 200, 150),)
EXPECTED = Expected(
    size=Size(1403, 1101), mpp_out=0.5, tissue=TISSUE, glass=GLASS, white=(243.0, 243.0, 244.0)
)


@pytest.fixture
def sound(tmp_path: Path, he_pixels: Pixels, write_pixels: WritePixels) -> Path:
    """Pyramid of `he_pixels` without a fault, to break."""
    path = tmp_path / "a.ome.tiff"
    write_pixels(path, he_pixels, WriteConfig(tile_px=256))
    return path


def page_facts(path: Path, level: int = 0) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """IFD offset, tile offsets and tile byte counts of a level."""
    with tifffile.TiffFile(path) as tiff:
        page = cast(tifffile.TiffPage, tiff.pages[level])
        return page.offset, tuple(page.dataoffsets), tuple(page.databytecounts)


def tag_offset(path: Path, level: int, code: int) -> int:
    """Offset of a tag's values."""
    with tifffile.TiffFile(path) as tiff:
        return int(cast(tifffile.TiffPage, tiff.pages[level]).tags[code].valueoffset)


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def next_pointer(path: Path, ifd: int) -> int:
    with path.open("rb") as file:
        file.seek(ifd)
        (n_entries,) = struct.unpack("<Q", file.read(8))
    return ifd + 8 + 20 * int(n_entries)


def problem_of(path: Path, expected: Expected | None = EXPECTED) -> str:
    verdict = validate(path, expected=expected)
    assert not verdict.ok
    return "\n".join(verdict.problems)


@pytest.mark.parametrize("change", [{}, {"subsampling": "4:4:4"}, {"lossless": True}])
def test_file_is_sound_when_just_written(
    tmp_path: Path, he_pixels: Pixels, write_pixels: WritePixels, change: dict[str, Any]
) -> None:
    path = tmp_path / "a.ome.tiff"
    facts = write_pixels(path, he_pixels, WriteConfig(**change))
    verdict = validate(path, expected=EXPECTED)
    assert verdict == Validation(True, (), verdict.facts)
    assert verdict.facts["levels"] == [list(level) for level in facts.levels]
    assert verdict.facts["tiles"] == facts.n_tiles
    assert verdict.facts["decoded_tiles"] == facts.n_tiles
    assert verdict.facts["openslide"] == {"levels": 3, "mpp": pytest.approx(0.5)}
    assert (verdict.facts["tissue_regions"], verdict.facts["glass_regions"]) == (2, 1)


@pytest.mark.parametrize("size", [(1, 1), (3, 2049), (257, 256)])
def test_file_is_sound_when_sizes_are_odd(
    tmp_path: Path, write_pixels: WritePixels, size: tuple[int, int]
) -> None:
    noise = np.random.default_rng(0).normal(0, 9, (size[1], size[0], 3))
    pixels = np.clip(200 + cv2.GaussianBlur(noise, (0, 0), 3), 0, 255).astype(np.uint8)
    path = tmp_path / "a.ome.tiff"
    write_pixels(path, pixels, WriteConfig())
    assert validate(path, expected=Expected(size=Size(*size), mpp_out=0.5)).problems == ()


@pytest.mark.parametrize("quality", [1, 30])
def test_file_is_sound_when_quality_is_low(
    tmp_path: Path, he_pixels: Pixels, write_pixels: WritePixels, quality: int
) -> None:
    path = tmp_path / "a.ome.tiff"
    write_pixels(path, he_pixels, WriteConfig(quality=quality))
    assert validate(path).problems == ()


@pytest.mark.parametrize("level", [0, 1, 2])
def test_zeroed_tile_is_found(sound: Path, level: int) -> None:
    _, offsets, counts = page_facts(sound, level)
    overwrite(sound, offsets[-1], bytes(counts[-1]))
    n_tiles = len(offsets)
    words = f"level {level}: tile {n_tiles - 1} does not begin like its codec; 1 of {n_tiles}"
    assert words in problem_of(sound)


def test_missing_tile_is_found(sound: Path) -> None:
    values = tag_offset(sound, 0, 325)  # byte counts, 4 bytes each
    overwrite(sound, values + 4 * 7, struct.pack("<I", 0))
    assert "level 0: tile 7 is missing (no bytes); 1 of 30 so" in problem_of(sound)


def test_tile_without_end_is_found(sound: Path) -> None:
    _, offsets, counts = page_facts(sound)
    overwrite(sound, offsets[4] + counts[4] // 2, bytes(counts[4] - counts[4] // 2))
    assert "level 0: tile 4 has no end marker" in problem_of(sound)


def test_broken_tile_stream_is_found(sound: Path) -> None:
    _, offsets, counts = page_facts(sound, 2)
    overwrite(sound, offsets[0] + 2, bytes(counts[0] - 4))
    assert "level 2: tile 0 cannot be decoded" in problem_of(sound)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.97, 0.9999])
def test_cut_file_is_found(sound: Path, share: float) -> None:
    with sound.open("r+b") as file:
        file.truncate(int(share * sound.stat().st_size))
    problem = problem_of(sound)
    assert "cannot be read as TIFF" in problem or "end of the file" in problem


def test_file_is_a_problem_when_missing_or_foreign(tmp_path: Path) -> None:
    assert "no such file" in problem_of(tmp_path / "none.tiff")
    (tmp_path / "text.tiff").write_text("not a picture at all, but long enough for a header")
    assert "not a TIFF file" in problem_of(tmp_path / "text.tiff")


def test_level_missing_from_the_main_chain_is_found(sound: Path) -> None:
    ifd, _, _ = page_facts(sound)
    overwrite(sound, next_pointer(sound, ifd), bytes(8))
    assert "the main chain has 1 IFDs" in problem_of(sound)


def test_missing_subifds_are_found(sound: Path) -> None:
    with tifffile.TiffFile(sound) as tiff:
        tag = cast(tifffile.TiffPage, tiff.pages[0]).tags[330]
        offset = tag.offset
    overwrite(sound, offset, struct.pack("<H", 65000))  # a private tag instead
    assert "IFD 0 names no SubIFDs" in problem_of(sound)


@pytest.mark.parametrize(
    ("expected", "words"),
    [
        (Expected(mpp_out=0.501), "level 0: the resolution tags say 0.5 um/px instead of 0.501"),
        (Expected(mpp_out=0.501), "PhysicalSizeX is 0.5 um instead of 0.501"),
        (Expected(size=Size(1404, 1101)), "level 0 is 1403 x 1101 px instead of 1404 x 1101 px"),
    ],
)
def test_frame_is_a_problem_when_it_is_not_the_expected_one(
    sound: Path, expected: Expected, words: str
) -> None:
    assert words in problem_of(sound, expected)


def test_wrong_pixel_size_is_found_in_either_place(sound: Path) -> None:
    values = tag_offset(sound, 0, 282)
    overwrite(sound, values, struct.pack("<II", 10_000, 1))
    assert "level 0: the resolution tags say 1 um/px instead of 0.5" in problem_of(sound, None)


def edit_xml(path: Path, old: bytes, new: bytes) -> None:
    assert len(old) == len(new)
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b'SamplesPerPixel="3"', b'SamplesPerPixel="1"', "1 channels of 1 samples"),
        (b'PhysicalSizeY="0.5"', b'PhysicalSizeY="0.9"', "PhysicalSizeY is 0.9 um"),
        (b'PhysicalSizeX="0.5"', b'PhysicalZizeX="0.5"', "lacks PhysicalSizeX"),
        (b'PhysicalSizeXUnit="\xc2\xb5m"', b'PhysicalSizeXUnit="cmm"', "has units 'cmm'"),
        (b'SizeX="1403"', b'SizeX="1404"', "the OME-XML says 1404 x 1101 px, the TIFF 1403"),
        (b'Type="uint8"', b'Type="int16"', "says type 'int16'"),
        (b"</OME>", b"</OMX>", "the OME-XML in IFD 0 cannot be used: not XML"),
    ],
)
def test_fault_in_the_xml_is_found(sound: Path, old: bytes, new: bytes, words: str) -> None:
    edit_xml(sound, old, new)
    assert words in problem_of(sound)


def test_pink_tag_is_found(sound: Path) -> None:
    overwrite(sound, tag_offset(sound, 1, 530), struct.pack("<HH", 1, 1))
    assert "level 1 states subsampling (1, 1)" in problem_of(sound)


def swap_first_two(path: Path, level: int, code: int) -> None:
    """Swap the first two values of a tag, whatever their width."""
    with tifffile.TiffFile(path) as tiff:
        tag = cast(tifffile.TiffPage, tiff.pages[level]).tags[code]
        width = {3: 2, 4: 4, 16: 8}[int(tag.dtype)]
        offset = int(tag.valueoffset)
    data = path.read_bytes()[offset : offset + 2 * width]
    overwrite(path, offset, data[width:] + data[:width])


def test_swapped_tiles_of_a_level_are_found(sound: Path) -> None:
    swap_first_two(sound, 2, 324)
    swap_first_two(sound, 2, 325)
    assert "level 2 does not show level 1 at x" in problem_of(sound)


@pytest.mark.parametrize(
    ("color", "words"),
    [((243, 243, 244), "standard deviation 0.00"), ((128, 120, 110), "standard deviation 0.00")],
)
def test_blank_tissue_is_found(
    tmp_path: Path,
    he_pixels: Pixels,
    write_pixels: WritePixels,
    color: tuple[int, int, int],
    words: str,
) -> None:
    pixels = he_pixels.copy()
    region = TISSUE[1]
    ys, xs = slice(region.y_px, region.bottom_px), slice(region.x_px, region.right_px)
    pixels[ys.start - 16 : ys.stop + 16, xs.start - 16 : xs.stop + 16] = color
    write_pixels(tmp_path / "a.ome.tiff", pixels, WriteConfig())
    problem = problem_of(tmp_path / "a.ome.tiff")
    assert f"tissue at x 940, y 580, 200 x 200 px is blank: {words}" in problem
    assert "x 330" not in problem


def test_tissue_is_blank_when_it_is_only_noise_on_glass(
    tmp_path: Path, he_pixels: Pixels, write_pixels: WritePixels
) -> None:
    path = tmp_path / "a.ome.tiff"
    write_pixels(path, he_pixels, WriteConfig(lossless=True))
    expected = Expected(tissue=GLASS, white=(243.0, 243.0, 244.0))
    assert "is blank: mean optical density 0.00" in problem_of(path, expected)


def test_stained_glass_is_found(
    tmp_path: Path, he_pixels: Pixels, write_pixels: WritePixels
) -> None:
    pixels = he_pixels.copy()
    pixels[900:1050, 10:60] = np.minimum(pixels[900:1050, 10:60], (190, 160, 140))
    write_pixels(tmp_path / "a.ome.tiff", pixels, WriteConfig())
    problem = problem_of(tmp_path / "a.ome.tiff")
    assert "glass at x 10, y 900, 200 x 150 px is stained: 2" in problem


def test_real_files_of_others_are_judged_without_failing(shared_data: Path) -> None:
    """Sound OME-TIFFs of other writers fail only in OpenSlide; the SVS lacks the OME half."""
    slides = sorted(path for path in (shared_data / "slides").iterdir() if path.is_file())
    verdicts = {path.name: validate(path) for path in slides}
    assert not any(verdict.ok for verdict in verdicts.values())
    assert "OpenSlide" in verdicts["OS-2-ndpi.ome.tif"].problems[0]
    assert "no sane pixel size" in verdicts["CMU-1-Small-Region.jpeg.tiff"].problems[-1]
    assert "SubIFDs" in "".join(verdicts["CMU-1-Small-Region.svs"].problems)
