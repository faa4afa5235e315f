"""GeoJSON as QuPath reads it: types, classes, closed rings inside of the picture."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wsi_stain.errors import OutputError
from wsi_stain.geometry import Region, Size
from wsi_stain.write.geojson import (
    FLAGGED,
    HOT_SPOT,
    TILE,
    TISSUE,
    Feature,
    box_feature,
    circle_feature,
    mask_features,
    write_geojson,
)
from wsi_stain.write.rings import ring_area

SIZE = Size(1000, 800)


def rings(feature: Feature) -> list[Any]:
    assert feature["type"] == "Feature"
    assert feature["geometry"]["type"] == "Polygon"
    return [np.asarray(ring) for ring in feature["geometry"]["coordinates"]]


def test_mask_becomes_locked_annotations_with_their_area() -> None:
    mask = np.zeros((51, 63), bool)  # its last row and column reach over the picture
    mask[10:40, 10:50] = True
    mask[20:25, 20:30] = False
    mask[45:, 55:] = True
    big, corner = mask_features(mask, 16.0, SIZE, TISSUE, mpp=0.5)
    properties = big["properties"]
    assert properties["objectType"] == "annotation"
    assert properties["isLocked"] is True
    assert properties["classification"] == {"name": "Tissue", "color": [16, 110, 140]}
    outer, hole = rings(big)
    total = ring_area(outer) + ring_area(hole)
    assert total == pytest.approx(1150 * 16**2, rel=0.01)
    assert properties["measurements"] == {"Area um^2": 1150 * 64.0}
    [ring] = rings(corner)
    assert ring.max(axis=0).tolist() == [1000.0, 800.0]
    for found in (outer, hole, ring):
        assert np.array_equal(found[0], found[-1])


def test_box_is_cut_at_the_edge_and_drops_absent_numbers() -> None:
    numbers = {"Num nuclei": 3, "Positive %": None}
    feature = box_feature(Region(900, 700, 256, 256), SIZE, TILE, "Tile 1,2", numbers)
    [ring] = rings(feature)
    assert ring_area(ring) == 100 * 100
    assert feature["properties"] == {
        "objectType": "tile",
        "name": "Tile 1,2",
        "isLocked": False,
        "measurements": {"Num nuclei": 3},
    }


def test_circle_is_round_and_closed() -> None:
    [ring] = rings(circle_feature((500.0, 400.0), 100.0, SIZE, HOT_SPOT, {}))
    assert np.array_equal(ring[0], ring[-1])
    assert ring_area(ring) == pytest.approx(math.pi * 100**2, rel=0.01)
    assert np.hypot(*(ring - (500, 400)).T) == pytest.approx(100, abs=0.02)


def test_file_is_a_feature_collection_when_read_plainly(tmp_path: Path) -> None:
    boxes = [box_feature(Region(i, i, 9, 9), SIZE, FLAGGED, f"ä{i}", {}) for i in range(3)]
    path = tmp_path / "a.geojson"
    assert write_geojson(path, iter(boxes)) == 3
    assert json.loads(path.read_text("utf-8")) == {"type": "FeatureCollection", "features": boxes}
    assert write_geojson(path, []) == 0
    assert json.loads(path.read_text("utf-8")) == {"type": "FeatureCollection", "features": []}


def test_old_file_stays_when_a_feature_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.geojson"
    write_geojson(path, [])
    before = path.read_bytes()

    def failing() -> Iterator[Feature]:
        yield box_feature(Region(0, 0, 9, 9), SIZE, TILE, "a", {})
        raise OutputError("planted")

    with pytest.raises(OutputError, match="planted"):
        write_geojson(path, failing())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_absent_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"none/a\.geojson cannot be written"):
        write_geojson(tmp_path / "none" / "a.geojson", [])
