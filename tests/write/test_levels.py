"""Levels of a pyramid against a plain numpy mean of the whole picture."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_stain.errors import OutputError
from wsi_stain.geometry import Size, pyramid_sizes
from wsi_stain.write.levels import PyramidFeed, halve

Pixels = npt.NDArray[np.uint8]


def plain_half(pixels: Pixels) -> Pixels:
    pad = ((0, pixels.shape[0] % 2), (0, pixels.shape[1] % 2), (0, 0))
    even = np.pad(pixels, pad, mode="edge").astype(np.uint16)
    total = even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]
    return ((total + 2) >> 2).astype(np.uint8)


def feed_levels(pixels: Pixels, tile_px: int, cuts: list[int]) -> list[Pixels]:
    """Run a picture through a feed whose codec is `tobytes`, and put the tiles together again."""
    sizes = pyramid_sizes(Size(pixels.shape[1], pixels.shape[0]), smallest_side_px=8)
    bands = np.split(pixels, sorted(cut for cut in cuts if cut <= len(pixels)))
    with ThreadPoolExecutor(3) as pool:
        feed = PyramidFeed(sizes, tile_px, lambda tile: tile.tobytes(), pool, io.BytesIO())
        tiles = [list(feed.level0(bands))]
        tiles += [list(feed.upper(number)) for number in range(1, len(sizes))]
    return [_assemble(*pair, tile_px) for pair in zip(tiles, sizes, strict=True)]


def _assemble(tiles: list[bytes], size: Size, tile_px: int) -> Pixels:
    rows, columns = -(-size.height_px // tile_px), -(-size.width_px // tile_px)
    whole = np.frombuffer(b"".join(tiles), np.uint8)
    grid = whole.reshape(rows, columns, tile_px, tile_px, 3).swapaxes(1, 2)
    picture = grid.reshape(rows * tile_px, columns * tile_px, 3)
    padding = ((0, len(picture) - size.height_px), (0, picture.shape[1] - size.width_px), (0, 0))
    level = picture[: size.height_px, : size.width_px]
    # Beyond the edge a tile repeats the last row and column.
    assert (picture == np.pad(level, padding, mode="edge")).all()
    return level


@given(
    st.tuples(st.integers(1, 130), st.integers(1, 130)),
    st.sampled_from([16, 32, 48]),
    st.lists(st.integers(0, 130), max_size=6),
    st.integers(0, 2**16),
)
@settings(max_examples=80, deadline=None)
def test_levels_equal_means_of_the_whole_when_fed_in_bands(
    shape: tuple[int, int], tile_px: int, cuts: list[int], seed: int
) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)
    truth = pixels
    for level in feed_levels(pixels, tile_px, cuts):
        assert (level == truth).all()
        truth = plain_half(truth)


@given(st.tuples(st.integers(1, 70), st.integers(1, 70)), st.integers(0, 2**16))
@settings(deadline=None)
def test_half_is_the_rounded_mean_when_sides_are_odd(shape: tuple[int, int], seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)
    assert (halve(pixels) == plain_half(pixels)).all()


def test_half_is_the_rounded_mean_when_a_picture_is_large() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (211, 1501, 3), np.uint8)
    assert (halve(pixels) == plain_half(pixels)).all()


def test_half_rounds_up_when_the_sum_is_two_over() -> None:
    block = np.zeros((2, 2, 3), np.uint8)
    block[0, 0] = (1, 2, 3)
    assert halve(block).tolist() == [[[0, 1, 1]]]


def feed_one_level(size: Size, bands: Iterable[Pixels], data: bytes = b"x") -> list[bytes]:
    """Run bands through a feed of one level whose tiles are all `data`."""
    with ThreadPoolExecutor(1) as pool:
        feed = PyramidFeed([size], 16, lambda _: data, pool, io.BytesIO())
        return list(feed.level0(bands))


@pytest.mark.parametrize(
    ("heights", "words"),
    [([40, 59], "end after 99 rows of 100"), ([40, 61], "reach row 101"), ([], "after 0 rows")],
)
def test_bands_are_refused_when_rows_do_not_add_up(heights: list[int], words: str) -> None:
    bands = [np.zeros((height, 30, 3), np.uint8) for height in heights]
    with pytest.raises(OutputError, match=words):
        feed_one_level(Size(30, 100), bands)


@pytest.mark.parametrize(
    "band", [np.zeros((5, 31, 3), np.uint8), np.zeros((5, 30, 3)), np.zeros((5, 30), np.uint8)]
)
def test_band_is_refused_when_its_shape_or_type_is_wrong(band: Pixels) -> None:
    with pytest.raises(OutputError, match="band at row 0"):
        feed_one_level(Size(30, 5), [band])


def test_empty_tile_is_refused_when_the_encoder_gives_one() -> None:
    with pytest.raises(OutputError, match="empty tile"):
        feed_one_level(Size(16, 16), [np.zeros((16, 16, 3), np.uint8)], data=b"")


def test_few_tiles_are_in_flight_when_bands_keep_coming() -> None:
    """The feed asks for a band only when all but one row of tiles is encoded and taken."""
    taken = 0

    def watched() -> Iterator[Pixels]:
        for asked in range(1, 51):
            assert asked * 4 - taken <= 8
            yield np.zeros((16, 64, 3), np.uint8)

    with ThreadPoolExecutor(2) as pool:
        feed = PyramidFeed([Size(64, 800)], 16, lambda _: b"x", pool, io.BytesIO())
        for _ in feed.level0(watched()):
            taken += 1
    assert taken == 200
