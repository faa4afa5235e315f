"""The index page of an archive: every slide on a row, links that lead somewhere, no leak."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from wsi_stain.archive_record import ARCHIVE_FILE, ArchiveRecord, ArchiveSlide, write_archive
from wsi_stain.errors import OutputError
from wsi_stain.evaluate.archive_page import write_archive_page
from wsi_stain.evaluate.report import write_report

MakeRun = Callable[..., Path]


def record_of(*slides: ArchiveSlide) -> ArchiveRecord:
    return ArchiveRecord(
        begun_utc="2026-01-02T03:04:05+00:00", bundle="ki67", state="running", slides=[*slides]
    )


def references(page: Path) -> list[str]:
    found: list[str] = []

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            del tag
            found.extend(value for name, value in attrs if name in ("src", "href") and value)

    Links().feed(page.read_text(encoding="utf-8"))
    return [link for link in found if link != "data:,"]


def test_links_lead_to_reports_and_pictures_whatever_the_names(
    tmp_path: Path, make_run: MakeRun
) -> None:
    name = "50 % #1 ?a&b_ki67"
    write_report(make_run(tmp_path / "sub dir", name))
    make_run(tmp_path, "bare_ki67")
    done = ArchiveSlide(
        name=name,
        state="done",
        run=f"sub dir/{name}.run",
        output=f"sub dir/{name}.ome.tiff",
        tiles=1234,
        positive_fraction=0.0,
    )
    bare = ArchiveSlide(
        name="bare", state="done", run="bare_ki67.run", output="bare_ki67.ome.tiff", tiles=20
    )
    early = ArchiveSlide(name="early", state="failed", run="early_ki67.run", error="No tissue.")
    write_archive(tmp_path / ARCHIVE_FILE, record_of(done, bare, early))
    page = write_archive_page(tmp_path)
    assert page == tmp_path / "index.html"
    links = references(page)
    on_disk = [unquote(link) for link in links if not link.startswith("data:")]
    assert [(tmp_path / link).is_file() for link in on_disk] == [True] * 3
    assert sum(link.startswith("data:image/jpeg;base64,") for link in links) == 2  # of bare
    html = page.read_text(encoding="utf-8")
    assert "0.0 %" in html
    assert "1,234" in html
    assert "Begun 2026-01-02 03:04 UTC, still running" in html
    assert html.count("not measured") == 1
    assert "research use only" in html
    assert len(html) < 40_000


def test_hostile_texts_stay_texts_and_nothing_points_outside(tmp_path: Path) -> None:
    evil = "</script><script>boom()</script>"
    slide = ArchiveSlide(name=evil, state="failed", error=evil, next=evil, flags=[evil])
    write_archive(tmp_path / ARCHIVE_FILE, record_of(slide))
    html = write_archive_page(tmp_path).read_text(encoding="utf-8")
    assert html.count("<script") == 1
    assert re.findall(r"(?:https?|wss?|ftp)://|@import|url\(", html) == []


def test_picture_lost_since_is_said_on_its_row_and_costs_no_other(
    tmp_path: Path, make_run: MakeRun
) -> None:
    slides = []
    for name in ("good_ki67", "broken_ki67"):
        make_run(tmp_path, name)
        slides.append(
            ArchiveSlide(name=name, state="done", run=f"{name}.run", output=f"{name}.ome.tiff")
        )
    broken = tmp_path / "broken_ki67.ome.tiff"
    broken.write_bytes(broken.read_bytes()[:5000])
    write_archive(tmp_path / ARCHIVE_FILE, record_of(*slides))
    page = write_archive_page(tmp_path)
    assert len(references(page)) == 3
    html = page.read_text(encoding="utf-8")
    assert html.count('<p class="error">') == 1
    assert "Slide broken_ki67.ome.tiff is truncated" in html.split('data-name="broken_ki67"')[1]
    assert str(tmp_path) not in html


def test_missing_record_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"archive\.json cannot be read") as caught:
        write_archive_page(tmp_path)
    assert "batch" in caught.value.hint
    assert not (tmp_path / "index.html").exists()
