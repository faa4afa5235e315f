"""Tiles, outlines and overlays show what they should, where they should."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_stain.evaluate import report_pictures
from wsi_stain.evaluate.report_pictures import (
    TILE_PX,
    level_count,
    outline_paths,
    positive_overlay,
    write_tiles,
)
from wsi_stain.stain.density import HDX, od_to_rgb

WHITE = (255.0, 255.0, 255.0)


@given(st.integers(1, 40_000), st.integers(1, 40_000))
def test_smallest_level_is_one_tile_when_counted(height_px: int, width_px: int) -> None:
    longer_px, n_levels = max(height_px, width_px), level_count(height_px, width_px)
    assert -(-longer_px // 2 ** (n_levels - 1)) <= TILE_PX
    assert n_levels == 1 or -(-longer_px // 2 ** (n_levels - 2)) > TILE_PX


def test_tiles_make_the_picture_when_put_together(tmp_path: Path) -> None:
    ys, xs = np.mgrid[0:700, 0:1100]
    picture = np.stack([xs // 5, ys // 3, (xs + ys) // 8], axis=-1).astype(np.uint8)
    assert write_tiles(picture, tmp_path) == 3
    together = np.zeros_like(picture)
    for path in (tmp_path / "2").iterdir():
        column, row = map(int, path.stem.split("_"))
        tile = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
        assert tile is not None
        place = together[row * 512 : row * 512 + 512, column * 512 : column * 512 + 512]
        assert place.shape == tile.shape
        place[:] = tile
    assert np.abs(together.astype(int) - picture).mean() < 2.0
    [smallest] = (tmp_path / "0").iterdir()
    top = cv2.imread(str(smallest), cv2.IMREAD_COLOR_RGB)
    assert top is not None
    assert top.shape == (175, 275, 3)
    assert np.abs(top.astype(int) - picture[2::4, 2::4]).mean() < 3.0


@pytest.mark.parametrize(("most_px", "step"), [(10**6, 1), (20_000, 4)])
def test_overlay_marks_the_brown_when_there_is_some(
    monkeypatch: pytest.MonkeyPatch, most_px: int, step: int
) -> None:
    monkeypatch.setattr(report_pictures, "OVERLAY_MAX_PX", most_px)
    od = np.full((400, 600, 3), 0.02)
    od += 0.5 * HDX[0]
    od[100:200, 300:400] += 1.2 * HDX[1]
    overlay, found = positive_overlay(od_to_rgb(od, WHITE), WHITE)
    expected = np.zeros((400 // step, 600 // step), np.uint8)
    expected[100 // step : 200 // step, 300 // step : 400 // step] = 255
    assert found == step
    np.testing.assert_array_equal(overlay[..., 3], expected)


def test_outline_runs_around_when_mask_has_a_hole() -> None:
    mask = np.zeros((40, 60), bool)
    mask[10:30, 20:50] = True
    mask[15:20, 30:35] = False
    outer, hole = sorted(outline_paths(mask, 10.0), key=len, reverse=True)
    corners = {(205, 105), (205, 295), (495, 295), (495, 105)}
    paths = [
        {tuple(map(int, point.split())) for point in path.strip("MZ").split("L")}
        for path in (outer, hole)
    ]
    assert corners in paths
    [inner] = [path for path in paths if path != corners]
    xs, ys = zip(*inner, strict=True)
    assert (min(xs), max(xs), min(ys), max(ys)) == (295, 355, 145, 205)


def test_outline_is_bounded_when_mask_is_ragged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_pictures, "OUTLINE_MAX_POINTS", 300)
    mask = np.random.default_rng(3).random((200, 200)) > 0.5
    paths = outline_paths(mask, 16.0)
    assert 1 <= sum(path.count("L") + 1 for path in paths) <= 300


def test_no_outline_when_nothing_is_tissue() -> None:
    assert outline_paths(np.zeros((9, 9), bool), 16.0) == []
