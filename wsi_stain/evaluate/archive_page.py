"""The index page of an archive: one row a slide, sortable, with links to the reports.

In: ``archive.json`` in an output folder, and the runs' folders. Out: ``index.html`` beside it,
openable from disk without a server or a network. Not here: what is on a row (the record says).

Pictures of a slide with a report are linked from it; of any other they are in the page itself.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote

import cv2
import jinja2
import numpy as np
from numpy.typing import NDArray

from wsi_stain.archive_record import ARCHIVE_FILE, ArchiveRecord, ArchiveSlide, read_archive
from wsi_stain.errors import WsiStainError
from wsi_stain.evaluate.report_facts import clock, percent
from wsi_stain.files import atomic_write_bytes
from wsi_stain.slides.image import SlideSource
from wsi_stain.write.overview import HeFolder

__all__ = ["write_archive_page"]

HERE = Path(__file__).parent
PAGE = "index.html"
TEMPLATE = "archive.html.j2"
THUMBNAIL_PX = 160
QUALITY = 80
# Worst first, as a person would look.
STATES = ("failed", "running", "pending", "done", "skipped")
RAW_TEXTS = {"style": "archive.css", "script": "archive.js"}


@dataclass(frozen=True)
class Row:
    """One slide as the page shows it.

    Attributes
    ----------
    slide
        From the record.
    rank
        Of its state, worst first.
    report
        Link to its report; empty where there is none.
    he, ihc
        Links to pictures or pictures as data; empty where there is none.
    faults
        Why a picture that should be there cannot be shown.
    """

    slide: ArchiveSlide
    rank: int
    report: str
    he: str
    ihc: str
    faults: tuple[str, ...] = ()


def write_archive_page(out: Path) -> Path:
    """Write the index page of an archive; an older page is replaced.

    Parameters
    ----------
    out
        The output folder, which holds ``archive.json``. The archive may still be running.

    Returns
    -------
    Path
        ``out/index.html``.

    Raises
    ------
    OutputError
        No record, a damaged one, or the folder cannot be written.

    Notes
    -----
    A row costs some 2 kB, and 5 kB more where a slide has no report to link pictures from.
    """
    record = read_archive(out / ARCHIVE_FILE)
    rows = [_row(out, slide) for slide in record.slides]
    page = out / PAGE
    atomic_write_bytes(page, _render(record, rows).encode())
    return page


def _row(out: Path, slide: ArchiveSlide) -> Row:
    run = out / slide.run if slide.run else None
    rank = STATES.index(slide.state)
    if run is not None and (run / "report" / PAGE).is_file():
        report, he, ihc = (
            _link(slide.run, "report", link) for link in (PAGE, "he/0/0_0.jpg", "ihc/0/0_0.jpg")
        )
        return Row(slide, rank, report, he, ihc)
    he, he_fault = _or_fault(out, partial(_kept_he, run))
    ihc, ihc_fault = _or_fault(out, partial(_picture, out, slide))
    return Row(slide, rank, "", he, ihc, tuple(filter(None, (he_fault, ihc_fault))))


def _or_fault(out: Path, show: Callable[[], str]) -> tuple[str, str]:
    """Give a picture, or why there is none: what one slide lost must not cost the page of all."""
    try:
        return show(), ""
    except WsiStainError as error:
        return "", error.message.replace(f"{out}/", "")  # folders may name people


def _link(*parts: str) -> str:
    """Join a relative link; no character of a file's name can end it or name a protocol."""
    return quote("/".join(parts).replace("\\", "/"))


def _kept_he(run: Path | None) -> str:
    """Give what a run kept of the H&E as data of the page, if it came so far."""
    if run is None or not (kept := HeFolder(run / "he")).exists:
        return ""
    return _as_data(kept.overview())


def _picture(out: Path, slide: ArchiveSlide) -> str:
    """Give a finished pyramid, small, as data of the page."""
    path = out / slide.output
    if not slide.output or not path.exists():
        return ""
    with SlideSource.open(path) as source:
        return _as_data(source.thumbnail(source.mpp_l0 * max(source.size_l0) / THUMBNAIL_PX))


def _as_data(pixels: NDArray[np.uint8]) -> str:
    """Shrink uint8 (h, w, 3) RGB and word it as a data address."""
    height_px, width_px = pixels.shape[:2]
    shrink = max(1.0, max(height_px, width_px) / THUMBNAIL_PX)
    size = (max(1, round(width_px / shrink)), max(1, round(height_px / shrink)))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()


def _render(record: ArchiveRecord, rows: Sequence[Row]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "clock": clock}
    style = (HERE / "assets" / "report.css").read_text(encoding="utf-8")
    texts = {
        tag: (HERE / "templates" / name).read_text(encoding="utf-8")
        for tag, name in RAW_TEXTS.items()
    }
    texts["style"] = style + texts["style"]
    counts: Counter[str] = Counter(slide.state for slide in record.slides)
    return environment.get_template(TEMPLATE).render(
        record=record,
        rows=rows,
        counts=[(state, counts[state]) for state in STATES if counts[state]],
        n_flagged=sum(bool(slide.flags) for slide in record.slides),
        digests={tag: _digest(text) for tag, text in texts.items()},
        texts=texts,
    )


def _digest(text: str) -> str:
    """Name a text as a page's policy does: only scripts and styles of ours may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
