"""Scores of tiles become a table, flags and a summary; damaged ones are named."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from wsi_stain.config import TrustConfig
from wsi_stain.errors import OutputError
from wsi_stain.geometry import Scale, Size
from wsi_stain.slides.plan import TileGrid
from wsi_stain.slides.store import PatchStore
from wsi_stain.stages.tiles import flag_texts, read_scores, summarize, write_table
from wsi_stain.stain.tile_scores import TileScore
from wsi_stain.write.annotations import read_flagged

CONFIG = TrustConfig(structure_min=0.3, sobel_ssim_min=0.4, white_error_max=0.2)
GOOD = TileScore(0.8, 0.7, 0.05, 0.31, None)
LOST = TileScore(0.1, 0.2, 0.05, 0.31, None)
BLANK = TileScore(None, 0.9, 0.6, 0.0, None)


@pytest.fixture
def store(tmp_path: Path) -> PatchStore:
    """Store of three tiles in two shards, nothing in it."""
    grid = TileGrid(
        scale=Scale(1.0, 0.5, Size(200, 100)),
        tile_px=64,
        overlap_px=16,
        shard_tiles=2,
        rc=np.array([[0, 0], [0, 2], [1, 0]], np.int32),
        tissue=np.ones(3, np.float32),
    )
    return PatchStore.create(tmp_path / "store", grid)


def fill(store: PatchStore, *shards: list[TileScore]) -> None:
    for number, scores in enumerate(shards):
        tiles = np.zeros((len(scores), 64, 64, 3), np.uint8)
        store.write("ihc", number, tiles, "key", facts=scores)


def test_table_tells_place_scores_and_flags(store: PatchStore, tmp_path: Path) -> None:
    fill(store, [GOOD, LOST], [BLANK])
    scores = read_scores(store)
    assert scores == [GOOD, LOST, BLANK]
    write_table(tmp_path / "tiles.csv", store.grid, scores, CONFIG)
    with (tmp_path / "tiles.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == [
        *("tile", "x_px_out", "y_px_out", "size_px", "x_um", "y_um", "structure"),
        *("sobel_ssim", "white_error", "dab_p90", "dab_sd", "flags"),
    ]
    assert [row["flags"] for row in rows] == ["", "structure;edges", "white"]
    assert [row["structure"] for row in rows] == ["0.8", "0.1", ""]
    assert (rows[1]["x_px_out"], rows[1]["x_um"], rows[2]["y_px_out"]) == ("96", "48.0", "48")
    flagged = read_flagged(tmp_path / "tiles.csv")
    assert [(tile.name, tile.flags) for tile in flagged] == [
        ("1", "structure;edges"),
        ("2", "white"),
    ]


def test_summary_counts_flags_and_names_the_worst() -> None:
    summary = summarize([GOOD, LOST, BLANK], CONFIG)
    assert (summary["tiles"], summary["flagged"]) == (3, 2)
    assert summary["by_flag"] == {"structure": 1, "edges": 1, "white": 1}
    assert summary["worst"] == {"structure": 0.1, "sobel_ssim": 0.2, "white_error": 0.6}
    assert summary["median"]["structure"] == pytest.approx(0.45)
    assert summary["median"]["dab_sd"] is None
    assert flag_texts(summary)[0] == "1 of 3 tiles: structure"
    assert flag_texts(summarize([GOOD], CONFIG)) == []


@pytest.mark.parametrize("facts", [None, [], [[0.1, 0.2]], {"a": 1}, "text"])
def test_scores_that_are_none_are_refused(store: PatchStore, facts: object) -> None:
    fill(store, [GOOD, GOOD], [GOOD])
    marker = store.path / "done" / "ihc" / "000001.json"
    record = json.loads(marker.read_text())
    marker.write_text(json.dumps(record | {"facts": facts}))
    with pytest.raises(OutputError, match=r"shard 1 has no sound scores"):
        read_scores(store)
    marker.write_text("{")
    with pytest.raises(OutputError, match=r"shard 1 has no sound scores"):
        read_scores(store)
