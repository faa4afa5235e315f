"""GeoJSON as QuPath reads it: types, classes, closed rings inside of the picture."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from tests.write.qupath_rules import read_objects
from wsi_stain.errors import OutputError
from wsi_stain.geometry import Region, Size
from wsi_stain.write.geojson import (
    FLAGGED,
    HOT_SPOT,
    POSITIVE,
    TILE,
    TISSUE,
    Feature,
    box_feature,
    circle_feature,
    mask_features,
    write_geojson,
)
from wsi_stain.write.rings import ring_area, trace

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
    numbers = {"Num nuclei": 3, "Positive nuclei %": None}
    feature = box_feature(Region(900, 700, 256, 256), SIZE, TILE, "Tile 1,2", numbers)
    [ring] = rings(feature)
    assert ring_area(ring) == 100 * 100
    assert feature["properties"] == {
        "objectType": "tile",
        "name": "Tile 1,2",
        "isLocked": False,
        "measurements": {"Num nuclei": 3},
    }


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=14)),
    st.floats(1.0, 40.0),
    st.tuples(st.floats(0.0, 0.95), st.floats(0.0, 0.95)),
)
def test_qupath_takes_any_mask_that_reaches_over_the_edge(
    mask: NDArray[np.bool_], step: float, over: tuple[float, float]
) -> None:
    """The picture ends somewhere in the last row and column of the mask."""
    height, width = mask.shape
    size = Size(
        max(1, math.ceil((width - over[0]) * step)), max(1, math.ceil((height - over[1]) * step))
    )
    features = list(mask_features(mask, step, size, POSITIVE, mpp=0.5))
    text = json.dumps({"type": "FeatureCollection", "features": features})
    objects = read_objects(text, size)
    assert all(found.measurements["Area um^2"] > 0.0 for found in objects)
    assert len(objects) <= len(trace(mask))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("geometry", "coordinates"), [[[0, 0], [4, 4], [4, 0], [0, 4], [0, 0]]]),  # a bow tie
        (("geometry", "coordinates"), [[[0, 0], [4, 0], [4, 4], [0, 4]]]),  # open
        (("geometry", "coordinates"), [[[0, 0], [4, 0], [8, 0], [0, 0]]]),  # flat
        (("geometry", "coordinates"), [[[0, 0], [4, 0], [4, 9999], [0, 4], [0, 0]]]),  # outside
        (("properties", "objectType"), "region"),
        (("properties", "measurements"), {"a": math.nan}),
        (("properties", "measurements"), {"a": None}),
        (("properties", "classification"), {"name": "Tissue"}),
        (("properties", "classification"), {"name": "Positive", "color": [1, 2, 3]}),
        (("properties", "classification"), {"name": "Tissue", "color": [1, 2, 256]}),
    ],
)
def test_what_qupath_refuses_or_misreads_is_told_apart(
    place: tuple[str, str], value: object
) -> None:
    feature = box_feature(Region(0, 0, 9, 9), SIZE, TISSUE, "a", {"b": 1.5})
    collection = {"type": "FeatureCollection", "features": [feature]}
    [found] = read_objects(json.dumps(collection), SIZE)
    assert (found.object_type, found.class_name, found.is_locked) == ("annotation", "Tissue", True)
    assert (found.color, found.measurements) == ((16, 110, 140), {"b": 1.5})
    feature[place[0]][place[1]] = value
    with pytest.raises(AssertionError):
        read_objects(json.dumps(collection), SIZE)


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
