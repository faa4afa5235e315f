"""Tiles of a slide that cannot be read: an error that names one, or background and a record.

Room 1 of 4. In: what a backend could not decode. Out: `TileError`, `MissingTile`. Not here: who
decides whether a slide may lack tiles (`reader`), how bytes are decoded.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from wsi_stain.errors import SlideError
from wsi_stain.files import atomic_write_bytes, remove_any
from wsi_stain.geometry import Region, Scale, Size

__all__ = [
    "UNDECODABLE",
    "Cell",
    "MissingTile",
    "TileError",
    "cells_of",
    "scaled",
    "tile_error",
    "touching",
    "write_table",
]

UNDECODABLE = "cannot be decoded"
COLUMNS = ("level", "row", "column", "x_px_l0", "y_px_l0", "width_px_l0", "height_px_l0", "reason")


class Cell(NamedTuple):
    """A tile of a level as the file cuts it: its level, row and column, and its place, level px."""

    level: int
    row: int
    column: int
    region: Region


class MissingTile(NamedTuple):
    """A tile that could not be read and is background in the result.

    Attributes
    ----------
    level, row, column
        Which one, as the file counts.
    region_l0
        Its place in the slide's frame, level-0 px; may reach over its edges.
    reason
        Why, in our own words: a library's may name paths.
    """

    level: int
    row: int
    column: int
    region_l0: Region
    reason: str


class TileError(SlideError):
    """One tile of an otherwise readable slide cannot be read (exit code 3).

    Attributes
    ----------
    cell, reason
        Which and why; `None` and empty once the error has left its process.
    """

    cell: Cell | None = None
    reason: str = ""


def tile_error(path: Path | str, cell: Cell, reason: str, said: str = "") -> TileError:
    """Word an error for a tile: slide, level, tile, and the flag that goes on without it.

    Parameters
    ----------
    path, cell
        Slide and tile.
    reason
        In our words: goes into records.
    said
        In a library's words, which may quote paths and tags: goes no further than the terminal.
    """
    details = f" ({said.rstrip('.')})" if said else ""
    error = TileError(
        f"Slide {path} is damaged: level {cell.level}, tile in row {cell.row} and column "
        f"{cell.column}, at {cell.region.x_px}, {cell.region.y_px} px: {reason}{details}.",
        hint="Copy the slide again; or leave such tiles as background and have them listed: "
        "wsi-stain translate SLIDE --allow-missing",
    )
    error.cell, error.reason = cell, reason
    return error


def cells_of(level: int, region: Region, tile: Size) -> Iterator[Cell]:
    """List the tiles of a level, all of one size, that a region touches, row by row."""
    for row in range(region.y_px // tile.height_px, -(-region.bottom_px // tile.height_px)):
        for column in range(region.x_px // tile.width_px, -(-region.right_px // tile.width_px)):
            place = Region(column * tile.width_px, row * tile.height_px, *tile)
            yield Cell(level, row, column, place)


def touching(
    missing: Iterable[MissingTile], level: int, regions_out: Sequence[Region], scale: Scale
) -> tuple[MissingTile, ...]:
    """Choose the missing tiles of a level that lie under any of some regions of the out frame."""
    frames = [scaled(region_out, scale.factor) for region_out in regions_out]
    return tuple(
        tile
        for tile in missing
        if tile.level == level
        and any(0 not in tile.region_l0.intersect(frame).size for frame in frames)
    )


def scaled(region: Region, factor: float) -> Region:
    """Give a region in the px of another frame, `factor` of them per px of its own."""
    x_px, y_px, width_px, height_px = (round(side * factor) for side in region)
    return Region(x_px, y_px, width_px, height_px)


def write_table(path: Path, missing: Sequence[MissingTile]) -> None:
    """Write the table of missing tiles; none: there is no table, also none from before.

    Raises
    ------
    OutputError
        Not writable.
    """
    if not missing:
        remove_any(path)
        return
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for tile in missing:
        table.writerow((tile.level, tile.row, tile.column, *tile.region_l0, tile.reason))
    atomic_write_bytes(path, text.getvalue().encode())
