"""The written file as tifffile and OpenSlide see it, and what happens when writing fails."""

from __future__ import annotations

import errno
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import cv2
import numpy as np
import numpy.typing as npt
import openslide
import pytest
import tifffile

from wsi_stain.config import WriteConfig
from wsi_stain.errors import OutputError, SlideError
from wsi_stain.geometry import Size, pyramid_sizes
from wsi_stain.write.levels import halve
from wsi_stain.write.tiff import PyramidFacts, write_pyramid

Pixels = npt.NDArray[np.uint8]
WritePixels = Callable[..., PyramidFacts]

SPECS = {
    "4:2:0": WriteConfig(),
    "4:4:4": WriteConfig(subsampling="4:4:4"),
    "lossless": WriteConfig(lossless=True),
}


def pages_of(tiff: tifffile.TiffFile) -> list[tifffile.TiffPage]:
    return [cast(tifffile.TiffPage, page) for page in tiff.pages]


def bands_of(pixels: Pixels, band_px: int = 100) -> Iterator[Pixels]:
    for y_px in range(0, len(pixels), band_px):
        yield pixels[y_px : y_px + band_px]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_all_levels_are_in_both_chains_when_written(
    tmp_path: Path, he_pixels: Pixels, write_pixels: WritePixels, spec: WriteConfig
) -> None:
    path = tmp_path / "a.ome.tiff"
    facts = write_pixels(path, he_pixels, spec, mpp=0.499)
    sizes = pyramid_sizes(Size(1403, 1101))
    assert facts.levels == tuple(sizes)
    assert facts.n_bytes == path.stat().st_size
    with tifffile.TiffFile(path) as tiff:
        pages = pages_of(tiff)
        assert tiff.is_bigtiff
        assert tiff.is_ome
        assert [page.offset for page in pages[1:]] == list(pages[0].subifds or ())
        assert [Size(page.imagewidth, page.imagelength) for page in pages] == sizes
        assert [level.shape[:2] for level in tiff.series[0].levels] == [s[::-1] for s in sizes]
        assert [int(page.subfiletype) for page in pages] == [0, 1, 1]
        counts = [count for page in pages for count in page.databytecounts]
        assert len(counts) == facts.n_tiles
        assert min(counts) > 0
    with openslide.OpenSlide(path) as slide:
        assert list(slide.level_dimensions) == sizes
        mpp = [float(slide.properties[f"openslide.mpp-{axis}"]) for axis in "xy"]
        assert mpp == pytest.approx([0.499, 0.499], rel=1e-3)


def plain_jpeg_error(pixels: Pixels, subsampling: str) -> float:
    """Mean error, grey levels, of one plain JPEG of the whole picture at the same quality."""
    factor = {"4:2:0": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420}.get(
        subsampling, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444
    )
    flags = [cv2.IMWRITE_JPEG_QUALITY, 90, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factor]
    done, data = cv2.imencode(".jpg", pixels[..., ::-1], flags)
    assert done
    decoded = cv2.imdecode(data, cv2.IMREAD_COLOR)
    assert decoded is not None
    return float(np.abs(decoded[..., ::-1].astype(float) - pixels).mean())


@pytest.mark.parametrize("name", SPECS)
def test_pixels_of_all_levels_are_right_when_read_by_two_readers(
    tmp_path: Path, he_pixels: Pixels, write_pixels: WritePixels, name: str
) -> None:
    path = tmp_path / "a.ome.tiff"
    write_pixels(path, he_pixels, SPECS[name])
    truth = he_pixels
    with tifffile.TiffFile(path) as tiff, openslide.OpenSlide(path) as slide:
        for number, page in enumerate(pages_of(tiff)):
            limit = 0.0 if name == "lossless" else 1.02 * plain_jpeg_error(truth, name)
            size = (truth.shape[1], truth.shape[0])
            other = np.asarray(slide.read_region((0, 0), number, size).convert("RGB"))
            for seen in (page.asarray(), other):
                assert np.abs(seen.astype(float) - truth).mean() <= limit
            truth = halve(truth)


