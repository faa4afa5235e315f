"""The grid covers the slide, once and in order, and knows itself again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_stain.errors import NoTissueError, PlanError
from wsi_stain.geometry import Region, Scale, Size
from wsi_stain.slides.mask import TissueMask
from wsi_stain.slides.plan import TileGrid, plan_tiles
from wsi_stain.slides.projection import PlanLimits, Speeds, check, project

SIZE = Size(1000, 700)


def _grid(
    size: Size = SIZE,
    *,
    pixels: np.ndarray[tuple[int, int], np.dtype[np.bool_]] | None = None,
    tile_px: int = 256,
    overlap_px: int = 32,
    least: float = 0.02,
    shard_tiles: int = 4,
    factor: float = 1.0,
) -> TileGrid:
    full = np.ones((-(-size.height_px // 16), -(-size.width_px // 16)), np.bool_)
    mask = TissueMask(full if pixels is None else pixels, 8.0, 16.0 * factor)
    return plan_tiles(
        Scale(factor, 0.5 * factor, size),
        mask,
        tile_px=tile_px,
        overlap_px=overlap_px,
        tissue_min_fraction=least,
        shard_tiles=shard_tiles,
    )


@given(
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
    tile=st.sampled_from([64, 256, 512]),
    overlap=st.sampled_from([0, 16, 32]),
)
def test_tiles_cover_every_pixel_when_all_are_kept(
    width: int, height: int, tile: int, overlap: int
) -> None:
    grid = _grid(Size(width, height), tile_px=tile, overlap_px=overlap, least=0.0)
    regions = [grid.region_out(index) for index in range(grid.n_tiles)]
    right, bottom = max(r.right_px for r in regions), max(r.bottom_px for r in regions)
    assert right >= width
    assert bottom >= height
    # No tile lies wholly in what its predecessor covers already.
    assert all(r.x_px == 0 or r.x_px + overlap < width for r in regions)
    assert all(r.y_px == 0 or r.y_px + overlap < height for r in regions)
    assert len({r[:2] for r in regions}) == len(regions)
    assert all(r.size == (tile, tile) for r in regions)
    n_columns = len({r.x_px for r in regions})
    assert grid.n_tiles == n_columns * len({r.y_px for r in regions})
    step = tile - overlap
    assert {r.x_px for r in regions} == set(range(0, n_columns * step, step))


@given(seed=st.integers(0, 1000), shard_tiles=st.integers(1, 9))
def test_shards_and_rows_hold_each_tile_once_in_order(seed: int, shard_tiles: int) -> None:
    pixels = np.random.default_rng(seed).random((44, 63)) < 0.01
    pixels[0, 0] = True
    grid = _grid(pixels=pixels, tile_px=64, overlap_px=16, least=0.001, shard_tiles=shard_tiles)
    order = [tuple(rc) for rc in grid.rc.tolist()]
    assert order == sorted(set(order))
    indexes = [index for shard in range(grid.n_shards) for index in grid.shard(shard)]
    assert indexes == list(range(grid.n_tiles))
    assert max(len(grid.shard(s)) for s in range(grid.n_shards)) <= shard_tiles
    for row, members in grid.rows():
        assert [order[index][0] for index in members] == [row] * len(members)
    assert sum(len(members) for _, members in grid.rows()) == grid.n_tiles


def test_tile_is_kept_when_share_reaches_the_bar() -> None:
    pixels = np.zeros((44, 63), np.bool_)
    pixels[0:16, 0:8] = True  # the left half of the first tile
    grid = _grid(pixels=pixels, overlap_px=0, least=0.5)
    assert grid.rc.tolist() == [[0, 0]]
    assert grid.tissue.tolist() == [0.5]
    with pytest.raises(NoTissueError):
        _grid(pixels=pixels, overlap_px=0, least=0.51)


def test_tile_over_the_edge_is_judged_by_its_part_on_the_slide() -> None:
    """Tissue on the last 16 columns alone: 1/16 of the tile's width, all of what it shows."""
    pixels = np.zeros((90, 90), np.bool_)
    pixels[:, 88:] = True
    scale = Scale(1.0, 0.5, Size(720, 720))
    mask = TissueMask(pixels, 4.0, 8.0)
    grid = plan_tiles(
        scale, mask, tile_px=256, overlap_px=32, tissue_min_fraction=0.1, shard_tiles=4
    )
    assert {int(column) for _, column in grid.rc} == {3}
    assert float(grid.tissue.max()) == pytest.approx(16 / 256)


