"""Stitching against a weight image of the whole picture in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_stain.errors import ConfigError, OutputError
from wsi_stain.geometry import Scale, Size
from wsi_stain.slides.plan import TileGrid
from wsi_stain.write.stitch import Placement, stitch_bands

Pixels = npt.NDArray[np.uint8]
GLASS = (243, 241, 244)


@dataclass(frozen=True)
class Grid:
    """The least that can be stitched."""

    scale: Scale
    tile_px: int
    overlap_px: int
    rc: npt.NDArray[np.int32]


def make_grid(width_px: int, height_px: int, tile_px: int, overlap_px: int) -> Grid:
    """Cover a picture wholly."""
    stride_px = tile_px - overlap_px
    rows, columns = (
        max(0, -(-(side_px - tile_px) // stride_px)) + 1 for side_px in (height_px, width_px)
    )
    rc = np.array([(row, col) for row in range(rows) for col in range(columns)], np.int32)
    return Grid(Scale(1.0, 0.5, Size(width_px, height_px)), tile_px, overlap_px, rc)


def keep(grid: Grid, flags: npt.NDArray[np.bool_]) -> Grid:
    return Grid(grid.scale, grid.tile_px, grid.overlap_px, grid.rc[flags])


def stitch(grid: Placement, read_tile: Callable[[int], Pixels], band_px: int = 512) -> Pixels:
    bands = list(stitch_bands(grid, read_tile, GLASS, band_px))
    assert all(len(band) == band_px for band in bands[:-1])
    return np.concatenate(bands)


def weight_image(grid: Grid, read_tile: Callable[[int], Pixels]) -> npt.NDArray[np.float64]:
    """Add weighted tiles over the whole picture and divide by the weights: slow and plain."""
    width_px, height_px = grid.scale.size_out
    tile_px, overlap_px = grid.tile_px, grid.overlap_px
    stride_px = tile_px - overlap_px
    total = np.zeros((height_px + 2 * tile_px, width_px + 2 * tile_px, 3))
    weights = np.zeros((*total.shape[:2], 1))
    side = np.ones(tile_px)
    for k in range(overlap_px):
        side[k] = side[tile_px - 1 - k] = (k + 0.5) / overlap_px
    weight = np.outer(side, side)[..., None]
    for index, (row, column) in enumerate(grid.rc):
        ys = slice(row * stride_px, row * stride_px + tile_px)
        xs = slice(column * stride_px, column * stride_px + tile_px)
        total[ys, xs] += weight * read_tile(index)
        weights[ys, xs] += weight
    covered = weights > 0
    picture = np.where(covered, total / np.where(covered, weights, 1), np.array(GLASS, float))
    return picture[:height_px, :width_px]


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    tile_px = draw(st.integers(4, 24))
    overlap_px = draw(st.integers(0, tile_px // 2))
    width_px, height_px = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    grid = make_grid(width_px, height_px, tile_px, overlap_px)
    count = len(grid.rc)
    present = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    return keep(grid, np.array(present, bool))


@given(grids(), st.integers(1, 70), st.integers(0, 2**16))
@settings(max_examples=150, deadline=None)
def test_stitch_equals_weight_image_when_tiles_are_missing(
    grid: Grid, band_px: int, seed: int
) -> None:
    shape = (len(grid.rc), grid.tile_px, grid.tile_px, 3)
    tiles = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    picture = stitch(grid, lambda index: tiles[index], band_px)
    reference = weight_image(grid, lambda index: tiles[index])
    assert picture.shape == reference.shape
    # Two roundings, one per direction, of half a level each.
    assert np.abs(picture - reference).max(initial=0) <= 1.0 + 1e-3


@given(grids(), st.integers(1, 70), st.integers(0, 255))
@settings(max_examples=80, deadline=None)
def test_stitch_is_constant_when_tiles_are(grid: Grid, band_px: int, level: int) -> None:
    tile = np.full((grid.tile_px, grid.tile_px, 3), level, np.uint8)
    picture = stitch(grid, lambda _: tile, band_px)
    covered = np.zeros(picture.shape[:2], bool)
    stride_px = grid.tile_px - grid.overlap_px
    for row, column in grid.rc:
        y_px, x_px = row * stride_px, column * stride_px
        covered[y_px : y_px + grid.tile_px, x_px : x_px + grid.tile_px] = True
    assert (picture[covered] == level).all()
    assert (picture[~covered] == GLASS).all()


@given(grids(), st.integers(1, 70), st.integers(0, 2**16))
@settings(max_examples=80, deadline=None)
def test_stitch_is_exact_when_overlaps_agree(grid: Grid, band_px: int, seed: int) -> None:
    width_px, height_px = grid.scale.size_out
    side_px, stride_px = 2 * grid.tile_px, grid.tile_px - grid.overlap_px
    scene = np.random.default_rng(seed).integers(
        0, 256, (height_px + side_px, width_px + side_px, 3), np.uint8
    )

    def cut(index: int) -> Pixels:
        y_px, x_px = (int(at) * stride_px for at in grid.rc[index])
        return scene[y_px : y_px + grid.tile_px, x_px : x_px + grid.tile_px]

    picture = stitch(grid, cut, band_px)
    glass = (picture == GLASS).all(axis=-1)
    assert (picture[~glass] == scene[:height_px, :width_px][~glass]).all()
    if len(grid.rc) == len(make_grid(width_px, height_px, grid.tile_px, grid.overlap_px).rc):
        assert (picture == scene[:height_px, :width_px]).all()


def test_tiles_are_read_once_and_in_order_when_stitched() -> None:
    grid = make_grid(300, 200, 64, 16)
    seen: list[int] = []

    def read_tile(index: int) -> Pixels:
        seen.append(index)
        return np.zeros((64, 64, 3), np.uint8)

    stitch(grid, read_tile, 50)
    assert seen == list(range(len(grid.rc)))


def test_bands_come_before_lower_tiles_are_read_when_streaming() -> None:
    grid = make_grid(64, 64 * 20, 64, 0)
    seen: list[int] = []

    def read_tile(index: int) -> Pixels:
        seen.append(index)
        return np.zeros((64, 64, 3), np.uint8)

    for number, _ in enumerate(stitch_bands(grid, read_tile, GLASS, 128), start=1):
        assert len(seen) <= 2 * number + 1


def test_tile_keeps_its_own_pixels_when_it_has_no_neighbor() -> None:
    grid = keep(make_grid(160, 160, 64, 16), np.arange(9) == 4)
    tile = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    picture = stitch(grid, lambda _: tile)
    assert (picture[48:112, 48:112] == tile).all()


def test_border_between_two_tiles_is_a_straight_ramp_when_they_differ() -> None:
    grid = make_grid(112, 64, 64, 16)
    picture = stitch(grid, lambda index: np.full((64, 64, 3), 160 * index, np.uint8))
    assert (picture[:, :48] == 0).all()
    assert (picture[:, 64:] == 160).all()
    assert picture[5, 48:64, 1].tolist() == [5 + 10 * k for k in range(16)]


def test_bands_are_owned_by_the_caller_when_more_follow() -> None:
    grid = make_grid(80, 300, 32, 8)
    tiles = np.random.default_rng(0).integers(0, 256, (len(grid.rc), 32, 32, 3), np.uint8)
    copies, bands = [], []
    for band in stitch_bands(grid, lambda index: tiles[index], GLASS, 40):
        bands.append(band)
        copies.append(band.copy())
    assert all((band == copy).all() for band, copy in zip(bands, copies, strict=True))


def test_tile_grid_of_the_plan_is_a_placement() -> None:
    plain = make_grid(100, 90, 64, 16)
    grid = TileGrid(plain.scale, 64, 16, 4, plain.rc, np.ones(len(plain.rc), np.float32))
    picture = stitch(grid, lambda _: np.full((64, 64, 3), 7, np.uint8))
    assert picture.shape == (90, 100, 3)
    assert (picture == 7).all()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"overlap_px": 33}, ConfigError, "half of tile_px 64"),
        ({"rc": np.array([(0, 1), (0, 0)], np.int32)}, OutputError, "Tile 1 is not after tile 0"),
        ({"rc": np.array([(0, 0), (0, 0)], np.int32)}, OutputError, "Tile 1 is not after tile 0"),
        ({"rc": np.array([(0, 9)], np.int32)}, OutputError, "outside the picture of 100 x 90"),
    ],
)
def test_grid_is_refused_when_unsound(
    change: dict[str, object], error: type[Exception], words: str
) -> None:
    fields = {**vars(make_grid(100, 90, 64, 16)), **change}
    with pytest.raises(error, match=words):
        stitch(Grid(**fields), lambda _: np.zeros((64, 64, 3), np.uint8))


@pytest.mark.parametrize(
    "tile", [np.zeros((64, 63, 3), np.uint8), np.zeros((64, 64, 3), np.float32)]
)
def test_tile_is_refused_when_its_shape_or_type_is_wrong(tile: Pixels) -> None:
    with pytest.raises(OutputError, match=r"Tile 0 is .* not uint8"):
        stitch(make_grid(100, 90, 64, 16), lambda _: tile)
