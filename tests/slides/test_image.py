"""Pixels come from where they should, in every way a slide can be read."""

from __future__ import annotations

import io
import multiprocessing
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from wsi_stain.errors import MppUnknownError, SlideError
from wsi_stain.geometry import Region, Scale, Size, choose_scale
from wsi_stain.slides import reader as reader_module
from wsi_stain.slides.image import SlideSource
from wsi_stain.slides.missing import Cell
from wsi_stain.slides.openslide_read import OpenSlideBackend, open_backend
from wsi_stain.slides.pixel_size import PixelSize
from wsi_stain.slides.slide_facts import Level, SlideFacts, true_downsample

Pixels = npt.NDArray[np.uint8]
WriteSlide = Callable[..., Path]
Coordinates = Callable[[int, int, int, int], Pixels]


def _scale(source: SlideSource, factor: float) -> Scale:
    return choose_scale(source.size_l0, source.mpp_l0, factor * source.mpp_l0, 0.0)


def _differ(one: Pixels, other: Pixels) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def test_open_tells_facts_when_slide_is_pyramid(synthetic_slide: Path) -> None:
    with SlideSource.open(synthetic_slide) as source:
        assert source.size_l0 == Size(1403, 1101)
        assert source.mpp_l0 == pytest.approx(0.5, rel=1e-3)
        assert source.mpp_origin == "openslide.mpp-x"
        assert [level.downsample for level in source.levels] == [1.0, 2.0, 4.0]
        assert source.background.tolist() == [255, 255, 255]
        assert not source.has_icc


@pytest.mark.parametrize("kind", ["generic", "aperio", "ome", "plain"])
@pytest.mark.parametrize("codec", ["lzw", "deflate", "none"])
def test_read_out_copies_every_level_when_kind_and_codec_vary(
    tmp_path: Path, write_slide: WriteSlide, he_pixels: Pixels, kind: str, codec: str
) -> None:
    path = write_slide(tmp_path / "a.tif", he_pixels, 0.5, kind=kind, codec=codec, levels=3)
    with SlideSource.open(path, mpp=0.5) as source:
        whole = source.read_out(Region(0, 0, 1403, 1101), _scale(source, 1.0))
        assert np.array_equal(whole, he_pixels)
        assert len(source.levels) == (1 if kind == "plain" else 3)
        if len(source.levels) == 3:
            quarter = source.read_out(Region(10, 20, 300, 200), _scale(source, 4.0))
            level = tifffile.imread(path, level=2) if kind == "ome" else _page(path, 2)
            assert np.array_equal(quarter, level[20:220, 10:310])


def _page(path: Path, index: int) -> Any:
    with tifffile.TiffFile(path) as file:
        return file.pages[index].asarray()


@settings(max_examples=30, deadline=None)
@given(
    x=st.integers(-300, 1500),
    y=st.integers(-300, 1300),
    width=st.integers(1, 400),
    height=st.integers(1, 400),
)
def test_read_out_is_exact_and_fills_background_when_region_is_anywhere(
    coordinate_slide: Path, coordinates: Coordinates, x: int, y: int, width: int, height: int
) -> None:
    with SlideSource.open(coordinate_slide) as source:
        found = source.read_out(Region(x, y, width, height), _scale(source, 1.0))
    expected = coordinates(x, y, width, height)
    ys, xs = np.mgrid[y : y + height, x : x + width]
    expected[(xs < 0) | (ys < 0) | (xs >= 1403) | (ys >= 1101)] = 255
    assert np.array_equal(found, expected)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    factor=st.sampled_from([0.8, 1.0, 1.4448, 370 / 256, 2.0, 2.5, 3.0, 7.3]),
    x=st.integers(0, 120),
    y=st.integers(0, 100),
)
def test_read_out_regions_agree_where_they_overlap(
    synthetic_slide: Path, factor: float, x: int, y: int
) -> None:
    with SlideSource.open(synthetic_slide) as source:
        scale = _scale(source, factor)
        whole = source.read_out(Region(0, 0, 240, 220), scale)
        part = source.read_out(Region(x, y, 120, 120), scale)
    exact = factor * 256 == round(factor * 256)
    assert _differ(part, whole[y : y + 120, x : x + 120]) <= (0 if exact else 2)


