"""The run's page: H&E beside virtual IHC, numbers, checks, provenance, in one folder.

In: a finished run. Out: ``<run>/report/index.html`` and what it needs, openable from disk without
a server or a network. Not here: metrics, drawing (`report_pictures`), wording (`report_facts`).

Nothing on the page identifies a patient: no label, no date of the slide, no path.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from wsi_stain.cluster import available_cores
from wsi_stain.errors import OutputError
from wsi_stain.evaluate import report_facts, report_pictures
from wsi_stain.evaluate.ground import Uncertainty, open_uncertainty
from wsi_stain.evaluate.quantify import Numbers
from wsi_stain.evaluate.quantify_files import read_numbers
from wsi_stain.evaluate.report_numbers import (
    Doubt,
    FieldNumbers,
    Ruler,
    SlideNumbers,
    Whites,
    find_doubts,
    measure_field,
)
from wsi_stain.evaluate.report_places import MOST_PLACES, places
from wsi_stain.files import sha256_any
from wsi_stain.geometry import Region, Scale, choose_scale
from wsi_stain.layout import RunFiles, find_run
from wsi_stain.manifest import Event, Listener, RunManifest, RunRecord, ignore
from wsi_stain.slides.image import SlideSource
from wsi_stain.slides.tissue import find_tissue
from wsi_stain.write.annotations import TileRow, read_flagged
from wsi_stain.write.overview import HeFolder, HeRecord, keep_he
from wsi_stain.write.validate import Expected, Validation, validate

__all__ = ["write_report"]

Rgb8 = NDArray[np.uint8]

HERE = Path(__file__).parent
PAGE = "index.html"
CELL_PX = 256  # out px; at least so many overview px:
LEAST_CELL_PX = 16


@dataclass(frozen=True)
class Field:
    """A field in full resolution, with its pictures' names in the report."""

    numbers: FieldNumbers
    he_file: str
    ihc_file: str


@dataclass(frozen=True)
class Pictures:
    """The whole slide in both stains, reduced alike.

    Attributes
    ----------
    he, ihc
        uint8 (h, w, 3).
    """

    he: Rgb8
    ihc: Rgb8


@dataclass(frozen=True)
class Story:
    """All that the page tells.

    Attributes
    ----------
    files, record, he
        The run, and what it kept of the H&E.
    fields
        Measured fields.
    doubts, n_cells
        Doubtful places, and how many were looked at.
    tiles
        Tiles that the run flagged; None where it scored none.
    measured
        What `quantify` found on the whole slide; None where it was not run.
    validation, is_unchanged
        See `report_facts.Evidence`.
    """

    files: RunFiles
    record: RunRecord
    he: HeRecord
    fields: Sequence[Field]
    doubts: Sequence[Doubt]
    n_cells: int
    tiles: Sequence[TileRow] | None
    measured: Numbers | None
    validation: Validation | None
    is_unchanged: bool | None


def write_report(
    run: Path,
    *,
    slide: Path | None = None,
    is_fresh: bool = False,
    listener: Listener = ignore,
) -> Path:
    """Write the page of a run; an older page is replaced.

    Parameters
    ----------
    run
        A ``.run`` folder, its pyramid, or an output folder with one run.
    slide
        The H&E slide; needed only where the run kept no H&E.
    is_fresh
        The run ended a moment ago, in this process: its checks of the file are not repeated.
    listener
        Hears the stage "report".

    Returns
    -------
    Path
        The page.

    Raises
    ------
    OutputError
        No run, no pyramid, no H&E, or the folder cannot be written.
    SlideError
        `slide` cannot be read.

    Notes
    -----
    Memory bound: two pictures of at most 16 megapixels, and copies of one of them. The folder has
    at most some 25 MB.
    """
    files = find_run(run)
    record = RunManifest.load(files.manifest).content
    if not files.output.exists():
        was_made = record.state == "finished"
        raise OutputError(
            f"{files.output} is missing: "
            + ("it was moved or removed." if was_made else "the run has no picture yet."),
            hint="Put it beside its run folder again."
            if was_made
            else "Run wsi-stain translate again; it goes on where it stopped.",
        )
    part = files.report.with_name("report.part")
    listener(Event("report", "start"))
    try:
        _build(files, record, _kept_he(files, record, slide), part, is_fresh)
        if files.report.exists():
            shutil.rmtree(files.report)
        part.rename(files.report)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"The report in {files.report} cannot be written: {error}.",
            hint="Check free space and permissions.",
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    listener(Event("report", "finish"))
    return files.report / PAGE


