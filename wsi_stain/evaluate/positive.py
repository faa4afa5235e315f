"""How much of a slide's tissue is positive: one number for the table of an archive.

In: a finished run. Out: a share, by the fields that the run kept of the H&E; the same as the
report's. Not here: the whole slide (`quantify`), all other numbers (`report`).
"""

from __future__ import annotations

from wsi_stain.evaluate.report_numbers import Whites, count_positive
from wsi_stain.geometry import Scale
from wsi_stain.layout import RunFiles
from wsi_stain.manifest import RunManifest
from wsi_stain.slides.image import SlideSource
from wsi_stain.write.overview import HeFolder

__all__ = ["positive_fraction"]


def positive_fraction(files: RunFiles) -> float | None:
    """Measure the positive share of the tissue's pixels on the fields of a run, 0 to 1.

    Parameters
    ----------
    files
        Of a finished run.

    Returns
    -------
    float or None
        Rounded to 5 digits; None where the run kept no fields, or none with tissue.

    Raises
    ------
    OutputError
        The record or a field is damaged.
    SlideError
        The pyramid cannot be read.

    Notes
    -----
    At most 24 fields of 512 px, so that its cost depends on no slide's size. Memory bound: one
    field.
    """
    kept = HeFolder(files.folder / "he")
    if not kept.exists:
        return None
    whites, he = Whites.recorded(RunManifest.load(files.manifest).content), kept.record()
    scale = Scale(1.0, he.mpp_out, he.size_out)
    n_tissue_px = n_positive_px = 0
    with SlideSource.open(files.output, mpp=he.mpp_out) as source:
        for number, region in enumerate(he.fields):
            counts = count_positive(kept.field(number), source.read_out(region, scale), whites)
            n_tissue_px += counts[0]
            n_positive_px += counts[1]
    return round(n_positive_px / n_tissue_px, 5) if n_tissue_px else None
