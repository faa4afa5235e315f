"""The judge: run every method of a recipe on every image, measure, tabulate.

In: a recipe. Out: a folder with `results.jsonl`, `table.md`, `table.csv`, `sheet.png`, `run.json`
and the painted pictures. Not here: what is painted, measured or averaged.

Each row is written when it is made. A stopped evaluation goes on where it stopped: a row is made
again only where something that it depends on has changed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from wsi_stain.bundles import bundle_digest, find_bundle
from wsi_stain.config import BundleSpec, load_recipe
from wsi_stain.doctor import package_versions
from wsi_stain.errors import NoTissueError
from wsi_stain.evaluate.costs import costs_markdown, method_costs
from wsi_stain.evaluate.metrics import METRIC_VERSION
from wsi_stain.evaluate.paint import ModelPainter, NullPainter, Painter
from wsi_stain.evaluate.pairs import (
    ImageFile,
    Subject,
    find_images,
    load_subject,
    palette_pixels,
    real_pictures,
)
from wsi_stain.evaluate.recipe import EvaluateConfig
from wsi_stain.evaluate.rows import Row, append_row, picture_path, read_rows, write_rows
from wsi_stain.evaluate.scores import score_making, score_picture
from wsi_stain.evaluate.sheet import draw_sheet, write_picture
from wsi_stain.evaluate.table import cells, scopes, table_csv, table_markdown
from wsi_stain.files import atomic_write_bytes, make_folder
from wsi_stain.manifest import Event, Listener, ignore
from wsi_stain.stages import digest
from wsi_stain.stain.start import COLOR_VERSION
from wsi_stain.translate.bundle import load_bundle, pick_device

__all__ = ["evaluate", "run_evaluation"]

Rgb8 = NDArray[np.uint8]

LEAST_TISSUE = 0.01  # of a crop
STATEMENT = "Virtual stain, research use only: not for diagnosis."


@dataclass(frozen=True)
class Bench:
    """All that is the same for every image.

    Attributes
    ----------
    config
        Settings.
    spec, bundle
        The bundle's spec; its name and digest.
    painters
        Methods, variants first.
    files
        Images.
    real
        Held-out IHC of the bundle's own stain.
    """

    config: EvaluateConfig
    spec: BundleSpec
    bundle: dict[str, str]
    painters: tuple[Painter, ...]
    files: tuple[ImageFile, ...]
    real: tuple[Rgb8, ...]


def evaluate(
    recipe: Path, out: Path, *, bundle: str | None = None, listener: Listener = ignore
) -> Path:
    """Judge the methods of a recipe.

    Parameters
    ----------
    recipe
        TOML file of an `EvaluateConfig`.
    out
        Folder for the results; those of an earlier run of the same recipe are gone on with.
    bundle
        Beats the recipe's.
    listener
        Hears the events.

    Returns
    -------
    Path
        `table.md`.

    Raises
    ------
    ConfigError
        The recipe, an image or a pair cannot be used.
    BundleError
        The bundle is missing, damaged, or lacks a net that a variant needs.
    NoTissueError
        An image shows too little stain.
    OutputError
        `out` cannot be written, or holds results of another version.
    """
    config, _ = load_recipe(recipe, EvaluateConfig)
    if bundle is not None:
        config = structs.replace(config, bundle=bundle)
    return run_evaluation(config, out, listener)


def run_evaluation(config: EvaluateConfig, out: Path, listener: Listener = ignore) -> Path:
    """Judge with settings at hand; see `evaluate`."""
    bench = _prepare(config)
    make_folder(out)
    rows = _make_rows(bench, out, listener)
    found = scopes(rows)
    table = [cell for scope in found for cell in cells(scope, out, config.seed, bench.real)]
    atomic_write_bytes(out / "table.csv", table_csv(table).encode())
    write_picture(out / "sheet.png", draw_sheet(rows, out, config.sheet_cell_px, config.sheet_rows))
    atomic_write_bytes(out / "run.json", _record(bench, rows))
    text = table_markdown(found, table, _heading(bench, rows))
    text += "\n" + costs_markdown(method_costs(bench.painters, rows))
    atomic_write_bytes(out / "table.md", text.encode())
    return out / "table.md"


def _prepare(config: EvaluateConfig) -> Bench:
    """Load and check everything before the first image is worked on."""
    files = tuple(find_images(config))
    bundle = load_bundle(config.bundle, pick_device(config.device))
    variants = [ModelPainter.of(variant, bundle, config) for variant in config.runs]
    root, color = Path(config.root).expanduser(), bundle.spec.color
    palette = np.empty((0, 3), np.uint8)
    if config.palette is not None:
        palette = palette_pixels(config.palette, root, color)
    real = tuple(real_pictures(config.real, root, color, config.crop_px))
    palette_digest = hashlib.sha256(palette.tobytes()).hexdigest()
    nulls = [
        NullPainter(n, palette, palette_digest, color.output_white, config.blur_px)
        for n in config.nulls
    ]
    name = {"name": bundle.spec.name, "digest": bundle_digest(find_bundle(config.bundle))}
    return Bench(config, bundle.spec, name, (*variants, *nulls), files, real)


def _make_rows(bench: Bench, out: Path, listener: Listener) -> list[Row]:
    """Make what is missing; give all rows in the order of recipe and images.

    A crop that shows only glass is left out: every method paints glass, and is perfect on it.
    """
    results = out / "results.jsonl"
    known = {row.key: row for row in read_rows(results)}
    write_rows(results, known.values())
    rows: list[Row] = []
    total = len(bench.files) * len(bench.painters)
    listener(Event("evaluate", "start", total=total))
    n_done = 0
    for file in bench.files:
        subject = load_subject(file, bench.spec.mpp, bench.config)
        if subject.tissue_fraction < LEAST_TISSUE:
            note = f"{file.name} is left out: its crop shows {subject.tissue_fraction:.1%} tissue"
            listener(Event("evaluate", "note", text=note))
            n_done += len(bench.painters)
            continue
        _keep_inputs(subject, out)
        for painter in bench.painters:
            key = _key(bench, painter, subject)
            row = known.get(key)
            if row is None or not picture_path(out, row.image, row.method).is_file():
                row = _judge(bench, painter, subject, key, out)
                append_row(results, row)
            rows.append(row)
            n_done += 1
            listener(Event("evaluate", "advance", done=n_done, total=total))
    if not rows:
        raise NoTissueError(
            f"None of the {len(bench.files)} crops shows tissue.",
            hint="Give other images, or larger crops: crop_px = 0 takes all of each.",
        )
    write_rows(results, rows)
    listener(Event("evaluate", "finish", done=total, total=total))
    return rows


def _judge(bench: Bench, painter: Painter, subject: Subject, key: str, out: Path) -> Row:
    began_s = time.monotonic()
    painted = painter.paint(subject)
    seconds = time.monotonic() - began_s
    file, crop, glass = subject.file, subject.crop, subject.reference_glass
    write_picture(picture_path(out, file.name, painter.name), painted.picture)
    white = painter.white(subject)
    scores = score_picture(painted.picture, white, subject, bench.config.positive_od)
    scores |= score_making(painted, white, subject)
    return Row(
        key=key,
        method=painter.name,
        kind="null" if painter.kind == "null" else "variant",
        group=file.group.name,
        image=file.name,
        slide=file.slide,
        paired=subject.reference is not None,
        aligned=file.group.aligned,
        metric_version=METRIC_VERSION,
        mpp=subject.scale.mpp_out,
        width_px=crop.width_px,
        height_px=crop.height_px,
        bundle=bench.bundle,
        digests=subject.digests,
        settings=painter.facts(),
        whites={
            "he": msgspec.to_builtins(subject.glass),
            "reference": None if glass is None else msgspec.to_builtins(glass),
        },
        seconds=round(seconds, 3),
        peak_memory_mb=_peak_memory_mb(),
        scores=scores,
    )


def _key(bench: Bench, painter: Painter, subject: Subject) -> str:
    """Identify everything that the numbers of a row depend on."""
    group = subject.file.group
    return digest(
        METRIC_VERSION,
        COLOR_VERSION,
        painter.name,
        painter.facts(),
        bench.bundle["digest"] if painter.kind == "variant" else "",
        subject.file.name,
        subject.file.slide,
        list(subject.digests),
        list(subject.crop),
        [group.mpp, subject.scale.mpp_out, group.aligned],
        msgspec.to_builtins([subject.glass, subject.reference_glass]),
        bench.config.positive_od,
    )


def _keep_inputs(subject: Subject, out: Path) -> None:
    """Put the judged parts of H&E and reference beside the painted pictures."""
    write_picture(picture_path(out, subject.file.name, "he"), subject.cut(subject.he))
    if subject.reference is not None:
        path = picture_path(out, subject.file.name, "reference")
        write_picture(path, subject.cut(subject.reference))


def _record(bench: Bench, rows: Sequence[Row]) -> bytes:
    """Say what is needed to repeat the evaluation and to read it honestly."""
    spec = bench.spec
    content = {
        "statement": STATEMENT,
        "finished_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "metric_version": METRIC_VERSION,
        "bundle": {
            **bench.bundle,
            "marker": spec.marker,
            "mpp": spec.mpp,
            "trained_samples": spec.trained_samples,
            "data_statement": spec.data_statement,
        },
        "data_digest": digest(sorted({row.digests for row in rows})),
        "images": [
            {
                "image": file.name,
                "slide": file.slide,
                "licence": file.licence,
                "paired": file.reference is not None,
            }
            for file in bench.files
        ],
        "split_unit": "slide or patient by group_pattern, else folder",
        "settings": msgspec.to_builtins(bench.config) | {"bundle": bench.bundle["name"]},
        "seconds": round(sum(row.seconds for row in rows), 1),
        "machine": {"platform": platform.platform(), "cpu_cores": os.cpu_count()},
        "versions": package_versions(),
    }
    return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"


def _heading(bench: Bench, rows: Sequence[Row]) -> str:
    first = rows[0]
    crop = f"central {bench.config.crop_px} px" if bench.config.crop_px else "whole images"
    real = f"; {len(bench.real)} held-out fields of real stain" if bench.real else ""
    images = sorted({row.image for row in rows})
    blank = [file.name for file in bench.files if file.name not in images]
    left_out = f" Left out, as their crops show no tissue: {', '.join(blank)}." if blank else ""
    return (
        f"# Evaluation of {bench.bundle['name']} ({bench.bundle['digest'][:12]})\n\n"
        f"{STATEMENT}\n\n"
        f"{len(images)} images, {crop} at about {bench.spec.mpp:g} um/px{real}, seed "
        f"{bench.config.seed}, metrics version {METRIC_VERSION}, IOD `dab` exact. Mean [95 % "
        "interval, resampled by slide or folder; none under 5]. A method counts only if it beats "
        "`null-recolor` on stain and `null-blur` on structure; `source` is the H&E itself. "
        f"Painting took {sum(row.seconds for row in rows):.0f} s "
        f"({first.settings.get('device', 'cpu')}); data in run.json.{left_out}"
    )


def _peak_memory_mb() -> float:
    """Give the largest resident size of this process; macOS counts bytes, Linux kilobytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)