def _build(
    files: RunFiles, record: RunRecord, kept: HeFolder, folder: Path, is_fresh: bool
) -> None:
    """Measure, draw and write everything into a fresh folder."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(HERE / "assets", folder / "assets")
    he = kept.record()
    whites = Whites.recorded(record)
    ruler = Ruler(whites, he.mpp_out, record.detail_um(he.mpp_out))
    with ThreadPoolExecutor(available_cores()) as pool:
        with SlideSource.open(files.output, mpp=he.mpp_out) as source:
            if source.size_l0 != he.size_out:
                raise OutputError(
                    f"{files.output} is {source.size_l0}; the run planned {he.size_out}."
                )
            writing = _begin_fields(pool, source, kept, he, ruler, folder)
            pictures = Pictures(kept.overview(), source.thumbnail(he.mpp_out * he.reduction))
            measured = read_numbers(files.output, source.digest)
            uncertainty = open_uncertainty(source)
        if pictures.he.shape != pictures.ihc.shape:
            raise OutputError(
                f"H&E overview {pictures.he.shape} and output {pictures.ihc.shape} differ in size.",
                hint="Give the slide again: wsi-stain report RUN --slide SLIDE",
            )
        cell_px = max(LEAST_CELL_PX, CELL_PX // he.reduction)
        doubting = pool.submit(find_doubts, pictures.he, pictures.ihc, whites, cell_px)
        viewer = _write_pictures(pool, pictures, he, whites, uncertainty, folder)
        doubts, n_cells = doubting.result()
        # The least like the H&E first.
        fields = sorted(writing, key=lambda field: field.numbers.sobel_ssim)
    tiles = read_flagged(files.tile_scores) if files.tile_scores.is_file() else None
    viewer["tissue"] = report_pictures.outline_paths(kept.tissue(), he.mask_step)
    viewer["doubts"] = [list(place.box) for place in places(doubts, tiles or (), he)]
    viewer["hot_spot"] = _hot_spot(measured, he.mpp_out)
    viewer["fields"] = [
        {"box": list(field.numbers.region), "he": field.he_file, "ihc": field.ihc_file}
        for field in fields
    ]
    story = Story(
        files=files,
        record=record,
        he=he,
        fields=fields,
        doubts=doubts,
        n_cells=n_cells,
        tiles=tiles,
        measured=measured,
        validation=None
        if is_fresh
        else validate(files.output, expected=Expected(he.size_out, he.mpp_out)),
        is_unchanged=is_fresh or _is_unchanged(files, record),
    )
    page = _render(story, viewer)
    (folder / PAGE).write_text(page, encoding="utf-8")


def _kept_he(files: RunFiles, record: RunRecord, slide: Path | None) -> HeFolder:
    """Give what the run kept of the H&E, made anew where a slide is given."""
    kept = HeFolder(files.folder / "he")
    if slide is None:
        if not kept.exists:
            raise OutputError(
                f"{files.folder} holds no H&E to show.",
                hint="Give the slide: wsi-stain report RUN --slide SLIDE",
            )
        return kept
    settings = record.settings
    with SlideSource.open(slide, mpp=settings["slide"]["mpp"]) as source:
        if source.digest != record.slide.get("digest"):
            raise OutputError(f"{slide} is not the slide that {files.output.name} was made from.")
        with SlideSource.open(files.output) as output:
            # The factor as the run chose it: the tag's rational is a little off.
            scale = choose_scale(source.size_l0, source.mpp_l0, output.mpp_l0, 1e-3)
            if scale.size_out != output.size_l0:
                scale = Scale(scale.factor, scale.mpp_out, output.size_l0)
        mask_mpp = settings["tiles"]["mask_mpp"]
        mask = find_tissue(
            source.thumbnail(mask_mpp), mpp=mask_mpp, downsample=mask_mpp / source.mpp_l0
        )
        marker = files.name.rpartition("_")[2]
        keep_he(source, scale, mask, kept.path, marker=marker)
    return kept


def _begin_fields(
    pool: Executor, source: SlideSource, kept: HeFolder, he: HeRecord, ruler: Ruler, folder: Path
) -> Iterator[Field]:
    """Read every field, and have them measured and written; gives them as they are wanted."""
    scale = Scale(1.0, he.mpp_out, he.size_out)
    (folder / "fields").mkdir()

    def write_field(number: int, region: Region, ihc_pixels: Rgb8) -> Field:
        he_pixels = kept.field(number)
        names = [f"fields/{number:02d}_{stain}.jpg" for stain in ("he", "ihc")]
        for name, pixels in zip(names, (he_pixels, ihc_pixels), strict=True):
            report_pictures.write_jpeg(folder / name, pixels)
        numbers = measure_field(he_pixels, ihc_pixels, region, ruler)
        return Field(numbers, *names)

    read = [source.read_out(region, scale) for region in he.fields]
    return pool.map(write_field, itertools.count(), he.fields, read)


def _hot_spot(measured: Numbers | None, mpp: float) -> list[float] | None:
    """Give middle and radius in px of the picture."""
    if measured is None or measured.hot_spot is None:
        return None
    spot = measured.hot_spot
    return [round(um / mpp, 1) for um in (*spot.center_xy_um, spot.radius_um)]


def _write_pictures(
    pool: Executor,
    pictures: Pictures,
    he: HeRecord,
    whites: Whites,
    uncertainty: Uncertainty | None,
    folder: Path,
) -> dict[str, Any]:
    """Write tiles and overlays; gives what the viewer must know of them."""
    height_px, width_px = pictures.he.shape[:2]
    tiles = pool.map(
        report_pictures.write_tiles, (pictures.he, pictures.ihc), (folder / "he", folder / "ihc")
    )
    overlay, step = report_pictures.positive_overlay(pictures.ihc, whites.ihc)
    report_pictures.write_png(folder / "positive.png", overlay)
    rasters = [{"name": "positive", "width": overlay.shape[1] * step / width_px}]  # topmost last
    if uncertainty is not None:
        spread, step_l0 = report_pictures.spread_overlay(uncertainty)
        report_pictures.write_png(folder / "spread.png", spread)
        width = spread.shape[1] * step_l0 / he.size_out.width_px
        rasters.insert(0, {"name": "spread", "width": width})
    n_levels, _ = tiles
    return {
        "width": width_px,
        "height": height_px,
        "levels": n_levels,
        "tile": report_pictures.TILE_PX,
        "reduction": he.reduction,
        "mpp": he.mpp_out,
        "rasters": rasters,
    }


def _render(story: Story, viewer: dict[str, Any]) -> str:
    files, record, he, fields = story.files, story.record, story.he, story.fields
    numbers = [field.numbers for field in fields]
    slide = SlideNumbers.of(numbers)
    evidence = report_facts.Evidence(
        record=record,
        validation=story.validation,
        is_unchanged=story.is_unchanged,
        numbers=slide,
        doubts=story.doubts,
        n_cells=story.n_cells,
        tiles=story.tiles,
    )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": report_facts.percent, "decimals": report_facts.decimals}
    return environment.get_template("report.html.j2").render(
        name=files.name,
        marker=he.marker,
        size=str(he.size_out),
        mpp=he.mpp_out,
        reduction=he.reduction,
        spread_full_od=report_pictures.SPREAD_FULL_OD,
        bundle=record.bundle.get("name", "unknown"),
        statement=record.statement,
        figures=report_facts.figures(slide, numbers, record.detail_um(he.mpp_out)),
        slide_figures=report_facts.slide_figures(story.measured) if story.measured else [],
        pyramid=files.output.name,
        run=files.folder.name,
        nuclei_error=story.measured.nuclei_error if story.measured else "",
        places=places(story.doubts, story.tiles or (), he),
        most_places=MOST_PLACES,
        checks=report_facts.checks(evidence),
        fields=fields,
        provenance=report_facts.provenance(record, len(fields)),
        viewer=viewer,
    )


def _is_unchanged(files: RunFiles, record: RunRecord) -> bool | None:
    noted = [out for out in record.outputs if out.name == files.output.name]
    return sha256_any(files.output) == noted[0].sha256 if noted else None
