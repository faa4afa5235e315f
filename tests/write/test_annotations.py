"""What a run leaves for QuPath: objects in the picture's own frame, flagged tiles, the script."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.write.qupath_rules import read_objects
from wsi_stain.config import BundleSpec, WriteConfig
from wsi_stain.errors import OutputError
from wsi_stain.geometry import Scale, Size
from wsi_stain.layout import RunFiles
from wsi_stain.slides.image import SlideSource
from wsi_stain.slides.mask import TissueMask
from wsi_stain.slides.plan import TileGrid, plan_tiles
from wsi_stain.stain.density import HDX, od_to_rgb
from wsi_stain.write.annotations import annotate_run, positive_features, read_flagged
from wsi_stain.write.rings import ring_area
from wsi_stain.write.tiff import write_pyramid

WHITE = (255.0, 255.0, 255.0)
SIZE = Size(1000, 700)
HEAD = "tile,x_px_out,y_px_out,size_px,structure,flags\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> RunFiles:
    """Picture with two brown squares of 100 px and 20 px, and an empty run folder."""
    folder = tmp_path_factory.mktemp("out")
    made = RunFiles(folder / "S_ki67.ome.tiff", folder / "S_ki67.run")
    made.folder.mkdir()
    od = np.full((700, 1000, 3), 0.05)
    od[200:300, 300:400] = 1.2 * HDX[1]
    od[500:520, 800:820] = 1.2 * HDX[1]
    pixels = od_to_rgb(od, WHITE)
    write_pyramid(made.output, SIZE, [pixels], 0.5, WriteConfig(lossless=True), name="S_ki67")
    return made


@pytest.fixture(scope="module")
def plan() -> tuple[TissueMask, TileGrid]:
    """Tissue on the left half, of an H&E of 0.25 um/px: twice the picture's pixels."""
    pixels = np.zeros((44, 63), bool)
    pixels[5:40, 5:32] = True
    mask = TissueMask(pixels, 8.0, 32.0)
    grid = plan_tiles(
        Scale(2.0, 0.5, SIZE),
        mask,
        tile_px=256,
        overlap_px=32,
        tissue_min_fraction=0.02,
        shard_tiles=4,
    )
    return mask, grid


def collection(files: RunFiles) -> list[dict[str, Any]]:
    data = json.loads(files.geojson.read_text("utf-8"))
    assert data["type"] == "FeatureCollection"
    found: list[dict[str, Any]] = data["features"]
    return found


def test_objects_lie_in_the_frame_of_the_picture(
    files: RunFiles, plan: tuple[TissueMask, TileGrid]
) -> None:
    mask, grid = plan
    annotate_run(files, mask, grid, BundleSpec(name="b", marker="Ki-67"), {})
    found = collection(files)
    kinds = [feature["properties"]["objectType"] for feature in found]
    assert kinds.count("annotation") == 1
    assert kinds.count("tile") == grid.n_tiles
    assert kinds.count("detection") == 2
    tissue = np.asarray(found[0]["geometry"]["coordinates"][0])
    assert tissue.min(axis=0).tolist() == [80.0, 80.0]
    assert tissue.max(axis=0).tolist() == [512.0, 640.0]
    assert ring_area(tissue) == pytest.approx(mask.pixels.sum() * 16**2, rel=0.01)
    tile = next(f for f in found if f["properties"]["objectType"] == "tile")["properties"]
    assert tile["measurements"] == {"Tissue fraction": pytest.approx(grid.tissue[0], abs=1e-4)}
    script = files.qupath.read_text("utf-8")
    assert 'virtualName = "S_ki67"' in script
    assert str(files.folder.parent) not in script + files.geojson.read_text("utf-8")


def test_positive_regions_have_their_area(files: RunFiles) -> None:
    with SlideSource.open(files.output) as picture:
        large, small = positive_features(picture, WHITE)
    for feature, side_px in ((large, 100), (small, 20)):
        [ring] = feature["geometry"]["coordinates"]
        assert ring_area(np.asarray(ring)) == pytest.approx(side_px**2, rel=0.01)
        assert feature["properties"]["measurements"]["Area um^2"] == (side_px / 2) ** 2
        assert feature["properties"]["classification"]["name"] == "Positive region"


def test_no_more_regions_are_drawn_than_qupath_bears(
    files: RunFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsi_stain.write.annotations.MOST_POSITIVE", 1)
    with SlideSource.open(files.output) as picture:
        [large] = positive_features(picture, WHITE)
    assert large["properties"]["measurements"]["Area um^2"] == 50.0**2


def test_flagged_tiles_come_with_reason_and_scores(
    files: RunFiles, plan: tuple[TissueMask, TileGrid]
) -> None:
    files.tile_scores.write_text(HEAD + "0,0,64,256,0.12,structure;white\n1,224,0,256,0.9,\n")
    [tile] = read_flagged(files.tile_scores)
    assert (tile.name, tile.flags, tile.scores) == ("0", "structure;white", {"structure": 0.12})
    annotate_run(files, *plan, BundleSpec(name="b", marker="Ki-67"), {})
    objects = read_objects(files.geojson.read_text("utf-8"), SIZE)
    [flagged] = [found for found in objects if found.class_name == "Flagged"]
    assert flagged.name == "Tile 0: structure, white"
    assert flagged.measurements == {"Left um": 0.0, "Top um": 32.0, "Structure kept": 0.12}
    tiles = [found for found in objects if found.object_type == "tile"]
    assert [tile.name for tile in tiles[:3]] == ["Tile 0", "Tile 1", "Tile 2"]
    assert [tile.measurements.get("Structure kept") for tile in tiles[:3]] == [0.12, 0.9, None]
    files.tile_scores.unlink()


@pytest.mark.parametrize("row", ["0,0,x,256,0.1,structure\n", "0,0,0,256,bad,structure\n"])
def test_damaged_table_is_named_with_its_line(tmp_path: Path, row: str) -> None:
    table = tmp_path / "tiles.csv"
    table.write_text(HEAD + "5,0,0,256,0.5,\n" + row)
    with pytest.raises(OutputError, match=r"tiles\.csv, line 3, cannot be read"):
        read_flagged(table)


def test_table_without_flags_column_is_damaged(tmp_path: Path) -> None:
    table = tmp_path / "tiles.csv"
    table.write_text("tile,score\n0,1\n")
    with pytest.raises(OutputError, match="KeyError"):
        read_flagged(table)
    assert read_flagged(tmp_path / "none.csv") == []