def test_factor_scales_regions_when_mask_is_read() -> None:
    pixels = np.zeros((44, 63), np.bool_)
    pixels[16:32, 32:48] = True  # out px 512..768 x 256..512 at any factor of this helper
    assert _grid(pixels=pixels, overlap_px=0, factor=2.0, least=0.9).rc.tolist() == [[1, 2]]


def test_plan_raises_no_tissue_when_mask_is_empty() -> None:
    with pytest.raises(NoTissueError, match=r"of 15 tiles") as caught:
        _grid(pixels=np.zeros((44, 63), np.bool_))
    assert caught.value.exit_code == 4
    assert _grid(pixels=np.zeros((44, 63), np.bool_), least=0.0).n_tiles == 15


def test_plan_refuses_when_overlap_exceeds_half_a_tile() -> None:
    assert _grid(tile_px=64, overlap_px=32).stride_px == 32
    with pytest.raises(PlanError, match="34 px"):
        _grid(tile_px=64, overlap_px=34)


def test_digest_differs_when_anything_differs() -> None:
    grids = [
        _grid(),
        _grid(Size(1001, 700)),
        _grid(overlap_px=30),
        _grid(tile_px=272),
        _grid(shard_tiles=5),
        _grid(factor=2.0),
        _grid(pixels=np.arange(44 * 63).reshape(44, 63) != 5),
    ]
    assert len({grid.digest for grid in grids}) == len(grids)
    assert _grid().digest == _grid().digest


def test_loaded_grid_equals_saved_one(tmp_path: Path) -> None:
    grid = _grid(factor=1.7)
    grid.save(tmp_path / "grid.json")
    again = TileGrid.load(tmp_path / "grid.json")
    assert again.digest == grid.digest
    assert again.scale == grid.scale
    assert np.array_equal(again.rc, grid.rc)
    assert np.array_equal(again.tissue, grid.tissue)
    assert again.region_out(3) == grid.region_out(3) == Region(672, 0, 256, 256)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("fault", ["missing", "text", "bytes", "array"])
def test_load_refuses_when_grid_is_damaged(tmp_path: Path, fault: str) -> None:
    header, table = tmp_path / "grid.json", tmp_path / "grid.npy"
    _grid().save(header)
    if fault == "missing":
        table.unlink()
    elif fault == "text":
        header.write_text(header.read_text().replace('"tile_px": 256', '"tile_px": 255'))
    elif fault == "bytes":
        data = bytearray(table.read_bytes())
        data[-9] ^= 1
        table.write_bytes(data)
    else:
        table.write_bytes(b"not numpy")
    with pytest.raises(PlanError):
        TileGrid.load(header)


def test_arrays_cannot_be_changed_when_grid_is_made() -> None:
    with pytest.raises(ValueError, match="read-only"):
        _grid().rc[0, 0] = 5


def test_projection_counts_bytes_and_seconds() -> None:
    grid = _grid(shard_tiles=4)  # 15 tiles of 196,608 bytes
    projection = project(grid, Speeds(tile_s=2.0, n_workers=3, worker_bytes=10**9))
    assert (projection.tiles, projection.shards) == (15, 4)
    assert projection.store_bytes == 2 * 15 * 196_608
    assert projection.seconds == 10.0
    assert projection.memory_bytes == 3 * (10**9 + 12 * 196_608)
    assert 0.3 < projection.output_bytes / 700_000 < 0.8


@pytest.mark.parametrize(
    ("limits", "word"),
    [(PlanLimits(10**8, 10**12), "memory"), (PlanLimits(10**12, 1000), "disk")],
)
def test_check_refuses_when_limit_is_passed(limits: PlanLimits, word: str) -> None:
    projection = project(_grid(), Speeds(1.0, 1, 10**9))
    check(projection, PlanLimits(10**10, 10**10))
    with pytest.raises(PlanError, match=word) as caught:
        check(projection, limits)
    assert caught.value.exit_code == 5


def test_lossless_output_is_projected_larger() -> None:
    jpeg, lossless = (
        project(_grid(), Speeds(1.0, 1, 10**9), lossless=flag).output_bytes
        for flag in (False, True)
    )
    assert 4 * jpeg < lossless <= 4 * _grid().scale.size_out.area_px
