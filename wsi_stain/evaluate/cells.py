"""Stain measured on a lattice of small cells, band by band: the one pass behind all numbers.

In: a picture and its ground. Out: a `CellTable`. Not here: what is made of the cells.

Cells of 32 um are small enough to search a hot spot on and to be summed into tiles of a heat map.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from wsi_stain.config import QuantifyConfig
from wsi_stain.evaluate.ground import Ground
from wsi_stain.evaluate.metrics_nuclei import MAX_MPP, REACH_UM, find_nuclei, stain_densities
from wsi_stain.evaluate.metrics_stain import dab_values
from wsi_stain.geometry import Region, Size
from wsi_stain.manifest import Event, Listener, ignore
from wsi_stain.slides.image import SlideSource
from wsi_stain.slides.mask import TissueMask

__all__ = ["CELL_UM", "CellTable", "measure_cells"]

Rgb8 = NDArray[np.uint8]
Bools = NDArray[np.bool_]
Sums = NDArray[np.float32]

CELL_UM = 32.0
BLOCK_PX = 1024


@dataclass(frozen=True, eq=False)
class CellTable:
    """Sums per cell, float32 (rows, columns) each; pixels and nuclei of tissue only.

    Attributes
    ----------
    tissue_px
        Pixels.
    positive_px
        Those with DAB OD above the limit, OD over the glass.
    iod, iod_imagej
        DAB OD, log10(255 / I), summed over tissue pixels: exact, and through ImageJ's 8 bits.
    nuclei, positive
        Nuclei with their middle here; those that are positive.
    surely, possibly
        Positive also when the sd over seeds is taken away, or added; as `positive` without one.
    sd
        Sd of DAB OD over seeds, summed over tissue pixels; zero without one.
    """

    tissue_px: Sums
    positive_px: Sums
    iod: Sums
    iod_imagej: Sums
    nuclei: Sums
    positive: Sums
    surely: Sums
    possibly: Sums
    sd: Sums

    @classmethod
    def empty(cls, n_rows: int, n_columns: int) -> CellTable:
        """Make a table of zeros."""
        return cls(*(np.zeros((n_rows, n_columns), np.float32) for _ in fields(cls)))

    def coarse(self, step: int) -> CellTable:
        """Sum squares of ``step x step`` cells; the last row and column may hold fewer."""
        return CellTable(*(_sum_squares(getattr(self, f.name), step) for f in fields(self)))

    def totals(self) -> dict[str, float]:
        """Sum over the slide, by name."""
        return {f.name: float(getattr(self, f.name).sum(dtype=np.float64)) for f in fields(self)}


def measure_cells(
    source: SlideSource, ground: Ground, config: QuantifyConfig, listener: Listener = ignore
) -> tuple[CellTable, int]:
    """Measure a picture, block by block, where it has tissue.

    Parameters
    ----------
    source
        The opened picture.
    ground
        Frame, tissue, glass.
    config
        Settings.
    listener
        Hears "quantify", in blocks.

    Returns
    -------
    tuple
        The table, and the side of a cell, px of ``ground.scale``.

    Notes
    -----
    Memory bound: one block of about 1216 x 1216 px with its densities (100 MB), and 36 bytes per
    cell: 4 MB per square centimeter.
    """
    scale = ground.scale
    cell_px = max(1, round(CELL_UM / scale.mpp_out))
    table = CellTable.empty(*(-(-side_px // cell_px) for side_px in reversed(scale.size_out)))
    blocks = [
        block
        for block in _blocks(scale.size_out, max(1, BLOCK_PX // cell_px) * cell_px)
        if ground.mask.fraction(block, scale.factor) > 0.0
    ]
    listener(Event("quantify", "start", total=len(blocks)))
    for done, block in enumerate(blocks, start=1):
        _measure_block(source, ground, config, block, _view(table, block, cell_px))
        listener(Event("quantify", "advance", done=done, total=len(blocks)))
    listener(Event("quantify", "finish", done=len(blocks), total=len(blocks)))
    return table, cell_px


def _measure_block(
    source: SlideSource, ground: Ground, config: QuantifyConfig, block: Region, table: CellTable
) -> None:
    """Fill the cells of a block; nuclei see what lies around it."""
    scale = ground.scale
    cell_px = max(1, round(CELL_UM / scale.mpp_out))
    margin_px = round(REACH_UM / scale.mpp_out)
    wide = Region(
        block.x_px - margin_px,
        block.y_px - margin_px,
        block.width_px + 2 * margin_px,
        block.height_px + 2 * margin_px,
    )
    pixels = source.read_out(wide, scale)
    core = np.ascontiguousarray(pixels[margin_px:-margin_px, margin_px:-margin_px])
    tissue = _tissue(ground.mask, block, scale.factor)
    dab = stain_densities(core, ground.white)[..., 1]
    table.tissue_px[:] = _sum_squares(tissue, cell_px)
    table.positive_px[:] = _sum_squares(tissue & (dab > config.positive_od), cell_px)
    table.iod[:] = _sum_squares(tissue * dab_values(core), cell_px)
    table.iod_imagej[:] = _sum_squares(tissue * dab_values(core, "imagej"), cell_px)
    sd = _spread(ground, block)
    table.sd[:] = _sum_squares(tissue * sd, cell_px)
    if ground.detail_um > MAX_MPP:
        return
    nuclei = find_nuclei(pixels, scale.mpp_out, ground.white)
    x_px, y_px = (nuclei.xy_px - margin_px).T
    here = (x_px >= 0) & (y_px >= 0) & (x_px < block.width_px) & (y_px < block.height_px)
    here[here] = tissue[y_px[here], x_px[here]]
    x_px, y_px, od = x_px[here], y_px[here], nuclei.dab_od[here]
    at = (y_px // cell_px, x_px // cell_px)
    doubt = sd[y_px, x_px]
    np.add.at(table.nuclei, at, 1)
    np.add.at(table.positive, at, od > config.positive_od)
    np.add.at(table.surely, at, od - doubt > config.positive_od)
    np.add.at(table.possibly, at, od + doubt > config.positive_od)


def _spread(ground: Ground, block: Region) -> Sums:
    """Read the sd over seeds of a block; zero without one, or where pixels are not level 0's."""
    if ground.uncertainty is None or ground.scale.factor != 1.0:
        return np.zeros((block.height_px, block.width_px), np.float32)
    return ground.uncertainty.read(block)