@pytest.mark.parametrize("factor", [1.25, 2.0, 3.7])
@pytest.mark.parametrize("levels", [1, 3])
def test_read_out_places_pixels_when_picture_is_a_ramp(
    tmp_path: Path, write_slide: WriteSlide, factor: float, levels: int
) -> None:
    # Dithered, so that rounding to grey levels does not lean to one side.
    ys, xs = np.mgrid[0:700, 0:1000]
    dither = np.random.default_rng(2).uniform(-0.5, 0.5, (700, 1000))
    channels = [xs / 4 + dither, ys / 4 + dither, np.full(xs.shape, 200.0)]
    ramp = np.rint(np.clip(np.stack(channels, axis=-1), 0, 255)).astype(np.uint8)
    path = write_slide(tmp_path / "ramp.tif", ramp, 0.5, levels=levels)
    with SlideSource.open(path) as source:
        found = source.read_out(Region(20, 30, 150, 100), _scale(source, factor)).astype(float)
    # Half an out pixel is 0.15 to 0.46 grey levels; 2 x 2 means that round up add 0.1 per level.
    allowed = 0.06 if levels == 1 else 0.14
    # An out pixel's center lies at (i + 1/2) * factor - 1/2 of level 0.
    expected_x = ((20 + np.arange(150) + 0.5) * factor - 0.5) / 4
    expected_y = ((30 + np.arange(100) + 0.5) * factor - 0.5) / 4
    assert np.abs(found[..., 0] - expected_x).max() < 2.5
    assert np.abs((found[..., 0] - expected_x).mean()) < allowed
    assert np.abs((found[..., 1] - expected_y[:, None]).mean()) < allowed


def test_read_out_keeps_colors_when_last_pixel_is_partly_outside(
    tmp_path: Path, write_slide: WriteSlide
) -> None:
    gray = np.full((301, 303, 3), 180, np.uint8)
    path = write_slide(tmp_path / "gray.tif", gray, 0.5)
    with SlideSource.open(path) as source:
        scale = _scale(source, 2.0)
        assert scale.size_out == Size(152, 151)
        found = source.read_out(Region(0, 0, 160, 160), scale)
    assert (found[:151, :152] == 180).all()
    assert (found[151:] == 255).all()
    assert (found[:, 152:] == 255).all()


@pytest.mark.parametrize("levels", [1, 3])
def test_thumbnail_is_area_mean_when_factor_is_whole(
    tmp_path: Path, write_slide: WriteSlide, he_pixels: Pixels, levels: int
) -> None:
    pixels = he_pixels[:1088, :1392]
    path = write_slide(tmp_path / "a.tif", pixels, 0.5, levels=levels)
    with SlideSource.open(path, mpp=0.5) as source:
        found = source.thumbnail(8.0)
    expected = pixels.reshape(68, 16, 87, 16, 3).mean(axis=(1, 3))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1.5


def test_thumbnail_reads_small_blocks_when_slide_has_one_level(
    tmp_path: Path, write_slide: WriteSlide, monkeypatch: pytest.MonkeyPatch
) -> None:
    glass = np.full((512, 512, 3), 243, np.uint8)
    glass.flags.writeable = False
    path = write_slide(
        tmp_path / "big.tif", lambda row, column: glass, 0.5, size=(6000, 5000), codec="jpeg"
    )
    areas: list[int] = []
    read = reader_module.LevelReader.read

    def spy(self: Any, level: int, region: Region) -> Pixels:
        areas.append(region.size.area_px)
        return read(self, level, region)

    with SlideSource.open(path) as source:
        monkeypatch.setattr(reader_module.LevelReader, "read", spy)
        found = source.thumbnail(8.0)
    assert found.shape == (313, 375, 3)
    assert _differ(found, np.full_like(found, 243)) <= 1
    assert max(areas) <= 1540 * 1540
    assert sum(areas) >= 6000 * 5000


