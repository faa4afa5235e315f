"""Is this a sound OME-Zarr pyramid? The folder is opened again as a stranger would open it.

Room 4 of 4. In: a folder, and what it should show. Out: ok, problems, facts. Not here: how it was
written; TIFF (validate.py).

zarr reads what is missing as the fill value: black instead of an error. So each shard's own list
of chunks is read here, byte by byte.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from wsi_stain.errors import DAMAGE, in_one_line
from wsi_stain.geometry import Region, Size
from wsi_stain.write import checks
from wsi_stain.write.probes import (
    Expected,
    Validation,
    check_content,
    check_levels_agree,
    probes,
)

__all__ = ["validate_omezarr"]

Pixels = npt.NDArray[np.uint8]

VERSION = "0.5"
AXES = [("c", "channel", None), ("y", "space", "micrometer"), ("x", "space", "micrometer")]
NO_CHUNK = 2**64 - 1
CHECKSUM_BYTES = 4
MOST_LACKING = 10_000  # shards that are looked for one by one: a lie may state any number


def validate_omezarr(path: Path, expected: Expected) -> Validation:
    """Check a folder: NGFF 0.5 metadata, levels, every shard's chunks, pixel size, some pixels.

    Parameters
    ----------
    path
        The folder. It is only read.
    expected
        What it should show.

    Returns
    -------
    Validation
        Never raises for a damaged or foreign folder: that is a problem like any other.
    """
    facts: dict[str, Any] = {"path": str(path)}
    problems: list[str] = []
    if not (path / "zarr.json").is_file():
        return Validation(False, ("the folder is no OME-Zarr: it has no zarr.json",), facts)
    try:
        problems.extend(_look(path, expected, facts))
    except DAMAGE as error:
        problems.append(f"the folder cannot be read as OME-Zarr: {in_one_line(error)}")
    return Validation(not problems, tuple(problems), facts)


def _look(path: Path, asked: Expected, facts: dict[str, Any]) -> Iterator[str]:
    group = zarr.open_group(path, mode="r", zarr_format=3)
    attributes = json.loads((path / "zarr.json").read_text(encoding="utf-8"))["attributes"]
    problems = list(_check_metadata(attributes["ome"]))
    yield from problems
    if problems:
        return
    multiscale = attributes["ome"]["multiscales"][0]
    levels = [_Level(group, path, dataset["path"]) for dataset in multiscale["datasets"]]
    stated_mpp = [
        float(dataset["coordinateTransformations"][0]["scale"][2])
        for dataset in multiscale["datasets"]
    ]
    facts |= {
        "bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        "levels": [list(level.size) for level in levels],
        "tile_px": list(levels[0].array.chunks[:0:-1]),
        "tiles": sum(level.n_tiles for level in levels),
        "codec": "zstd, sharded",
        "mpp": stated_mpp[0],
        "name": multiscale.get("name", ""),
    }
    problems = list(_check_frame(levels, stated_mpp, asked))
    for number, level in enumerate(levels):
        problems += _check_shards(number, level)
    yield from problems
    if not problems:
        yield from _check_decoding(levels, facts)
        yield from check_levels_agree(levels)
        yield from check_content(levels[0], asked, facts)


class _Level:
    """One level: its array and its files."""

    def __init__(self, group: zarr.Group, folder: Path, name: str) -> None:
        array = group[name]
        if not isinstance(array, zarr.Array) or array.ndim != 3 or array.shards is None:
            raise ValueError(f"level {name} is no sharded array of three axes")
        self.array: zarr.Array[Any] = array
        self.folder = folder / name
        self.shards: tuple[int, ...] = array.shards

    @property
    def size(self) -> Size:
        """Size, px."""
        return Size(self.array.shape[2], self.array.shape[1])

    @property
    def n_tiles(self) -> int:
        """Chunks of one channel."""
        (_, height_px, width_px), (_, step_y, step_x) = self.array.shape, self.array.chunks
        return int(-(-height_px // step_y) * -(-width_px // step_x))

    def region(self, region: Region) -> Pixels:
        """Read a region, clipped to the level, uint8 (h, w, 3)."""
        clip = region.intersect(Region(0, 0, *self.size))
        rows, columns = slice(clip.y_px, clip.bottom_px), slice(clip.x_px, clip.right_px)
        return np.moveaxis(np.asarray(self.array[:, rows, columns], np.uint8), 0, -1)


# ---- metadata -------------------------------------------------------------------------------


def _check_metadata(ome: Mapping[str, Any]) -> Iterator[str]:
    if ome.get("version") != VERSION:
        yield f"the metadata have version {ome.get('version')!r}, not {VERSION!r}"
    multiscales = ome.get("multiscales", [])
    if len(multiscales) != 1:
        yield f"the metadata describe {len(multiscales)} pictures instead of 1"
        return
    axes = [(axis["name"], axis.get("type"), axis.get("unit")) for axis in multiscales[0]["axes"]]
    if axes != AXES:
        yield f"the axes are {axes}, not c, y, x with y and x in micrometer"
    datasets = multiscales[0]["datasets"]
    scales = [dataset["coordinateTransformations"][0].get("scale", []) for dataset in datasets]
    if not scales or any(len(scale) != 3 or scale[1] != scale[2] for scale in scales):
        yield "not every level states a pixel size, the same in y and x"
    channels = ome.get("omero", {}).get("channels", [])
    if len(channels) != 3:
        yield f"the metadata name {len(channels)} channels instead of red, green and blue"


def _check_frame(levels: list[_Level], stated_mpp: list[float], asked: Expected) -> Iterator[str]:
    """Check sizes and pixel sizes: what is stated, and what was asked for."""
    true_mpp = asked.mpp_out or stated_mpp[0]
    if asked.size is not None and levels[0].size != asked.size:
        yield f"level 0 is {levels[0].size} instead of {asked.size}"
    if not checks.SANE_MPP[0] <= true_mpp <= checks.SANE_MPP[1]:
        yield f"level 0 states {true_mpp:.6g} um/px, no sane pixel size"
    for number, mpp in enumerate(stated_mpp):
        if not checks.close(mpp, true_mpp * 2**number):
            yield f"level {number} states {mpp:.6g} um/px instead of {true_mpp * 2**number:.6g}"
    for number, level in enumerate(levels):
        if level.array.shape[0] != 3 or level.array.dtype != np.uint8:
            yield f"level {number} is {level.array.dtype} of {level.array.shape[0]} channels"
    for number, (below, level) in enumerate(pairwise(levels), start=1):
        half = Size(-(-below.size.width_px // 2), -(-below.size.height_px // 2))
        if level.size != half:
            yield f"level {number} is {level.size}, not {half}"


# ---- shards and pixels ----------------------------------------------------------------------


def _check_shards(number: int, level: _Level) -> Iterator[str]:
    """Check that each shard is there and lists all its chunks, inside of the file."""
    grid = [-(-side // step) for side, step in zip(level.array.shape, level.shards, strict=True)]
    n_shards, n_files = math.prod(grid), sum(f.is_file() for f in level.folder.rglob("*"))
    if n_shards > n_files + MOST_LACKING:
        yield f"level {number}: {n_shards:,} shards are stated, and {n_files:,} files are there"
        return
    wrong = []
    for place in np.ndindex(*grid):
        fault = _shard_fault(level, place)
        if fault:
            wrong.append(f"shard {'/'.join(map(str, place))} {fault}")
    if wrong:
        yield f"level {number}: {wrong[0]}; {len(wrong)} of {n_shards} so"


def _shard_fault(level: _Level, place: tuple[int, ...]) -> str:
    """Say what is wrong with a shard; empty where nothing is."""
    file = level.folder.joinpath("c", *map(str, place))
    if not file.is_file():
        return "is missing"
    per_shard = [a // b for a, b in zip(level.shards, level.array.chunks, strict=True)]
    index_bytes = 16 * int(np.prod(per_shard)) + CHECKSUM_BYTES
    n_bytes = file.stat().st_size
    if n_bytes < index_bytes:
        return f"is cut off at {n_bytes} bytes"
    with file.open("rb") as stream:
        stream.seek(n_bytes - index_bytes)
        index = np.frombuffer(stream.read(index_bytes - CHECKSUM_BYTES), "<u8")
    offsets, counts = index.reshape(*per_shard, 2)[_inside(level, place)].reshape(-1, 2).T
    if (offsets == NO_CHUNK).any():
        return "lacks a chunk"
    ends = offsets.astype(np.float64) + counts.astype(np.float64)
    return "" if (ends <= n_bytes - index_bytes).all() else "is cut off or damaged"


def _inside(level: _Level, place: tuple[int, ...]) -> tuple[slice, ...]:
    """Select the chunks of a shard that cover the level: at its edge not all do."""
    sides = zip(place, level.array.shape, level.shards, level.array.chunks, strict=True)
    return tuple(
        slice(0, -(-min(shard, side - at * shard) // chunk)) for at, side, shard, chunk in sides
    )


def _check_decoding(levels: list[_Level], facts: dict[str, Any]) -> Iterator[str]:
    """Decode the chunks of some regions of every level."""
    facts["decoded_regions"] = 0
    for number, level in enumerate(levels):
        for probe in probes(level.size):
            try:
                level.region(probe)
            except DAMAGE as error:
                at = f"x {probe.x_px}, y {probe.y_px}"
                yield f"level {number}: {at} cannot be decoded: {in_one_line(error)}"
                break
            facts["decoded_regions"] += 1
