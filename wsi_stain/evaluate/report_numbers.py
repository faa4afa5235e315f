"""The numbers of a report: metrics on a few fields, and a look at every place of the slide.

In: H&E and virtual IHC, uint8 RGB, same frame. Out: numbers, doubtful places. Not here: what a
metric means (`metrics` and its siblings), pages.

No real stain of this slide is known, so nothing here says that the stain is right; the numbers say
how much of it there is, and whether the tissue's structure and its open spaces were kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsi_stain.config import Rgb
from wsi_stain.errors import OutputError
from wsi_stain.evaluate.metrics import Whitespace, sobel_ssim, whitespace_error
from wsi_stain.evaluate.metrics_nuclei import (
    MAX_MPP,
    LabellingIndex,
    labelling_index,
    stain_densities,
)
from wsi_stain.evaluate.metrics_stain import POSITIVE_OD, dab_p90
from wsi_stain.geometry import Region
from wsi_stain.manifest import RunRecord
from wsi_stain.stain.density import is_stained

__all__ = [
    "Doubt",
    "FieldNumbers",
    "Ruler",
    "SlideNumbers",
    "Whites",
    "count_positive",
    "find_doubts",
    "measure_field",
]

Rgb8 = NDArray[np.uint8]

FAINT_OD = 0.05  # natural log: above the noise of glass, below the palest stroma
MOSTLY_TISSUE = 0.5
LOST_FRACTION = 0.05
INVENTED_FRACTION = 0.05


class Whites(NamedTuple):
    """Grey levels of the glass in both pictures."""

    he: Rgb
    ihc: Rgb

    @classmethod
    def recorded(cls, record: RunRecord) -> Whites:
        """Take them from what a run's record holds of its color fit.

        Raises
        ------
        OutputError
            There are none yet.
        """
        he, ihc = record.stain.get("white"), record.output_white
        if not he or ihc is None:
            raise OutputError(
                "The run's record holds no color fit yet.",
                hint="Run wsi-stain translate again; it goes on where it stopped.",
            )
        return cls(tuple(he), ihc)


@dataclass(frozen=True)
class FieldNumbers:
    """What was measured on one field.

    Attributes
    ----------
    region
        Place, px of the out frame.
    labelling
        None where pixels are too large to see nuclei.
    n_tissue_px, n_positive_px
        Pixels that are stained in the H&E; those of them with DAB OD over the glass above
        `POSITIVE_OD`.
    dab_p90
        Mean DAB OD of the strongest tenth of all pixels, log10.
    whitespace, sobel_ssim
        Against the H&E.
    """

    region: Region
    labelling: LabellingIndex | None
    n_tissue_px: int
    n_positive_px: int
    dab_p90: float
    whitespace: Whitespace
    sobel_ssim: float

    @property
    def positive_fraction(self) -> float | None:
        """Share of the tissue's pixels that are positive; None without tissue."""
        return self.n_positive_px / self.n_tissue_px if self.n_tissue_px else None


class SlideNumbers(NamedTuple):
    """Fields together: areas and nuclei pooled, likeness averaged."""

    labelling: LabellingIndex | None
    positive_fraction: float | None
    dab_p90: float
    whitespace_error: float
    whitespace_signed: float
    sobel_ssim: float

    @classmethod
    def of(cls, fields: Sequence[FieldNumbers]) -> SlideNumbers:
        """Summarize at least one field."""
        counted = [field.labelling for field in fields if field.labelling is not None]
        n_tissue_px = sum(field.n_tissue_px for field in fields)
        n_positive_px = sum(field.n_positive_px for field in fields)
        return cls(
            labelling=_pool(counted) if len(counted) == len(fields) else None,
            positive_fraction=n_positive_px / n_tissue_px if n_tissue_px else None,
            dab_p90=_mean(field.dab_p90 for field in fields),
            whitespace_error=_mean(field.whitespace.error_fraction for field in fields),
            whitespace_signed=_mean(field.whitespace.signed_fraction for field in fields),
            sobel_ssim=_mean(field.sobel_ssim for field in fields),
        )


