"""From rows to tables: means with intervals, differences to the first variant, set-wide numbers.

In: rows, and the pictures beside them. Out: `table.csv` (everything) and `table.md` (what one
reads). Not here: measuring one picture (`scores`).

Intervals are resampled by slide; with fewer than five slides there are none. No row decides alone:
read stain (IOD, DAB p90, hue) beside structure (Sobel-SSIM), and both against the null rows.
"""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wsi_stain.evaluate.metrics import hist_pooled
from wsi_stain.evaluate.metrics_null import Interval, bootstrap_interval
from wsi_stain.evaluate.metrics_stain import dab_agreement, dab_kl
from wsi_stain.evaluate.rows import Row, picture_path
from wsi_stain.evaluate.scores import MAKING, PAIRED, UNPAIRED
from wsi_stain.evaluate.sheet import read_picture

__all__ = ["Cell", "Scope", "cells", "scopes", "table_csv", "table_markdown"]

Rgb8 = NDArray[np.uint8]

MIN_FOR_R = 5  # Pearson over fewer images says nothing
READ_UNPAIRED = (
    "sobel_ssim",
    "white_error",
    "white_error_bare",
    "white_area",
    "seam_ratio",
    "seam_ratio_he",
    "hue_deg",
    "labelling_percent",
    "dab_p90",
    "miod",
    "hist_real",
    "dab_kl_real",
    "dab_sd",
    "sd_error_rho",
)
READ_PAIRED = ("ssim", "vif", "hist", "psnr", "miod", "dab_p90", "labelling_percent")
READ_SET = ("iod_deviation_percent", "dab_p90_mae", "dab_p90_r", "labelling_mae", "dab_kl")
TITLES = {
    "sobel_ssim": "Sobel-SSIM to H&E",
    "white_error": "white error",
    "white_error_bare": "the same, bare",
    "white_area": "white area / H&E's",
    "seam_ratio": "seam ratio",
    "seam_ratio_he": "of the H&E there",
    "dab_sd": "sd over seeds",
    "sd_error_rho": "rho of sd and error",
    "hue_deg": "hue of positives, deg",
    "labelling_percent": "labelling index, %",
    "dab_p90": "DAB p90",
    "miod": "mIOD",
    "hist_real": "Hist to real stain",
    "dab_kl_real": "DAB KL to it, nats",
    "ssim": "SSIM",
    "vif": "VIF",
    "hist": "Hist",
    "psnr": "PSNR, dB",
    "iod_deviation_percent": "IOD deviation, %",
    "dab_p90_mae": "DAB p90 MAE",
    "dab_p90_r": "DAB p90 r",
    "labelling_mae": "index MAE, points",
    "dab_kl": "DAB KL, nats",
}


class Scope(NamedTuple):
    """A set of images that is averaged over.

    Attributes
    ----------
    name
        "all", "pairs" (all pairs), or an image group that has references.
    paired
        Whether numbers against a reference belong to it.
    rows
        Its rows, of all methods.
    """

    name: str
    paired: bool
    rows: tuple[Row, ...]

    @property
    def methods(self) -> list[str]:
        """Names of the methods, in the order of the recipe."""
        return list(dict.fromkeys(row.method for row in self.rows))


class Cell(NamedTuple):
    """One number of the table.

    Attributes
    ----------
    scope, method, metric
        Which.
    value
        Mean with interval; a set-wide number has no interval.
    difference
        To the first variant, image by image; none for that variant and for set-wide numbers.
    """

    scope: str
    method: str
    metric: str
    value: Interval
    difference: Interval | None


def scopes(rows: Sequence[Row]) -> list[Scope]:
    """List the sets of images to average over: all, all pairs, each group with references."""
    paired = [row for row in rows if row.paired]
    groups = list(dict.fromkeys(row.group for row in paired))
    found = [Scope("all", False, tuple(rows))]
    if len(groups) > 1:
        found.append(Scope("pairs", True, tuple(paired)))
    found += [Scope(g, True, tuple(row for row in paired if row.group == g)) for g in groups]
    return found


