"""Verb `quantify`: how much stain is on a picture, virtual or real, in the same units.

In: a pyramid or slide. Out: numbers, tables, a heat map, GeoJSON in one folder. Not here: the pass
over the pixels (`cells`), the files (`quantify_files`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from wsi_stain.config import QuantifyConfig
from wsi_stain.errors import NoTissueError
from wsi_stain.evaluate.cells import CellTable, measure_cells
from wsi_stain.evaluate.ground import Ground, find_ground, picture_name
from wsi_stain.evaluate.hotspot import HotSpot, find_hot_spot
from wsi_stain.evaluate.metrics_nuclei import KNOWN_ERROR, MAX_MPP
from wsi_stain.files import size_bytes
from wsi_stain.layout import QUANTIFY_SUFFIX
from wsi_stain.manifest import Event, Listener, ignore
from wsi_stain.slides.image import SlideSource
from wsi_stain.stain.doubt import doubt_ihc

__all__ = ["Numbers", "Quantified", "measure", "measured_folder"]

NUMBERS_SCHEMA = 1
NUMBERS_FILE = "numbers.json"
DOUBT_MPP = 16.0


class Numbers(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured on a whole picture: `numbers.json`. None means: not measurable.

    Attributes
    ----------
    picture, digest, picture_bytes
        Name without ending, the identity of its content, its size on disk: what cheaply tells
        whether a picture of that name is still this one.
    statement
        What kind of stain this is.
    size, mpp, measured_mpp
        Of level 0; um/px of level 0 and of the pixels that were measured.
    tissue_mm2, tissue_origin, white, white_origin
        Area of tissue and the glass, and where both were found.
    positive_od
        log10 DAB OD above which a pixel, or a nucleus over its haze, is positive.
    positive_area_percent
        Of the tissue's pixels.
    iod_exact, iod_imagej, miod_exact, miod_imagej
        DAB OD log10(255 / I) summed over tissue pixels of `measured_mpp`, and its mean.
    n_nuclei, n_positive, labelling_percent, positive_per_mm2
        By nucleus.
    nuclei_error
        How far the count is from annotators.
    hot_spot, hot_spot_note
        The place with the most positive nuclei.
    mean_dab_sd, labelling_low_percent, labelling_high_percent, uncertainty_note
        Spread over noise seeds, and the index with each nucleus' DAB moved down and up by it.
    doubts
        Why these numbers may mean nothing: the picture looks like no IHC.
    """

    schema: int = NUMBERS_SCHEMA
    picture: str
    digest: str
    picture_bytes: int = 0
    statement: str
    size: str
    mpp: float
    measured_mpp: float
    tissue_mm2: float
    tissue_origin: str
    white: tuple[float, float, float]
    white_origin: str
    positive_od: float
    positive_area_percent: float
    iod_exact: float
    iod_imagej: float
    miod_exact: float
    miod_imagej: float
    n_nuclei: int | None
    n_positive: int | None
    labelling_percent: float | None
    positive_per_mm2: float | None
    nuclei_error: str
    hot_spot: HotSpot | None
    hot_spot_note: str
    mean_dab_sd: float | None
    labelling_low_percent: float | None
    labelling_high_percent: float | None
    uncertainty_note: str
    doubts: tuple[str, ...] = ()

    def full(self) -> dict[str, Any]:
        """Give all fields, for machines."""
        fields: dict[str, Any] = msgspec.to_builtins(self)
        return fields

    def facts(self) -> dict[str, str]:
        """Word what a person reads first."""
        spot = self.hot_spot
        shown = {
            "picture": f"{self.picture}, {self.size}, {self.mpp:.4g} um/px ({self.statement})",
            "tissue": f"{self.tissue_mm2:.3g} mm2 (from: {self.tissue_origin})",
            "glass": f"{', '.join(f'{level:.0f}' for level in self.white)} ({self.white_origin})",
            "positive area": f"{self.positive_area_percent:.2f} % (DAB OD > {self.positive_od:g})",
            "DAB OD": f"mean {self.miod_exact:.3f}, ImageJ's way {self.miod_imagej:.3f}",
            "IOD": f"{self.iod_exact:,.0f}, ImageJ's way {self.iod_imagej:,.0f}",
        }
        if self.labelling_percent is not None:
            shown["labelling index"] = (
                f"{self.labelling_percent:.1f} %: {self.n_positive:,} of {self.n_nuclei:,} nuclei"
            )
        counted = self.labelling_percent is not None
        shown["its error" if counted else "labelling index"] = self.nuclei_error
        if spot is not None:
            x_um, y_um = spot.center_xy_um
            shown["hot spot"] = (
                f"{spot.positive_per_mm2:,.0f} positive nuclei per mm2 of tissue at "
                f"{x_um / 1e3:.3f}, {y_um / 1e3:.3f} mm ({spot.n_positive:,} of "
                f"{spot.n_nuclei:,} nuclei on {spot.tissue_mm2:.3g} mm2)"
            )
        shown["hot spot" if spot is None else "its size"] = self.hot_spot_note
        if self.mean_dab_sd is not None:
            shown["sd of DAB OD"] = (
                f"{self.mean_dab_sd:.3f} over seeds; one sd less or more brown: index "
                f"{self.labelling_low_percent or 0:.1f} to {self.labelling_high_percent or 0:.1f} %"
            )
        shown["uncertainty"] = self.uncertainty_note
        if self.doubts:
            shown["doubt"] = " ".join(self.doubts)
        return shown