def _tissue(mask: TissueMask, block: Region, factor: float) -> Bools:
    """Look up the mask at the middles of a block's pixels."""
    step = factor / mask.downsample
    height, width = mask.pixels.shape
    ys = (np.arange(block.y_px, block.bottom_px) + 0.5) * step
    xs = (np.arange(block.x_px, block.right_px) + 0.5) * step
    rows = np.minimum(ys.astype(np.intp), height - 1)
    columns = np.minimum(xs.astype(np.intp), width - 1)
    return np.asarray(mask.pixels[np.ix_(rows, columns)])


def _sum_squares(values: NDArray[np.generic], side: int) -> Sums:
    """Sum squares of ``side x side``; what lacks at the right and the bottom counts nothing."""
    height, width = values.shape
    padded = np.pad(values, ((0, -height % side), (0, -width % side)))
    blocks = padded.reshape(padded.shape[0] // side, side, padded.shape[1] // side, side)
    return np.asarray(blocks.sum(axis=(1, 3), dtype=np.float64), np.float32)


def _view(table: CellTable, block: Region, cell_px: int) -> CellTable:
    """Give the part of a table that a block fills; writing to it writes to the table."""
    rows = slice(block.y_px // cell_px, -(-block.bottom_px // cell_px))
    columns = slice(block.x_px // cell_px, -(-block.right_px // cell_px))
    return CellTable(*(getattr(table, f.name)[rows, columns] for f in fields(table)))


def _blocks(size: Size, side_px: int) -> Iterator[Region]:
    whole = Region(0, 0, *size)
    for y_px in range(0, size.height_px, side_px):
        for x_px in range(0, size.width_px, side_px):
            yield Region(x_px, y_px, side_px, side_px).intersect(whole)
