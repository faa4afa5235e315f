"""The hot spot: the circle of tissue with the most positive nuclei.

In: a `CellTable`. Out: a `HotSpot`. Not here: measuring, pictures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from wsi_stain.evaluate.cells import CellTable

__all__ = ["HotSpot", "find_hot_spot"]

Sums = NDArray[np.float32]

LEAST_TISSUE = 0.75  # share of a circle
SMALLEST_MM2 = 0.01  # ten cells: below, a place is noise
ROUNDING = 1e-3  # of sums in float32


@dataclass(frozen=True)
class HotSpot:
    """A circle.

    Attributes
    ----------
    center_xy_um
        From the picture's corner.
    radius_um, area_mm2
        Its size; smaller than asked for where no circle of that size is tissue enough.
    positive_per_mm2
        Positive nuclei per area of tissue inside.
    n_nuclei, n_positive
        Counts inside.
    tissue_mm2
        Area of tissue inside.
    """

    center_xy_um: tuple[float, float]
    radius_um: float
    area_mm2: float
    positive_per_mm2: float
    n_nuclei: int
    n_positive: int
    tissue_mm2: float = 0.0


def find_hot_spot(
    table: CellTable, cell_um: float, px_um: float, area_mm2: float
) -> HotSpot | None:
    """Search the circle with the most positive nuclei per area of tissue.

    Parameters
    ----------
    table
        Cells.
    cell_um, px_um
        Side of a cell; of a pixel.
    area_mm2
        Wanted size; halved until three quarters of some circle are tissue, and it has no fewer
        positive nuclei per area than the whole: on a sliver of tissue the few circles that fit may
        all miss the dense end.

    Returns
    -------
    HotSpot or None
        None where even 0.01 mm2 finds no such circle, or no nucleus is positive.

    Notes
    -----
    Circles are made of whole cells: a circle of 1 mm2 has about 980 of 32 um.
    """
    if not table.positive.any():
        return None
    tissue_mm2 = table.tissue_px * np.float32((px_um / 1e3) ** 2)
    overall = float(table.positive.sum()) / max(float(tissue_mm2.sum()), 1e-9)
    while area_mm2 >= SMALLEST_MM2:
        disk = _disk(math.sqrt(area_mm2 * 1e6 / math.pi) / cell_um)
        disk_mm2 = float(disk.sum()) * (cell_um / 1e3) ** 2
        around_mm2 = _around(tissue_mm2, disk)
        enough = around_mm2 >= LEAST_TISSUE * disk_mm2
        positive = _around(table.positive, disk)
        density = np.where(enough, positive / np.maximum(around_mm2, 1e-9), -1.0)
        row, column = np.unravel_index(int(density.argmax()), density.shape)
        if density[row, column] >= overall * (1.0 - ROUNDING):
            return HotSpot(
                center_xy_um=((float(column) + 0.5) * cell_um, (float(row) + 0.5) * cell_um),
                radius_um=math.sqrt(disk_mm2 * 1e6 / math.pi),
                area_mm2=disk_mm2,
                positive_per_mm2=float(density[row, column]),
                n_nuclei=round(float(_around(table.nuclei, disk)[row, column])),
                n_positive=round(float(positive[row, column])),
                tissue_mm2=float(around_mm2[row, column]),
            )
        area_mm2 /= 2.0
    return None


def _disk(radius: float) -> Sums:
    """Give the cells of a disk: 1 where the middle lies inside; an odd side."""
    reach = int(radius)
    ys, xs = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    return np.asarray(ys * ys + xs * xs <= radius * radius, np.float32)


def _around(values: Sums, disk: Sums) -> Sums:
    """Sum over the disk around each cell; nothing lies outside of the table."""
    total = np.empty_like(values)
    cv2.filter2D(values, cv2.CV_32F, disk, dst=total, borderType=cv2.BORDER_CONSTANT)
    # Large kernels go through a Fourier transform, which leaves crumbs around zero.
    return np.maximum(total, np.float32(0.0), dtype=np.float32)
