"""The words of a report: figures with their definitions, checks with verdicts, provenance.

In: numbers and the run's record. Out: rows of text. Not here: measuring, HTML.

Every figure carries its definition and its n; a check says what was seen against which limit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePath, PureWindowsPath
from typing import Any, NamedTuple

import msgspec

from wsi_stain.config import RunConfig
from wsi_stain.evaluate.metrics import METRIC_VERSION
from wsi_stain.evaluate.metrics_stain import POSITIVE_OD
from wsi_stain.evaluate.quantify import Numbers
from wsi_stain.evaluate.report_numbers import Doubt, FieldNumbers, SlideNumbers
from wsi_stain.manifest import RunRecord
from wsi_stain.write.annotations import TileRow
from wsi_stain.write.validate import Validation

__all__ = [
    "Check",
    "Evidence",
    "Figure",
    "Section",
    "checks",
    "clock",
    "figures",
    "provenance",
    "slide_figures",
]

# Limits of a second look, not of quality: EVALUATION has no single bar.
LEAST_SOBEL_SSIM = 0.4
MOST_WHITESPACE_ERROR = 0.15
NONE = "none"
SOLVER = "sample.solver"


class Figure(NamedTuple):
    """A number to read: name, value, spread over fields, and what it means."""

    name: str
    value: str
    spread: str
    meaning: str


class Check(NamedTuple):
    """A verdict: "ok", "look" (a person should) or "fault"."""

    name: str
    verdict: str
    seen: str


class Section(NamedTuple):
    """A titled list of name and value."""

    title: str
    rows: tuple[tuple[str, str], ...]


class Evidence(NamedTuple):
    """All that checks look at.

    Attributes
    ----------
    record
        The run's record.
    validation
        The verdict on the pyramid; None where the run, which ends with it, ended just now.
    is_unchanged
        Whether the pyramid has the digest that the run noted; None where it noted none.
    numbers
        Of the fields.
    doubts, n_cells
        Doubtful places, and how many were looked at.
    tiles
        Tiles that the run flagged; None where it scored none.
    """

    record: RunRecord
    validation: Validation | None
    is_unchanged: bool | None
    numbers: SlideNumbers
    doubts: Sequence[Doubt]
    n_cells: int
    tiles: Sequence[TileRow] | None


def figures(numbers: SlideNumbers, fields: Sequence[FieldNumbers], mpp: float) -> list[Figure]:
    """Word the numbers of a slide."""
    index = numbers.labelling
    return [
        Figure(
            "Labelling index",
            percent(index.percent if index else None),
            _spread(fields, lambda f: f.labelling.percent if f.labelling else None, percent),
            f"Positive of {index.n_nuclei:,} nuclei: those with a mean DAB OD above {POSITIVE_OD}."
            if index
            else f"Not counted: pixels of {mpp:.3g} um are too large to see nuclei.",
        ),
        Figure(
            "Positive area",
            percent(_hundred(numbers.positive_fraction)),
            _spread(fields, lambda f: _hundred(f.positive_fraction), percent),
            f"Share of the fields' tissue pixels with DAB OD above {POSITIVE_OD}.",
        ),
        Figure(
            "DAB p90",
            decimals(numbers.dab_p90),
            _spread(fields, lambda f: f.dab_p90, decimals),
            "Mean DAB optical density (log10) of the strongest tenth of all pixels.",
        ),
        Figure(
            "Sobel-SSIM",
            decimals(numbers.sobel_ssim),
            _spread(fields, lambda f: f.sobel_ssim, decimals),
            "Likeness of edges to the H&E; a copy of the H&E would give 1.",
        ),
        Figure(
            "Whitespace error",
            percent(100.0 * numbers.whitespace_error),
            _spread(fields, lambda f: 100.0 * f.whitespace.error_fraction, percent),
            "Pixels that are white in just one of the two pictures; "
            f"the output has {100.0 * numbers.whitespace_signed:+.1f} points more white.",
        ),
    ]


def slide_figures(numbers: Numbers) -> list[Figure]:
    """Word what `quantify` measured on the whole slide."""
    spot = numbers.hot_spot
    low, high = numbers.labelling_low_percent, numbers.labelling_high_percent
    shown = [
        Figure(
            "Labelling index",
            percent(numbers.labelling_percent),
            ""
            if low is None
            else f"{percent(low)} to {percent(high)}, one sd of the seeds less or more",
            "Not counted, see below."
            if numbers.n_nuclei is None
            else f"{numbers.n_positive:,} of {numbers.n_nuclei:,} nuclei positive.",
        ),
        Figure(
            "Positive area",
            percent(numbers.positive_area_percent),
            f"of {numbers.tissue_mm2:.3g} mm² tissue",
            f"Share of tissue pixels with DAB OD above {numbers.positive_od:g} over the glass.",
        ),
        Figure(
            "Mean DAB OD",
            f"{numbers.miod_exact:.3f}",
            f"IOD {numbers.iod_exact:,.0f}",
            f"log10(255 / I) over tissue pixels of {numbers.measured_mpp:.3g} µm; "
            f"ImageJ's way {numbers.miod_imagej:.3f}.",
        ),
        Figure(
            "Hot spot",
            "none" if spot is None else f"{spot.positive_per_mm2:,.0f} per mm²",
            "" if spot is None else f"{spot.n_positive:,} of {spot.n_nuclei:,} nuclei positive",
            "Most positive nuclei per area of tissue. "
            + numbers.hot_spot_note.replace("mm2", "mm²"),
        ),
    ]
    sd = numbers.mean_dab_sd
    value = "not measured" if sd is None else f"{sd:.3f}"
    return [*shown, Figure("Sd of DAB OD", value, "", numbers.uncertainty_note)]


def checks(evidence: Evidence) -> list[Check]:
    """Judge what a machine can judge; nothing here says that the stain is right."""
    numbers = evidence.numbers
    n_doubts = len(evidence.doubts)
    lost = sum(doubt.reason == "lost" for doubt in evidence.doubts)
    unchanged = {
        True: Check("File as the run made it", "ok", "SHA-256 as recorded"),
        False: Check("File as the run made it", "fault", "SHA-256 differs from the record"),
        None: Check("File as the run made it", "look", "the run's record was never closed"),
    }
    fit = evidence.record.stain.get("stain", {})
    fit_notes = "; ".join(evidence.record.stain.get("notes", fit.get("notes", [])))
    return [
        _soundness(evidence.validation),
        unchanged[evidence.is_unchanged],
        Check(
            "Tissue where the H&E has it",
            "look" if n_doubts else "ok",
            f"{n_doubts} of {evidence.n_cells} places flagged: {lost} lost tissue, "
            f"{n_doubts - lost} stained glass",
        ),
        Check(
            "Structure kept",
            "ok" if numbers.sobel_ssim >= LEAST_SOBEL_SSIM else "look",
            f"Sobel-SSIM {numbers.sobel_ssim:.2f}, a second look below {LEAST_SOBEL_SSIM}",
        ),
        Check(
            "White stays white",
            "ok" if numbers.whitespace_error <= MOST_WHITESPACE_ERROR else "look",
            f"{100 * numbers.whitespace_error:.1f} % differ, a second look above "
            f"{100 * MOST_WHITESPACE_ERROR:.0f} %",
        ),
        Check(
            "Color fit",
            "look" if fit_notes else "ok",
            fit_notes or f"{fit.get('n_stained', 0):,} stained pixels, no remarks",
        ),
        Check(
            "Flags of the run",
            "look" if evidence.record.flags else "ok",
            "; ".join(evidence.record.flags) or NONE,
        ),
        *_tile_check(evidence.tiles),
    ]


def _soundness(found: Validation | None) -> Check:
    if found is None:
        return Check("Pyramid sound", "ok", "read back by the run, which would have failed else")
    levels = f"{len(found.facts.get('levels', []))} levels, all read"
    verdict = "ok" if found.ok else "fault"
    return Check("Pyramid sound", verdict, "; ".join(found.problems) or levels)


def _tile_check(tiles: Sequence[TileRow] | None) -> list[Check]:
    """Count the tiles that the run flagged, by reason; nothing where it scored none."""
    if tiles is None:
        return []
    counts = Counter(word for tile in tiles for word in tile.flags.split(";"))
    words = ", ".join(f"{word.replace('_', ' ')} {count}" for word, count in counts.most_common())
    seen = f"{len(tiles):,} flagged: {words}" if tiles else "none flagged"
    return [Check("Tiles, one by one", "look" if tiles else "ok", seen)]


def provenance(record: RunRecord, field_count: int) -> list[Section]:
    """Say how the picture was made, without a path or a name."""
    settings = tuple(
        (f"{name} ({record.origins.get(name, 'set')})", value)
        for name, value in _changed(record.settings)
        if name != SOLVER  # told of the model: whether asked for or its own, it is settled
    )
    solver = dict(_flat(record.settings)).get(SOLVER)
    model = record.bundle | ({"solver": solver} if solver else {})
    return [
        Section(
            "Run",
            (
                ("Begun", clock(record.begun_utc)),
                ("Finished", clock(record.finished_utc) or "not finished"),
                ("Seed", str(record.seed)),
                ("Devices", ", ".join(record.devices) or "not recorded"),
                ("Metrics", f"version {METRIC_VERSION}, {field_count} fields"),
            ),
        ),
        Section("Slide", tuple((name, str(value)) for name, value in record.slide.items())),
        Section("Model", tuple((name, str(value)) for name, value in model.items())),
        Section("Settings that differ from the defaults", settings or (("all", "defaults"),)),
        Section("Stain, fitted once for the slide", tuple(_stain_rows(record))),
        Section(
            "Stages",
            tuple(
                (stage.name, f"{stage.seconds:.1f} s, {stage.state}{_attempts(stage.attempts)}")
                for stage in record.stages
            ),
        ),
        Section(
            "Files",
            tuple(
                (out.name, f"{out.bytes:,} bytes, SHA-256 {out.sha256}") for out in record.outputs
            )
            or ((NONE, "the record was never closed"),),
        ),
        Section("Digests", (("tile grid", record.grid_digest),)),
        Section("Remarks", tuple(("note", note) for note in record.notes) or ((NONE, ""),)),
        Section("Versions", tuple(record.versions.items())),
    ]


def percent(value: float | None) -> str:
    """Word a percentage; below 10 with one decimal."""
    if value is None:
        return "not measured"
    return f"{value:.1f} %" if value < 9.95 else f"{value:.0f} %"


def decimals(value: float | None) -> str:
    """Word a number with two decimals."""
    return "not measured" if value is None else f"{value:.2f}"


def _hundred(value: float | None) -> float | None:
    return None if value is None else 100.0 * value


def _spread(
    fields: Sequence[FieldNumbers],
    pick: Callable[[FieldNumbers], float | None],
    word: Callable[[float | None], str],
) -> str:
    values = [value for value in map(pick, fields) if value is not None]
    if not values:
        return ""
    if len(values) == 1:
        return "1 field"
    return f"{word(min(values))} to {word(max(values))} over {len(values)} fields"


def _changed(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name what is not a default; of a path only its last part, as folders may name people."""
    defaults = dict(_flat(msgspec.to_builtins(RunConfig())))
    for name, value in _flat(settings):
        if value != defaults.get(name):
            shown = PurePath(PureWindowsPath(value).name).name if name == "bundle" else value
            yield name, str(shown)


def clock(utc: str | None) -> str:
    """Word an ISO time of ours: "2026-01-02 03:04 UTC"; nothing where there is none."""
    return f"{utc[:16].replace('T', ' ')} UTC" if utc else ""


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _stain_rows(record: RunRecord) -> Iterator[tuple[str, str]]:
    stain = record.stain
    fit, start = stain.get("stain", {}), stain.get("start", {})
    yield "method", str(fit.get("method", NONE))
    yield "white of the H&E", _vector(stain.get("white"), 0)
    yield "white of the output", _vector(record.output_white, 0)
    for name, vector in zip(("hematoxylin", "eosin"), fit.get("stain_od") or (), strict=False):
        yield f"{name}, OD", _vector(vector, 3)
    yield "99th percentiles, OD", _vector(fit.get("stain_c99"), 2)
    yield "start image", str(start.get("kind", NONE))
    if "map_scale" in stain:  # a term looks at the map
        yield "gradient map's 99th percentile", _vector([stain["map_scale"]], 3)


def _vector(values: Sequence[float] | None, digits: int) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values) if values else NONE


def _attempts(count: int) -> str:
    return f", {count} attempts" if count > 1 else ""