class Doubt(NamedTuple):
    """A place to look at, px of the picture that was searched.

    Attributes
    ----------
    region
        The cell.
    reason
        "lost": tissue in the H&E, next to nothing in the output. "invented": stain where the
        H&E shows bare glass.
    """

    region: Region
    reason: str


class Ruler(NamedTuple):
    """What fields are measured with.

    Attributes
    ----------
    whites
        Glass of H&E and output.
    mpp
        Pixel size of both, um/px.
    detail_um
        Pixel size of the H&E as scanned, where that is coarser: what is smaller was seen by nobody.
    """

    whites: Whites
    mpp: float
    detail_um: float


def measure_field(he: Rgb8, ihc: Rgb8, region: Region, ruler: Ruler) -> FieldNumbers:
    """Measure one field.

    Parameters
    ----------
    he, ihc
        uint8 (h, w, 3), equal shapes, in the out frame's resolution.
    region
        Where they are from.
    ruler
        What to measure with.
    """
    whites, mpp, detail_um = ruler
    n_tissue_px, n_positive_px = count_positive(he, ihc, whites)
    return FieldNumbers(
        region=region,
        labelling=labelling_index(ihc, mpp, white=whites.ihc) if detail_um <= MAX_MPP else None,
        n_tissue_px=n_tissue_px,
        n_positive_px=n_positive_px,
        dab_p90=dab_p90(ihc),
        whitespace=whitespace_error(ihc, he, whites.ihc, whites.he),
        sobel_ssim=sobel_ssim(ihc, he),
    )


def count_positive(he: Rgb8, ihc: Rgb8, whites: Whites) -> tuple[int, int]:
    """Count a field's tissue pixels, and those of them that are positive.

    Parameters
    ----------
    he, ihc
        uint8 (h, w, 3), equal shapes, in the out frame's resolution.
    whites
        Glass of both.
    """
    tissue = is_stained(he, whites.he)
    positive = stain_densities(ihc, whites.ihc)[..., 1] > POSITIVE_OD
    return int(tissue.sum()), int((tissue & positive).sum())


def find_doubts(he: Rgb8, ihc: Rgb8, whites: Whites, cell_px: int) -> tuple[list[Doubt], int]:
    """Compare the whole slide cell by cell.

    Parameters
    ----------
    he, ihc
        uint8 (h, w, 3), equal shapes, reduced as need be.
    whites
        Glass of both.
    cell_px
        Side of a cell, px.

    Returns
    -------
    tuple
        Doubtful cells, and how many cells were looked at.

    Notes
    -----
    Memory bound: a row of cells.
    """
    doubts: list[Doubt] = []
    n_cells = 0
    height_px, width_px = he.shape[:2]
    for y_px in range(0, height_px, cell_px):
        rows = slice(y_px, y_px + cell_px)
        tissue = is_stained(he[rows], whites.he)
        glass = ~is_stained(he[rows], whites.he, FAINT_OD)
        stained = is_stained(ihc[rows], whites.ihc)
        faint = is_stained(ihc[rows], whites.ihc, FAINT_OD)
        for x_px in range(0, width_px, cell_px):
            cell = np.s_[:, x_px : x_px + cell_px]
            n_cells += 1
            reason = ""
            if tissue[cell].mean() >= MOSTLY_TISSUE and faint[cell].mean() < LOST_FRACTION:
                reason = "lost"
            elif (stained[cell] & glass[cell]).mean() > INVENTED_FRACTION:
                reason = "invented"
            if reason:
                height, width = tissue[cell].shape
                doubts.append(Doubt(Region(x_px, y_px, width, height), reason))
    return doubts, n_cells


def _pool(counted: Sequence[LabellingIndex]) -> LabellingIndex:
    n_nuclei = sum(index.n_nuclei for index in counted)
    n_positive = sum(index.n_positive for index in counted)
    return LabellingIndex(100.0 * n_positive / n_nuclei if n_nuclei else None, n_nuclei, n_positive)


def _mean(values: Iterator[float]) -> float:
    return float(np.mean(list(values)))
