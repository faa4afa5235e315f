"""What QuPath shows over a picture: tissue, positive regions, tiles, as its own GeoJSON.

Room 4 of 4. In: masks, boxes, numbers. Out: one ``.geojson`` beside the pyramid. Not here: what is
measured or flagged.

QuPath's conventions (``qupath.lib.io.QuPathTypeAdapters``, 0.5 to 0.7): a FeatureCollection;
``properties`` hold `objectType` ("annotation", "detection" or "tile"), `name`, `classification`
(name and RGB), `isLocked` and `measurements` (name to number). Coordinates are level-0 px of the
picture, x to the right and y down; rings are closed and lie inside of the picture. QuPath reduces
them to two decimals, and gives up the whole file at the first polygon that is not valid.

Regions are no nuclei: QuPath counts each detection of class "Positive" as a positive cell, and
would show a "Positive %" of 100 for every annotation. So the class of a region is another one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from wsi_stain.errors import OutputError, WsiStainError
from wsi_stain.files import PART_SUFFIX, replace_durably
from wsi_stain.geometry import Region, Size
from wsi_stain.write.rings import ring_area, trace

__all__ = [
    "FLAGGED",
    "HOT_SPOT",
    "MISSING",
    "POSITIVE",
    "TILE",
    "TISSUE",
    "Feature",
    "Look",
    "box_feature",
    "circle_feature",
    "mask_features",
    "write_geojson",
]

Bools = npt.NDArray[np.bool_]
Points = npt.NDArray[np.float64]
Feature = dict[str, Any]
ObjectType = Literal["annotation", "detection", "tile"]

CIRCLE_POINTS = 96
DIGITS = 2  # of coordinates, px
LEAST_AREA_PX2 = 0.5


class Look(NamedTuple):
    """How QuPath shows objects.

    Attributes
    ----------
    object_type
        Annotations can be edited and hold others; detections are light; tiles carry numbers.
    class_name, color
        Its class, and the color of that, RGB; an empty name is none.
    """

    object_type: ObjectType
    class_name: str
    color: tuple[int, int, int]


TISSUE = Look("annotation", "Tissue", (16, 110, 140))
POSITIVE = Look("detection", "Positive region", (250, 62, 62))  # the color of QuPath's "Positive"
FLAGGED = Look("annotation", "Flagged", (232, 89, 12))
MISSING = Look("annotation", "Missing in the slide", (120, 120, 120))
TILE = Look("tile", "", (0, 0, 0))
HOT_SPOT = Look("annotation", "Hot spot", (255, 200, 0))


def mask_features(
    mask: Bools, step: float, size: Size, look: Look, *, mpp: float, least_px: int = 1
) -> Iterator[Feature]:
    """Turn a mask into objects, one a piece, with holes, and their area.

    Parameters
    ----------
    mask
        bool (h, w).
    step
        Level-0 px per mask px.
    size
        Of the picture, level-0 px; what reaches over it is cut.
    look
        Type and class.
    mpp
        Pixel size of the picture, um/px.
    least_px
        Smaller pieces are left out, mask px.
    """
    for number, polygon in enumerate(trace(mask, least_px), start=1):
        outer, *holes = (_cut(ring * step, size) for ring in (polygon.outer, *polygon.holes))
        if not _has_area(outer):
            continue  # what lies over the edge was cut off
        # GeoJSON (RFC 7946) wants outer rings counterclockwise by its formula, y up; on a picture
        # with y down that is how these rings turn already.
        coordinates = [ring.tolist() for ring in (outer, *filter(_has_area, holes))]
        area_um2 = polygon.area_px * (step * mpp) ** 2
        yield _feature(
            coordinates, look, f"{look.class_name} {number}", {"Area um^2": round(area_um2, 1)}
        )


def box_feature(
    box: Region, size: Size, look: Look, name: str, measurements: Mapping[str, float | None]
) -> Feature:
    """Turn a rectangle, level-0 px, into an object, cut where it reaches over the picture."""
    inside = box.intersect(Region(0, 0, *size))
    left, top = float(inside.x_px), float(inside.y_px)
    right, bottom = float(inside.right_px), float(inside.bottom_px)
    ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    return _feature([ring], look, name, measurements)


def circle_feature(
    center_xy_px: tuple[float, float],
    radius_px: float,
    size: Size,
    look: Look,
    measurements: Mapping[str, float | None],
) -> Feature:
    """Turn a circle, level-0 px, into an object, cut where it reaches over the picture."""
    angle = np.linspace(0.0, 2.0 * math.pi, CIRCLE_POINTS + 1)
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius_px + center_xy_px
    cut = np.round(np.clip(ring, 0.0, (size.width_px, size.height_px)), DIGITS)
    cut[-1] = cut[0]
    return _feature([cut.tolist()], look, look.class_name, measurements)


def write_geojson(path: Path, features: Iterable[Feature]) -> int:
    """Write a FeatureCollection, one feature a line, so that it is whole or not there.

    Parameters
    ----------
    path
        Final name.
    features
        Objects, drawn one by one: memory does not grow with their number.

    Returns
    -------
    int
        Number of features.

    Raises
    ------
    OutputError
        The folder is missing or read-only, or the disk is full. Errors of `features` pass.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}{PART_SUFFIX}")
    count = 0
    try:
        with part.open("wb") as stream:
            stream.write(b'{"type":"FeatureCollection","features":[')
            for feature in features:
                stream.write((b",\n" if count else b"\n") + msgspec.json.encode(feature))
                count += 1
            stream.write(b"\n]}\n")
        replace_durably(part, path)
    except WsiStainError:  # of the features: some of this family are OSErrors too
        raise
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror}.",
            hint="Check free space and permissions, or choose another folder with --out.",
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return count


def _cut(ring: Points, size: Size) -> Points:
    """Cut a ring at the edges of the picture, round it, and drop points that fell together."""
    cut = np.round(np.clip(ring, 0.0, (size.width_px, size.height_px)), DIGITS)
    moves = np.any(cut[1:] != cut[:-1], axis=1)
    return np.concatenate([cut[:1], cut[1:][moves]])


def _has_area(ring: Points) -> bool:
    """Tell a ring from a line: cut at the edge, the last pixels of a mask may be flat."""
    return abs(ring_area(ring)) >= LEAST_AREA_PX2


def _feature(
    rings: list[list[list[float]]],
    look: Look,
    name: str,
    measurements: Mapping[str, float | None],
) -> Feature:
    properties: Feature = {
        "objectType": look.object_type,
        "name": name,
        "isLocked": look.object_type == "annotation",
        "measurements": {key: value for key, value in measurements.items() if value is not None},
    }
    if look.class_name:
        properties["classification"] = {"name": look.class_name, "color": list(look.color)}
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": rings},
        "properties": properties,
    }