@pytest.mark.slow
def test_thumbnail_stays_below_100_mb_when_slide_has_40000_px(
    tmp_path: Path, write_slide: WriteSlide
) -> None:
    glass = np.full((512, 512, 3), 243, np.uint8)
    glass.flags.writeable = False
    path = write_slide(
        tmp_path / "huge.tif", lambda row, column: glass, 0.5, size=(40000, 40000), codec="jpeg"
    )
    code = (
        "import resource, sys; from wsi_stain.slides.image import SlideSource; "
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = peak(); "
        "shape = SlideSource.open(sys.argv[1], cache_mb=16).thumbnail(8.0).shape; "
        "assert shape == (2500, 2500, 3), shape; sys.exit(peak() - before > 100_000)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


def test_pickled_source_reads_in_another_process(synthetic_slide: Path) -> None:
    with SlideSource.open(synthetic_slide, cache_mb=8) as source:
        region, scale = Region(300, 300, 64, 64), _scale(source, 1.0)
        here = source.read_out(region, scale)
        again = pickle.loads(pickle.dumps(source))  # noqa: S301 - our own bytes
        assert again.digest == source.digest
        assert len(pickle.dumps(source)) < 4000
        for method in ("spawn", "fork"):
            with multiprocessing.get_context(method).Pool(1) as pool:
                assert np.array_equal(pool.apply(source.read_out, (region, scale)), here)


def test_pickled_source_refuses_when_file_has_changed(
    tmp_path: Path, write_slide: WriteSlide, he_pixels: Pixels
) -> None:
    path = write_slide(tmp_path / "a.tif", he_pixels, 0.5)
    with SlideSource.open(path) as source:
        data = pickle.dumps(source)
    write_slide(path, 255 - he_pixels, 0.5)
    with pytest.raises(SlideError, match="has changed"):
        pickle.loads(data).thumbnail(8.0)  # noqa: S301 - our own bytes


def test_digest_differs_when_any_sampled_byte_differs(
    tmp_path: Path, synthetic_slide: Path
) -> None:
    data = bytearray(synthetic_slide.read_bytes())
    path = tmp_path / "copy.tiff"
    path.write_bytes(data)
    with SlideSource.open(synthetic_slide) as one, SlideSource.open(path) as same:
        assert one.digest == same.digest
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with SlideSource.open(path) as other:
        assert other.digest != one.digest


def test_missing_tiles_are_background_when_slide_is_sparse(tmp_path: Path) -> None:
    path = tmp_path / "sparse.tif"
    tile = np.full((256, 256, 3), 120, np.uint8).tobytes()
    tifffile.imwrite(
        path,
        iter([tile, b"", b"", tile]),
        shape=(512, 512, 3),
        dtype=np.uint8,
        tile=(256, 256),
        photometric="rgb",
        metadata=None,
    )
    with SlideSource.open(path, mpp=0.5) as source:
        found = source.read_out(Region(0, 0, 512, 512), _scale(source, 1.0))
    expected = np.full((512, 512, 3), 255, np.uint8)
    expected[:256, :256] = expected[256:, 256:] = 120
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("level", [0, 1])
def test_openslide_blocks_equal_one_read_when_region_is_wide(
    synthetic_slide: Path, level: int
) -> None:
    backend = open_backend(synthetic_slide, 16)
    assert isinstance(backend, OpenSlideBackend)
    backend._direct = []
    region = Region(3, 5, backend.facts.levels[level].size.width_px - 3, 200)
    at_once = np.asarray(backend._read_rgba(level, region).convert("RGB"))
    assert np.array_equal(backend._read_rgb(level, region), at_once)
    backend.close()


def test_read_tells_damage_when_a_tile_is_garbage(
    tmp_path: Path, write_slide: WriteSlide, he_pixels: Pixels
) -> None:
    path = write_slide(tmp_path / "a.tif", he_pixels, 0.5, codec="deflate")
    with tifffile.TiffFile(path) as file:
        place = file.pages[0].dataoffsets[7]
    data = bytearray(path.read_bytes())
    data[place : place + 40] = b"\xff" * 40
    path.write_bytes(data)
    with (
        pytest.raises(SlideError, match="damaged: level 0, tile in row 1 and column 1"),
        SlideSource.open(path) as source,
    ):
        source.read_out(Region(0, 0, 1403, 1101), _scale(source, 1.0))


# ---- bounds ------------------------------------------------------------------------------------


class _Bounded:
    """A backend whose slide fills only a part of its grid, as MRXS does."""

    def __init__(self, pixels: Pixels, origin: tuple[int, int], size: Size) -> None:
        self.left_out: set[Cell] = set()
        self.pixels = pixels
        whole = Size(pixels.shape[1], pixels.shape[0])
        self.facts = SlideFacts(
            "mirax",
            size,
            origin,
            (Level(whole, 1.0),),
            (PixelSize("openslide.mpp-x", 0.5, 0.5),),
            None,
            (250, 240, 230),
            None,
        )

    def read(self, level: int, region: Region) -> Pixels:
        assert Region(0, 0, *self.facts.levels[level].size).contains(region)
        return self.pixels[region.y_px : region.bottom_px, region.x_px : region.right_px]

    def close(self) -> None: ...


def test_frame_begins_at_bounds_when_slide_has_them(
    coordinate_slide: Path, coordinates: Coordinates, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = _Bounded(coordinates(0, 0, 1000, 800), (301, 203), Size(400, 300))
    monkeypatch.setattr(reader_module, "open_backend", lambda path, cache_mb: backend)
    source = SlideSource.open(coordinate_slide)
    assert source.size_l0 == Size(400, 300)
    found = source.read_out(Region(5, 7, 500, 50), _scale(source, 1.0))
    assert np.array_equal(found[:, :395], coordinates(306, 210, 395, 50))
    assert (found[:, 395:] == (250, 240, 230)).all()
    half = source.read_out(Region(0, 0, 20, 20), _scale(source, 2.0)).astype(float)
    expected = (301 + (np.arange(20) + 0.5) * 2 - 0.5) % 256
    assert np.abs(half[2:-2, 2:-2, 0] - expected[2:-2]).max() <= 1.0
    assert source.thumbnail(8.0).shape == (19, 25, 3)


# ---- levels ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size_l0", "size", "expected"),
    [
        (Size(46000, 32914), Size(11500, 8228), 4.0),
        (Size(2220, 2967), Size(1110, 1484), 2.0),
        (Size(4443, 3567), Size(2221, 1783), 2.0),
        (Size(100, 100), Size(100, 100), 1.0),
    ],
)
def test_true_downsample_is_whole_when_sizes_were_rounded(
    size_l0: Size, size: Size, expected: float
) -> None:
    assert true_downsample(size_l0, size) == expected


def test_true_downsample_keeps_ratio_when_it_is_not_whole() -> None:
    assert true_downsample(Size(3000, 3000), Size(1200, 1200)) == 2.5


# ---- colors ------------------------------------------------------------------------------------


def test_colors_are_converted_when_slide_has_profile(shared_data: Path) -> None:
    path = shared_data / "slides/gastric_he_1.svs"
    with SlideSource.open(path) as source:
        assert source.has_icc
        found = source.read_out(Region(100, 100, 256, 256), _scale(source, 1.0))
    backend = open_backend(path, 8)
    assert backend.facts.icc
    raw = Image.fromarray(backend.read(0, Region(100, 100, 256, 256)))
    profile = ImageCms.ImageCmsProfile(io.BytesIO(backend.facts.icc))
    intent = ImageCms.Intent(ImageCms.getDefaultIntent(profile))
    expected = ImageCms.profileToProfile(raw, profile, ImageCms.createProfile("sRGB"), intent)
    backend.close()
    assert np.array_equal(found, np.asarray(expected))
    assert _differ(found, np.asarray(raw)) > 10


def _with_profile(path: Path, pixels: Pixels, icc: bytes) -> Path:
    tifffile.imwrite(
        path, pixels, photometric="rgb", tile=(256, 256), metadata=None, iccprofile=icc
    )
    return path


def test_colors_stay_when_profile_is_srgb(tmp_path: Path, he_pixels: Pixels) -> None:
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    with SlideSource.open(_with_profile(tmp_path / "a.tif", he_pixels, icc), mpp=0.5) as source:
        assert source.has_icc
        found = source.read_out(Region(0, 0, 1403, 1101), _scale(source, 1.0))
    assert _differ(found, he_pixels) <= 1


def test_colors_stay_raw_with_a_note_when_profile_is_broken(
    tmp_path: Path, he_pixels: Pixels
) -> None:
    path = _with_profile(tmp_path / "a.tif", he_pixels, b"not a profile" * 20)
    with SlideSource.open(path, mpp=0.5) as source:
        assert not source.has_icc
        found = source.read_out(Region(0, 0, 1403, 1101), _scale(source, 1.0))
    assert np.array_equal(found, he_pixels)
    assert "color profile" in source.notes[0]


# ---- real slides -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "tcga_no_mpp.svs", "gastric_he_1.svs"])
def test_direct_reading_equals_openslide_when_slide_is_real(shared_data: Path, name: str) -> None:
    backend = open_backend(shared_data / "slides" / name, 16)
    assert isinstance(backend, OpenSlideBackend)
    assert backend._direct
    region = Region(301, 222, 700, 600)
    direct = backend.read(0, region)
    backend._direct = []
    assert np.array_equal(direct, backend.read(0, region))
    backend.close()


def test_openslide_level_is_moved_back_when_downsample_is_not_whole(shared_data: Path) -> None:
    backend = open_backend(shared_data / "slides/tcga_no_mpp.svs", 16)
    assert isinstance(backend, OpenSlideBackend)
    region = Region(1001, 1001, 300, 300)
    exact = backend.read(1, region).astype(int)
    backend._direct = []
    raw = np.asarray(backend._read_rgb(1, region)).astype(int)
    moved = backend.read(1, region).astype(int)
    assert np.abs(moved - exact).mean() < 0.75 * np.abs(raw - exact).mean()
    backend.close()


@pytest.mark.parametrize(
    ("name", "size", "mpp", "origin"),
    [
        ("CMU-1-Small-Region.svs", (2220, 2967), 0.499, "openslide.mpp-x"),
        ("gastric_he_2.svs", (2048, 2048), 0.253, "openslide.mpp-x"),
        ("OS-1-detail.ome.tif", (1101, 1101), 0.2271, "OME PhysicalSizeX"),
        ("OS-2-vsi.ome.tif", (1445, 1445), 0.34605, "OME PhysicalSizeX"),
        ("tma_core_he.tif", (1380, 1484), 0.50008, "OME PhysicalSizeX"),
    ],
)
def test_open_tells_size_and_mpp_when_slide_is_real(
    shared_data: Path, name: str, size: tuple[int, int], mpp: float, origin: str
) -> None:
    with SlideSource.open(shared_data / "slides" / name) as source:
        assert (source.size_l0, source.mpp_origin) == (size, origin)
        assert source.mpp_l0 == pytest.approx(mpp, rel=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "CMU-1-Small-Region.jpeg.tiff",
        "CMU-1-Small-Region.jp2.tiff",
        "CMU-1-Small-Region.webp.tiff",
        "kidney.tif",
        "tcga_no_mpp.svs",
    ],
)
def test_open_asks_for_mpp_when_real_slide_has_none_or_a_wrong_one(
    shared_data: Path, name: str
) -> None:
    path = shared_data / "slides" / name
    with pytest.raises(MppUnknownError) as caught:
        SlideSource.open(path)
    assert "--mpp" in caught.value.hint
    assert ("0.00499" in caught.value.message) == name.startswith("CMU")
    with SlideSource.open(path, mpp=0.5) as source:
        assert source.mpp_origin == "user"
        pixels = source.read_out(Region(0, 0, 512, 512), _scale(source, 1.0))
        assert pixels.std() > 0


@pytest.mark.parametrize("name", ["jp2", "webp"])
def test_codecs_openslide_lacks_show_the_same_picture(shared_data: Path, name: str) -> None:
    folder = shared_data / "slides"
    with (
        SlideSource.open(folder / f"CMU-1-Small-Region.{name}.tiff", mpp=0.5) as other,
        SlideSource.open(folder / "CMU-1-Small-Region.svs", mpp=0.5) as svs,
    ):
        region, scale = Region(700, 900, 400, 400), _scale(svs, 1.0)
        one, two = other.read_out(region, scale), svs.read_out(region, scale)
    assert np.abs(one.astype(int) - two).mean() < 12