def test_resolution_halves_and_nothing_identifies_when_tags_are_read(
    tmp_path: Path, he_pixels: Pixels, write_pixels: WritePixels
) -> None:
    path = tmp_path / "a.ome.tiff"
    write_pixels(path, he_pixels, WriteConfig(), mpp=0.25, name="slide_ki67")
    with tifffile.TiffFile(path) as tiff:
        pages = pages_of(tiff)
        for number, page in enumerate(pages):
            assert page.resolution[0] == pytest.approx(1e4 / 0.25 / 2**number)
            assert int(page.resolutionunit) == 3
            # 4:4:4 as well as 4:2:0 states (2, 2); see the Bio-Formats test.
            assert page.tags["YCbCrSubSampling"].value == (2, 2)
            assert not {"DateTime", "HostComputer", "Artist"} & {tag.name for tag in page.tags}
        assert str(tmp_path) not in pages[0].description


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (513, 512), (2049, 3), (15, 17)])
def test_file_is_whole_when_sizes_are_odd(
    tmp_path: Path, write_pixels: WritePixels, size: tuple[int, int]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    path = tmp_path / "a.ome.tiff"
    write_pixels(path, pixels, WriteConfig(lossless=True, tile_px=64))
    with tifffile.TiffFile(path) as tiff:
        truth = pixels
        for page in pages_of(tiff):
            assert (page.asarray() == truth).all()
            truth = halve(truth)


def test_same_bytes_come_out_when_bands_are_cut_differently(
    tmp_path: Path, he_pixels: Pixels, write_pixels: WritePixels
) -> None:
    heights = (64, 512, 777)
    for height_px in heights:
        path = tmp_path / f"{height_px}.ome.tiff"
        write_pixels(path, he_pixels, WriteConfig(), band_px=height_px)
    first, *others = [(tmp_path / f"{height}.ome.tiff").read_bytes() for height in heights]
    assert all(other == first for other in others)


def test_blank_tiles_share_bytes_and_keep_their_color_when_glass(
    tmp_path: Path, write_pixels: WritePixels
) -> None:
    pixels = np.full((1024, 1024, 3), 243, np.uint8)
    path = tmp_path / "a.ome.tiff"
    write_pixels(path, pixels, WriteConfig())
    with tifffile.TiffFile(path) as tiff:
        page = pages_of(tiff)[0]
        assert (page.asarray() == 243).all()
        data = path.read_bytes()
        tiles = {
            data[offset : offset + count]
            for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)
        }
        assert len(tiles) == 1
        assert len(tiles.pop()) < 2500


def test_file_is_kept_when_it_exists_and_replaced_when_asked(
    tmp_path: Path, he_pixels: Pixels, write_pixels: WritePixels
) -> None:
    path = tmp_path / "a.ome.tiff"
    path.write_bytes(b"precious")
    with pytest.raises(OutputError, match="exists already") as caught:
        write_pixels(path, he_pixels, WriteConfig())
    assert caught.value.exit_code == 8
    assert path.read_bytes() == b"precious"
    write_pixels(path, he_pixels, WriteConfig(overwrite=True))
    assert path.stat().st_size > 10_000


def _short(pixels: Pixels) -> Iterator[Pixels]:
    yield pixels[:-1]


def _long(pixels: Pixels) -> Iterator[Pixels]:
    yield pixels
    yield pixels[:1]


def _failing(pixels: Pixels) -> Iterator[Pixels]:
    yield pixels[:700]
    raise SlideError("tile 7 cannot be read.")


def _disk_failing(pixels: Pixels) -> Iterator[Pixels]:
    yield pixels[:700]
    raise OSError(errno.EIO, "Input/output error")


def _interrupted(pixels: Pixels) -> Iterator[Pixels]:
    yield pixels[:700]
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (_short, OutputError, "end after 1100 rows of 1101"),
        (_long, OutputError, "reach row 1102"),
        (_failing, SlideError, "tile 7"),
        (_disk_failing, OSError, "Input/output error"),
        (_interrupted, KeyboardInterrupt, "^$"),
    ],
)
def test_nothing_is_left_when_bands_fail(
    tmp_path: Path,
    he_pixels: Pixels,
    make: Callable[[Pixels], Iterator[Pixels]],
    error: type[BaseException],
    words: str,
) -> None:
    path = tmp_path / "a.ome.tiff"
    with pytest.raises(error, match=words) as caught:
        write_pyramid(path, Size(1403, 1101), make(he_pixels), 0.5, WriteConfig(), name="a")
    assert type(caught.value) is error  # the source's own error, not blamed on the output
    assert list(tmp_path.iterdir()) == []


def test_old_file_stays_whole_when_its_replacement_fails(tmp_path: Path, he_pixels: Pixels) -> None:
    path = tmp_path / "a.ome.tiff"
    path.write_bytes(b"old")
    spec = WriteConfig(overwrite=True)
    with pytest.raises(OutputError):
        write_pyramid(path, Size(1403, 1101), _short(he_pixels), 0.5, spec, name="a")
    assert [item.name for item in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"old"


def test_output_is_named_when_the_system_refuses_more_bytes(tmp_path: Path) -> None:
    """A real limit on the size of files stands in for a full disk: the same kind of error."""
    pixels = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), np.uint8)
    path = tmp_path / "a.ome.tiff"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(OutputError, match=r"a\.ome\.tiff\.part cannot be written: File") as e:
            write_pyramid(path, Size(1500, 1500), bands_of(pixels), 0.5, WriteConfig(), name="a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "Free space" in e.value.hint
    assert list(tmp_path.iterdir()) == []


def test_folder_is_named_when_it_does_not_exist(tmp_path: Path, he_pixels: Pixels) -> None:
    path = tmp_path / "nowhere" / "a.ome.tiff"
    with pytest.raises(OutputError, match=r"nowhere.*No such file"):
        write_pyramid(path, Size(1403, 1101), bands_of(he_pixels), 0.5, WriteConfig(), name="a")