@dataclass(frozen=True)
class Quantified:
    """A measured picture.

    Attributes
    ----------
    numbers
        Of the whole picture.
    table, cell_px
        Cells, and their side, px of ``ground.scale``.
    ground
        What was measured on.
    """

    numbers: Numbers
    table: CellTable
    cell_px: int
    ground: Ground

    @property
    def cell_um(self) -> float:
        """Side of a cell, um: near 32, a whole number of pixels."""
        return self.cell_px * self.ground.scale.mpp_out

    def tile_step(self, tile_um: float) -> int:
        """Cells per tile of the heat map: near the size asked for."""
        return max(1, round(tile_um / self.cell_um))


def measured_folder(picture: Path) -> Path:
    """Name the folder beside a picture where its numbers go."""
    return picture.with_name(picture_name(picture) + QUANTIFY_SUFFIX)


def measure(source: SlideSource, config: QuantifyConfig, listener: Listener = ignore) -> Quantified:
    """Measure the stain of a whole picture.

    Parameters
    ----------
    source
        Virtual or real IHC.
    config
        Settings.
    listener
        Hears the pass.

    Raises
    ------
    NoTissueError
        Nothing on the picture is tissue.
    """
    ground = find_ground(source, config)
    doubts = doubt_ihc(source.thumbnail(DOUBT_MPP), ground.white)
    for doubt in doubts:
        listener(Event("quantify", "note", text=doubt))
    table, cell_px = measure_cells(source, ground, config, listener)
    totals = table.totals()
    if totals["tissue_px"] == 0.0:
        raise NoTissueError(
            f"No tissue found on {source.path}, {source.size_l0}.",
            hint="Is this a stained slide? wsi-stain info shows what is known of it.",
        )
    px_um = ground.scale.mpp_out
    can_count = ground.detail_um <= MAX_MPP
    spot = find_hot_spot(table, cell_px * px_um, px_um, config.hot_spot_mm2) if can_count else None
    tissue_px = totals["tissue_px"]
    numbers = Numbers(
        picture=picture_name(source.path),
        digest=source.digest,
        picture_bytes=size_bytes(source.path),
        statement="virtual stain, research use only" if ground.is_virtual else "as scanned",
        size=str(source.size_l0),
        mpp=source.mpp_l0,
        measured_mpp=px_um,
        tissue_mm2=tissue_px * (px_um / 1e3) ** 2,
        tissue_origin=ground.tissue_origin,
        white=ground.white,
        white_origin=ground.white_origin,
        positive_od=config.positive_od,
        positive_area_percent=100.0 * totals["positive_px"] / tissue_px,
        iod_exact=totals["iod"],
        iod_imagej=totals["iod_imagej"],
        miod_exact=totals["iod"] / tissue_px,
        miod_imagej=totals["iod_imagej"] / tissue_px,
        hot_spot=spot,
        hot_spot_note=_spot_note(spot, can_count, config),
        **_by_nucleus(totals, tissue_px * (px_um / 1e3) ** 2, ground.detail_um),
        **_by_seed(totals, ground),
        doubts=doubts,
    )
    return Quantified(numbers, table, cell_px, ground)


def _by_nucleus(totals: dict[str, float], tissue_mm2: float, detail_um: float) -> dict[str, Any]:
    if detail_um > MAX_MPP:
        names = ("n_nuclei", "n_positive", "labelling_percent", "positive_per_mm2")
        note = f"Not counted: pixels of {detail_um:.3g} um are too large to see nuclei."
        return {**dict.fromkeys(names), "nuclei_error": note}
    return {
        "n_nuclei": round(totals["nuclei"]),
        "n_positive": round(totals["positive"]),
        "labelling_percent": _percent(totals["positive"], totals["nuclei"]),
        "positive_per_mm2": totals["positive"] / tissue_mm2,
        "nuclei_error": KNOWN_ERROR,
    }


def _by_seed(totals: dict[str, float], ground: Ground) -> dict[str, Any]:
    names = ("mean_dab_sd", "labelling_low_percent", "labelling_high_percent")
    if ground.uncertainty is None or ground.scale.factor != 1.0:
        note = (
            "No uncertainty pyramid beside the picture: translate with --seeds to get one."
            if ground.is_virtual
            else "A real stain: no seeds."
        )
        return {**dict.fromkeys(names), "uncertainty_note": note}
    return {
        "mean_dab_sd": totals["sd"] / totals["tissue_px"],
        "labelling_low_percent": _percent(totals["surely"], totals["nuclei"]),
        "labelling_high_percent": _percent(totals["possibly"], totals["nuclei"]),
        "uncertainty_note": "Spread over noise seeds; the bias of the model is not in it.",
    }


def _spot_note(spot: HotSpot | None, can_count: bool, config: QuantifyConfig) -> str:
    if not can_count:
        return "Not searched: nuclei cannot be counted."
    if spot is None:
        return "None: no positive nucleus, or too little tissue for a circle of 0.01 mm2."
    asked = f"A circle of {spot.area_mm2:.3g} mm2"
    small = spot.area_mm2 < 0.9 * config.hot_spot_mm2
    return asked + (f", as no circle of {config.hot_spot_mm2:g} mm2 is tissue." if small else ".")


def _percent(part: float, whole: float) -> float | None:
    return 100.0 * part / whole if whole else None
