"""Read GeoJSON as strictly as QuPath 0.5 to 0.7 does; what it would refuse or misread is an error.

Learned from its sources: `GsonTools`, `QuPathTypeAdapters`, `ROITypeAdapters`, `PathClass`,
`ObjectCountValueFactory`. Coordinates are reduced to 0.01 px there, which fails for the whole file
at the first polygon that is not valid; so validity is judged exactly, on that grid.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

GRID = 100  # steps per px
CHUNK = 128  # edges looked at together: neighbors lie close, few others near them
OBJECT_TYPES = ("annotation", "detection", "tile")  # of those that QuPath knows, what we write
# QuPath takes detections of these classes for cells, and reckons a "Positive %" from them.
CELL_CLASSES = {"Positive", "Negative", "1+", "2+", "3+"}

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class QuPathObject:
    """An object as QuPath holds it; rings in 0.01 px."""

    object_type: str
    class_name: str
    color: tuple[int, ...]
    name: str
    is_locked: bool
    measurements: dict[str, float]
    rings: list[Ints]


def read_objects(text: str, size: tuple[int, int]) -> list[QuPathObject]:
    """Read a FeatureCollection over a picture of `size`, width and height, px."""
    data = json.loads(text, parse_constant=_refuse)
    assert data["type"] == "FeatureCollection"
    return [_object(feature, size) for feature in data["features"]]


def _object(feature: dict[str, Any], size: tuple[int, int]) -> QuPathObject:
    assert feature["type"] == "Feature"
    assert "plane" not in feature["geometry"]
    properties = feature["properties"]
    assert properties["objectType"] in OBJECT_TYPES
    assert isinstance(properties["isLocked"], bool)
    name, color = _class(properties.get("classification"))
    return QuPathObject(
        properties["objectType"],
        name,
        color,
        properties["name"],
        properties["isLocked"],
        _measurements(properties["measurements"]),
        _polygon(feature["geometry"], size),
    )


def _class(node: dict[str, Any] | None) -> tuple[str, tuple[int, ...]]:
    if node is None:
        return "", ()
    assert {"name", "color"} <= set(node)  # or QuPath refuses the file
    name, color = node["name"], tuple(node["color"])
    assert name == name.strip() != ""
    assert not set(name) & set(":\n\r")  # a colon would derive a class
    assert name not in CELL_CLASSES
    assert len(color) == 3
    assert all(isinstance(value, int) and 0 <= value <= 255 for value in color)
    return name, color


def _measurements(node: dict[str, Any]) -> dict[str, float]:
    for name, value in node.items():
        assert name.strip() != ""
        assert isinstance(value, int | float)
        assert not isinstance(value, bool)
        assert math.isfinite(value)
    return node


def _polygon(geometry: dict[str, Any], size: tuple[int, int]) -> list[Ints]:
    assert geometry["type"] == "Polygon"
    rings = [np.rint(np.asarray(ring) * GRID).astype(np.int64) for ring in geometry["coordinates"]]
    for ring in rings:
        assert ring.shape[1] == 2
        assert len(ring) >= 4
        assert np.array_equal(ring[0], ring[-1])
        assert len(np.unique(ring[:-1], axis=0)) == len(ring) - 1
        assert ring.min() >= 0
        assert (ring.max(axis=0) <= np.asarray(size) * GRID).all()
        assert _twice_area(ring) != 0
        assert not touches(ring, ring)
    outer, *holes = rings
    assert not any(touches(hole, outer) for hole in holes)
    assert not any(touches(holes[i], holes[j]) for i, j in _near(holes))
    assert all(_is_inside(hole[0], outer) for hole in holes)
    return rings


def touches(one: Ints, other: Ints) -> bool:
    """Tell whether any edges of two rings meet, but for the ends that neighbors share."""
    n = len(other) - 1
    low, high = np.minimum(other[:-1], other[1:]), np.maximum(other[:-1], other[1:])
    for first in range(0, len(one) - 1, CHUNK):
        part = one[first : first + CHUNK + 1]
        near = (low <= part.max(axis=0)).all(axis=1) & (high >= part.min(axis=0)).all(axis=1)
        [there] = np.nonzero(near)
        meeting = _meet(part[:-1], part[1:], other[:-1][there], other[1:][there])
        if one is other:
            apart = (np.arange(first, first + len(part) - 1)[:, None] - there[None]) % n
            meeting &= (apart > 1) & (apart < n - 1)
        if meeting.any():
            return True
    return one is other and _folds(one)


def _meet(start: Ints, end: Ints, start_2: Ints, end_2: Ints) -> npt.NDArray[np.bool_]:
    """Tell which edges of one list meet which of another: bool (n, m)."""
    a, b, c, d = start[:, None], end[:, None], start_2[None], end_2[None]
    turns = [_side(a, b, c), _side(a, b, d), _side(c, d, a), _side(c, d, b)]
    meeting = (turns[0] * turns[1] < 0) & (turns[2] * turns[3] < 0)
    for turn, point, (p, q) in zip(
        turns, (c, d, a, b), ((a, b), (a, b), (c, d), (c, d)), strict=True
    ):
        between = (np.minimum(p, q) <= point) & (point <= np.maximum(p, q))
        meeting |= (turn == 0) & between.all(axis=-1)
    return np.asarray(meeting)


def _folds(ring: Ints) -> bool:
    """Tell whether a ring turns back on itself at a corner."""
    before = np.concatenate([ring[-2:-1], ring[:-2]])
    here, after = ring[:-1], ring[1:]
    back = ((here - before) * (after - here)).sum(axis=-1) < 0
    return bool(((_side(before, here, after) == 0) & back).any())


def _side(p: Ints, q: Ints, r: Ints) -> Ints:
    """Sign of the turn from p over q to r."""
    cross = (q - p)[..., 0] * (r - p)[..., 1] - (q - p)[..., 1] * (r - p)[..., 0]
    return np.asarray(np.sign(cross), np.int64)


def _near(rings: list[Ints]) -> Iterator[tuple[int, int]]:
    """Give pairs of rings whose boxes meet: a region may have thousands of holes."""
    low = np.array([ring.min(axis=0) for ring in rings]).reshape(-1, 2)
    high = np.array([ring.max(axis=0) for ring in rings]).reshape(-1, 2)
    for i in range(len(rings)):
        meets = (low[i + 1 :] <= high[i]).all(axis=1) & (high[i + 1 :] >= low[i]).all(axis=1)
        for step in np.flatnonzero(meets):
            yield i, i + 1 + int(step)


def _twice_area(ring: Ints) -> int:
    x, y = ring[:-1].T
    x_next, y_next = ring[1:].T
    return int(np.dot(x, y_next) - np.dot(x_next, y))


def _is_inside(point: Ints, ring: Ints) -> bool:
    """Count crossings of a ray to the right."""
    start, end = ring[:-1], ring[1:]
    spans = (start[:, 1] > point[1]) != (end[:, 1] > point[1])
    rise = end[spans, 1] - start[spans, 1]
    x = start[spans, 0] + (point[1] - start[spans, 1]) * (end - start)[spans, 0] / rise
    return bool((x > point[0]).sum() % 2)


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no number in JSON")
