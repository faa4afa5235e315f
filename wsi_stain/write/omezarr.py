"""One OME-Zarr pyramid (NGFF 0.5, zarr v3, sharded), written in one pass from bands of rows.

Room 4 of 4. In: size, bands, pixel size, settings. Out: a folder ``*.ome.zarr`` that napari,
ome-zarr and dask open level by level. Not here: TIFF, patches, the check of what was written.

Pixels are kept exactly (zstd), so the folder is larger than the JPEG pyramid.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import ZstdCodec

from wsi_stain.config import WriteConfig
from wsi_stain.errors import OutputError
from wsi_stain.files import (
    PART_SUFFIX,
    flush_tree,
    land_folder,
    refuse_existing,
    remove_any,
    size_bytes,
    writing,
)
from wsi_stain.geometry import Size, pyramid_sizes
from wsi_stain.write.levels import halve
from wsi_stain.write.tiff import DESCRIPTION, PyramidFacts

__all__ = ["NGFF_VERSION", "describe_levels", "write_omezarr"]

Pixels = npt.NDArray[np.uint8]

NGFF_VERSION = "0.5"
CHUNKS_PER_SHARD = 16  # per channel, in x: a shard is one row of chunks, so rows are written whole
ZSTD_LEVEL = 1  # level 3: 2 % fewer bytes, 1.6 times the time
CHANNELS = (("Red", "FF0000"), ("Green", "00FF00"), ("Blue", "0000FF"))


def write_omezarr(
    path: Path,
    size: Size,
    bands: Iterable[Pixels],
    mpp_out: float,
    spec: WriteConfig,
    *,
    name: str,
    description: str = DESCRIPTION,
) -> PyramidFacts:
    """Write a pyramid; the folder appears under its name only when it is whole and on disk.

    Memory bound: per level one row of chunks gathers, and one is encoded; with the halving of
    widths that is four rows of chunks of level 0. Flat in the height.

    Parameters
    ----------
    path
        Output, ``*.ome.zarr``. Work happens in ``<path>.part`` in the same folder.
    size
        Size of level 0, px.
    bands
        uint8 (h, W, 3) of any h, RGB 0..255, top to bottom, `size` in all.
    mpp_out
        Pixel size, um/px.
    spec
        Chunk side (`tile_px`), and whether an existing folder may be replaced.
    name, description
        Written into the metadata.

    Raises
    ------
    OutputError
        The folder exists, cannot be written, the disk is full, or the bands do not add up to
        `size`. Nothing is left behind. Errors of `bands` itself pass unchanged.
    """
    started_s = time.perf_counter()
    _refuse_what_lies_there(path, spec)
    sizes = pyramid_sizes(size)
    part = path.with_name(path.name + PART_SUFFIX)
    try:
        with writing(part):
            remove_any(part)  # what a killed run left
            sinks = _create(part, sizes, spec, describe_levels(name, sizes, mpp_out, description))
        _pour(bands, sinks[0], size, part)
        with writing(part):
            flush_tree(part)
            n_bytes = size_bytes(part)
            _refuse_what_lies_there(path, spec)
            land_folder(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)  # only where it got no name of its own
    n_tiles = sum(sink.n_tiles for sink in sinks)
    seconds = time.perf_counter() - started_s
    return PyramidFacts(path, tuple(sizes), mpp_out, n_tiles, n_bytes, seconds)


def describe_levels(
    name: str, sizes: list[Size], mpp_out: float, description: str = DESCRIPTION
) -> dict[str, Any]:
    """Build the attributes of the root group: ``ome`` as NGFF 0.5 asks, and our statement.

    A pixel of level n is the mean of 2^n x 2^n pixels: its center lies ``(2^n - 1) / 2`` pixels of
    level 0 right of and below the first one's, which the translation says.
    """
    datasets = []
    for number in range(len(sizes)):
        step_um, shift_um = mpp_out * 2**number, mpp_out * (2**number - 1) / 2
        transforms: list[dict[str, Any]] = [{"type": "scale", "scale": [1.0, step_um, step_um]}]
        if number:
            transforms.append({"type": "translation", "translation": [0.0, shift_um, shift_um]})
        datasets.append({"path": str(number), "coordinateTransformations": transforms})
    axes = [
        {"name": "c", "type": "channel"},
        {"name": "y", "type": "space", "unit": "micrometer"},
        {"name": "x", "type": "space", "unit": "micrometer"},
    ]
    multiscale = {
        "name": name,
        "axes": axes,
        "datasets": datasets,
        "type": "2 x 2 mean",
        "metadata": {"description": description},
    }
    channels = [_channel(label, color) for label, color in CHANNELS]
    omero = {"name": name, "channels": channels, "rdefs": {"model": "color"}}
    ome = {"version": NGFF_VERSION, "multiscales": [multiscale], "omero": omero}
    return {"ome": ome, "wsi_stain": {"statement": description}}


def _channel(label: str, color: str) -> dict[str, Any]:
    window = {"min": 0, "max": 255, "start": 0, "end": 255}
    return {"label": label, "color": color, "active": True, "window": window}


def _create(
    part: Path, sizes: list[Size], spec: WriteConfig, attributes: dict[str, Any]
) -> list[_Sink]:
    """Make group and arrays; level 0 first, each knowing the one above."""
    group = zarr.open_group(part, mode="w-", zarr_format=3, attributes=attributes)
    side_px = spec.tile_px
    sinks: list[_Sink] = []
    for number, size in reversed(list(enumerate(sizes))):
        across = min(CHUNKS_PER_SHARD, -(-size.width_px // side_px))
        array = group.create_array(
            str(number),
            shape=(3, size.height_px, size.width_px),
            dtype=np.uint8,
            chunks=(1, side_px, side_px),
            shards=(3, side_px, across * side_px),
            compressors=ZstdCodec(level=ZSTD_LEVEL),
            fill_value=0,
            dimension_names=("c", "y", "x"),
            # Else a black chunk would be no chunk, and a lost one could not be told from it.
            config={"write_empty_chunks": True},
        )
        sinks.insert(0, _Sink(array, side_px, part, sinks[0] if sinks else None))
    return sinks


def _pour(bands: Iterable[Pixels], sink: _Sink, size: Size, part: Path) -> None:
    done_px = 0
    for band in bands:
        if band.dtype != np.uint8 or band.ndim != 3 or band.shape[1:] != (size.width_px, 3):
            raise OutputError(
                f"{part}: the band at row {done_px} is {band.dtype} {band.shape}, not uint8 "
                f"(h, {size.width_px}, 3)."
            )
        done_px += len(band)
        if done_px > size.height_px:
            raise OutputError(
                f"{part}: the bands reach row {done_px}, but the picture has {size.height_px}."
            )
        sink.push(band)
    if done_px != size.height_px:
        raise OutputError(f"{part}: the bands end after {done_px} rows of {size.height_px}.")
    sink.finish()


class _Sink:
    """One level: gathers rows until they fill a row of chunks, writes it, hands its mean up."""

    def __init__(
        self, array: zarr.Array[Any], row_px: int, part: Path, above: _Sink | None
    ) -> None:
        self._array, self._row_px, self._part, self._above = array, row_px, part, above
        self._rows: list[Pixels] = []
        self._n_rows = 0
        self._done_px = 0

    @property
    def n_tiles(self) -> int:
        """Chunks of a channel."""
        _, height_px, width_px = self._array.shape
        return -(-height_px // self._row_px) * -(-width_px // self._row_px)

    def push(self, rows: Pixels) -> None:
        """Add rows, uint8 (h, W, 3)."""
        start = 0
        while start < len(rows):
            some = rows[start : start + self._row_px - self._n_rows]
            self._rows.append(some)
            self._n_rows += len(some)
            start += len(some)
            if self._n_rows == self._row_px:
                self._write()

    def finish(self) -> None:
        """Write what is left, here and above."""
        if self._n_rows:
            self._write()
        if self._above is not None:
            self._above.finish()

    def _write(self) -> None:
        rows = np.concatenate(self._rows) if len(self._rows) > 1 else self._rows[0]
        self._rows, self._n_rows = [], 0
        with writing(self._part):
            self._array[:, self._done_px : self._done_px + len(rows)] = rows.transpose(2, 0, 1)
        self._done_px += len(rows)
        if self._above is not None:
            self._above.push(halve(rows))


def _refuse_what_lies_there(path: Path, spec: WriteConfig) -> None:
    refuse_existing(path, overwrite=spec.overwrite)
    if path.is_dir() and not (path / "zarr.json").is_file() and any(path.iterdir()):
        raise OutputError(
            f"{path} is a folder of something else: it is not replaced.",
            hint="Move it, or choose another folder: --out DIR.",
        )
