"""Patches in the store are the slide's pixels at the grid's places."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from wsi_stain.geometry import Region, choose_scale
from wsi_stain.slides import fill
from wsi_stain.slides.fill import fill_shard, read_tiles
from wsi_stain.slides.image import SlideSource
from wsi_stain.slides.plan import TileGrid, plan_tiles
from wsi_stain.slides.store import PatchStore
from wsi_stain.slides.tissue import find_tissue

Pixels = npt.NDArray[np.uint8]


def _grid(source: SlideSource, factor: float, least: float) -> TileGrid:
    mpp = source.mpp_l0 * factor
    scale = choose_scale(source.size_l0, source.mpp_l0, mpp, 0.0)
    mask = find_tissue(source.thumbnail(8.0), mpp=8.0, downsample=8.0 / source.mpp_l0)
    return plan_tiles(
        scale, mask, tile_px=128, overlap_px=32, tissue_min_fraction=least, shard_tiles=7
    )


def test_patches_lie_pixel_exact_when_slide_encodes_places(
    tmp_path: Path,
    coordinate_slide: Path,
    coordinates: Callable[[int, int, int, int], Pixels],
) -> None:
    with SlideSource.open(coordinate_slide) as source:
        grid = _grid(source, 1.0, 0.0)
        store = PatchStore.create(tmp_path / "s", grid)
        assert not any(fill_shard(source, store, shard, "k") for shard in range(grid.n_shards))
    assert store.pending("he", "k", verify=True) == []
    for index in range(grid.n_tiles):
        place = grid.region_out(index)
        expected = coordinates(*place)
        ys, xs = np.mgrid[place.y_px : place.bottom_px, place.x_px : place.right_px]
        expected[(xs >= 1403) | (ys >= 1101)] = 255
        assert np.array_equal(store.read_tile("he", index), expected), index


@pytest.mark.parametrize("factor", [1.0, 1.6015625, 1.6, 2.0])
def test_patches_equal_single_reads_when_runs_are_joined_or_split(
    synthetic_slide: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    allowed = 2 if factor == 1.6 else 0  # multiples of 1/256 are exact, whole runs or single
    with SlideSource.open(synthetic_slide) as source:
        grid = _grid(source, factor, 0.05)
        assert 2 < grid.n_tiles < 130
        everything = range(grid.n_tiles)
        joined = read_tiles(source, grid, everything).astype(int)
        for index in everything:
            alone = source.read_out(grid.region_out(index), grid.scale)
            assert np.abs(joined[index] - alone).max() <= allowed
        monkeypatch.setattr(fill, "LARGEST_READ_PX", 30_000)
        split = read_tiles(source, grid, everything)
    assert np.abs(joined - split).max() <= allowed


def test_neighbors_are_read_together_when_they_follow(
    synthetic_slide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Region] = []
    read_out = SlideSource.read_out

    def spy(self: SlideSource, region: Region, scale: object) -> Pixels:
        reads.append(region)
        return read_out(self, region, scale)  # type: ignore[arg-type]

    monkeypatch.setattr(SlideSource, "read_out", spy)
    with SlideSource.open(synthetic_slide) as source:
        grid = _grid(source, 1.0, 0.0)
        read_tiles(source, grid, range(grid.n_tiles))
    n_rows = int(grid.rc[-1, 0]) + 1
    assert len(reads) == n_rows
    assert {region.height_px for region in reads} == {128}