def cells(scope: Scope, out: Path, seed: int, real: Sequence[Rgb8] = ()) -> list[Cell]:
    """Average a set of images, method by method.

    Parameters
    ----------
    scope
        Images.
    out
        Folder of the evaluation, for set-wide numbers over pixels.
    seed
        Of the resampling.
    real
        Held-out pictures of the bundle's own stain.

    Returns
    -------
    list of Cell
        Metrics without any value are left out.
    """
    metrics = [*UNPAIRED, *MAKING, *(PAIRED if scope.paired else ())]
    first = _of(scope, scope.methods[0])
    made = []
    for method in scope.methods:
        ours = _of(scope, method)
        for metric in metrics:
            value = _mean(ours, [row.scores[metric] for row in ours], seed)
            if value is not None:
                base = None if method == scope.methods[0] else first
                change = _difference(ours, base, metric, seed)
                made.append(Cell(scope.name, method, metric, value, change))
        made += list(_area_cells(scope.name, method, ours))
        if scope.paired:
            made += list(_set_cells(scope.name, method, ours, out))
        elif real:
            made += list(_real_cells(scope.name, method, ours, out, real))
    return made


def table_csv(cells: Sequence[Cell]) -> str:
    """Write all numbers, one a line."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    names = ["mean", "low", "high", "n_images", "n_slides"]
    differences = [f"difference_{name}" for name in names[:3]]
    writer.writerow(["scope", "method", "metric", *names, *differences])
    for cell in cells:
        change = cell.difference[:3] if cell.difference else (None, None, None)
        numbers = [*cell.value[:3], cell.value.n_images, cell.value.n_groups, *change]
        texts = ["" if n is None else f"{n:.6g}" for n in numbers]
        writer.writerow([*cell[:3], *texts])
    return stream.getvalue()


def table_markdown(scopes: Sequence[Scope], cells: Sequence[Cell], heading: str) -> str:
    """Write what one reads: a table a set of images, then the differences.

    Parameters
    ----------
    scopes, cells
        From the functions of that name.
    heading
        Lines above the tables: what was run, on what.
    """
    parts = [heading.rstrip()]
    for scope in scopes:
        parts.append(f"## {_caption(scope)}")
        if scope.paired:
            parts.append(_grid(scope, cells, (*READ_PAIRED, *READ_SET), _format))
            parts.append(_references(scope))
        else:
            parts.append(_grid(scope, cells, READ_UNPAIRED, _format))
            parts.append(f"Difference to `{scope.methods[0]}`, image by image:")
            parts.append(_grid(scope, cells, READ_UNPAIRED, _format_difference))
            parts.append(_worst(scope))
    return "\n\n".join(part for part in parts if part) + "\n"


def _of(scope: Scope, method: str) -> list[Row]:
    return [row for row in scope.rows if row.method == method]


def _mean(rows: Sequence[Row], values: Sequence[float | None], seed: int) -> Interval | None:
    pairs = [(v, row.slide) for row, v in zip(rows, values, strict=True) if v is not None]
    if not pairs:
        return None
    numbers, slides = zip(*pairs, strict=True)
    return bootstrap_interval(numbers, slides, np.random.default_rng(seed))


def _difference(
    rows: Sequence[Row], first: Sequence[Row] | None, metric: str, seed: int
) -> Interval | None:
    if first is None:
        return None
    base = {row.image: row.scores[metric] for row in first}

    def change(row: Row) -> float | None:
        ours, theirs = row.scores[metric], base[row.image]
        return None if ours is None or theirs is None else ours - theirs

    return _mean(rows, [change(row) for row in rows], seed)


def _area_cells(scope: str, method: str, rows: Sequence[Row]) -> Iterator[Cell]:
    """White area of all pictures together over that of their H&E."""
    he = [v for row in rows if (v := row.scores["white_he"]) is not None]
    more = [v for row in rows if (v := row.scores["white_signed"]) is not None]
    if sum(he) > 0.0:
        yield _set_cell(scope, method, rows, "white_area", 1.0 + sum(more) / sum(he))


def _real_cells(
    scope: str, method: str, rows: Sequence[Row], out: Path, real: Sequence[Rgb8]
) -> Iterator[Cell]:
    """Compare the colors of all pictures with those of the real stain, on other tissue."""
    made = [read_picture(picture_path(out, row.image, method)) for row in rows]
    yield _set_cell(scope, method, rows, "hist_real", hist_pooled(made, real))
    yield _set_cell(scope, method, rows, "dab_kl_real", dab_kl(made, real))


def _set_cells(scope: str, method: str, rows: Sequence[Row], out: Path) -> Iterator[Cell]:
    """Numbers of a whole set: sums, correlations, pooled histograms."""
    cell = functools.partial(_set_cell, scope, method, rows)
    made, real = _both(rows, "iod")
    if sum(real) > 0.0:
        yield cell("iod_deviation_percent", 100.0 * (sum(made) - sum(real)) / sum(real))
    for metric, name in (("dab_p90", "dab_p90"), ("labelling_percent", "labelling")):
        made, real = _both(rows, metric)
        if len(made) >= 2:
            r, mae = dab_agreement(made, real)
            yield cell(f"{name}_mae", mae, len(made))
            if len(made) >= MIN_FOR_R and np.isfinite(r):
                yield cell(f"{name}_r", r, len(made))
    pictures = [
        [read_picture(picture_path(out, row.image, name)) for row in rows]
        for name in (method, "reference")
    ]
    yield cell("hist_pooled", hist_pooled(*pictures))
    yield cell("dab_kl", dab_kl(*pictures))


def _set_cell(
    scope: str,
    method: str,
    rows: Sequence[Row],
    metric: str,
    value: float,
    n_images: int | None = None,
) -> Cell:
    """Hold a number of a whole set: no interval, no difference image by image."""
    n_slides = len({row.slide for row in rows})
    whole = Interval(value, None, None, len(rows) if n_images is None else n_images, n_slides)
    return Cell(scope, method, metric, whole, None)


def _both(rows: Sequence[Row], metric: str) -> tuple[list[float], list[float]]:
    """Give a metric of output and reference, where both have it."""
    pairs = [(row.scores[metric], row.scores[f"ref_{metric}"]) for row in rows]
    whole = [(a, b) for a, b in pairs if a is not None and b is not None]
    return [a for a, _ in whole], [b for _, b in whole]


def _caption(scope: Scope) -> str:
    first = _of(scope, scope.methods[0])
    n = f"{len(first)} images of {len({row.slide for row in first})} slides or folders"
    if not scope.paired:
        return f"All images, against the H&E ({n})"
    aligned = {row.aligned for row in first}
    how = "aligned" if aligned == {True} else "not aligned: pixel metrics reward blur"
    return f"{'All pairs' if scope.name == 'pairs' else scope.name} ({n}; {how})"


def _grid(
    scope: Scope, cells: Sequence[Cell], metrics: Sequence[str], text: Callable[[Cell], str]
) -> str:
    found = {(c.method, c.metric): c for c in cells if c.scope == scope.name}
    used = [m for m in metrics if any((method, m) in found for method in scope.methods)]
    lines = ["| method | " + " | ".join(TITLES[m] for m in used) + " |"]
    lines.append("|---" * (len(used) + 1) + "|")
    for method in scope.methods:
        texts = [text(found[method, m]) if (method, m) in found else "-" for m in used]
        if any(t != "-" for t in texts):
            lines.append(f"| {method} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _references(scope: Scope) -> str:
    """Say what the real IHC of these images shows."""
    rows = _of(scope, scope.methods[0])
    texts = []
    for metric in ("miod", "dab_p90", "labelling_percent", "hue_deg"):
        values = [v for row in rows if (v := row.scores[f"ref_{metric}"]) is not None]
        if values:
            texts.append(f"{TITLES[metric]} {np.mean(values):.4g}")
    return f"The references themselves: {', '.join(texts)}."


def _worst(scope: Scope, n: int = 3) -> str:
    """Name the images that lost most structure: they are to be looked at."""
    rows = _of(scope, scope.methods[0])
    known = [(value, row.image) for row in rows if (value := row.scores["sobel_ssim"]) is not None]
    names = ", ".join(f"{image} ({value:.3f})" for value, image in sorted(known)[:n])
    return f"Lowest Sobel-SSIM of `{scope.methods[0]}`: {names}."


def _format(cell: Cell) -> str:
    return _interval(cell.value, "")


def _format_difference(cell: Cell) -> str:
    return "-" if cell.difference is None else _interval(cell.difference, "+")


def _interval(value: Interval, sign: str) -> str:
    text = f"{value.mean:{sign}.3g}"
    if value.low is None or value.high is None:
        return text
    return f"{text} [{value.low:.3g}, {value.high:.3g}]"
