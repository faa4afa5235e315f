"""The run's page: true numbers, no leak, no network, works anywhere."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wsi_stain.errors import OutputError
from wsi_stain.evaluate.metrics import sobel_ssim, whitespace_error
from wsi_stain.evaluate.metrics_nuclei import labelling_index, stain_densities
from wsi_stain.evaluate.metrics_stain import POSITIVE_OD, dab_p90
from wsi_stain.evaluate.report import write_report
from wsi_stain.geometry import Scale
from wsi_stain.slides.image import SlideSource
from wsi_stain.stain.density import is_stained
from wsi_stain.write.overview import HeFolder

MakeRun = Callable[..., Path]

WHITE = (243.0, 243.0, 244.0)
LIBRARY = Path("assets/openseadragon/openseadragon.min.js")
WORDS = "virtual stain, research use only"


class Page(HTMLParser):
    """What a browser would make of the page: tags, texts by tag, references."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)
        self.texts.setdefault(tag, []).append("")

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[self._open[-1]][-1] += data

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def references(self) -> list[str]:
        found = [a[name] for _, a in self.tags for name in ("src", "href") if a.get(name)]
        return [ref for ref in found if ref is not None and not ref.startswith("data:")]

    def viewer(self) -> dict[str, Any]:
        [text] = [text for text in self.texts["script"] if text.startswith("{")]
        data: dict[str, Any] = json.loads(text)
        return data


def percent(value: float) -> str:
    return f"{value:.1f} %" if value < 9.95 else f"{value:.0f} %"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, make_run: MakeRun) -> Path:
    return make_run(tmp_path_factory.mktemp("out"), note="took the scanner's word")


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    return write_report(run)


def test_page_shows_pictures_numbers_and_warning_when_run_is_finished(
    run: Path, page: Path
) -> None:
    assert page == run / "report" / "index.html"
    assert not (run / "report.part").exists()
    html = page.read_text(encoding="utf-8")
    found = Page(page)
    assert found.texts["h1"] == ["S-1_ki67"]
    assert [text.lower() for text in found.texts["strong"]] == [WORDS + "."]
    captions = [
        text + span for text, span in zip(found.texts["figcaption"], ["", WORDS], strict=True)
    ]
    assert captions == ["H&E", "Virtual Ki-67" + WORDS]
    for wanted in (
        "9" * 64,
        "8" * 64,
        "12.5 s, finished",
        "4,321 stained pixels",
        "0.651, 0.701",
        "SHA-256 as recorded",
        "took the scanner",
        "write.quality (recipe)",
    ):
        assert wanted in html, wanted
    assert "sample.solver" not in html, "its model says so, nobody asked"
    assert re.search(r"<dt>solver</dt>\s*<dd>student</dd>", html)
    assert found.texts["td"].count("") == len(found.texts["td"]) / 2  # a verdict in each row
    verdicts = [a["class"] for tag, a in found.tags if tag == "span" and a.get("class")]
    assert verdicts == ["verdict ok"] * 7


def test_numbers_equal_metrics_when_computed_directly(run: Path, page: Path) -> None:
    kept = HeFolder(run / "he")
    record = kept.record()
    he = [kept.field(number) for number in range(len(record.fields))]
    with SlideSource.open(run.with_name("S-1_ki67.ome.tiff")) as source:
        scale = Scale(1.0, source.mpp_l0, source.size_l0)
        ihc = [source.read_out(region, scale) for region in record.fields]
    pairs = list(zip(he, ihc, strict=True))
    assert len(pairs) >= 2
    counted = [labelling_index(y, 0.5, white=WHITE) for y in ihc]
    n_nuclei = sum(index.n_nuclei for index in counted)
    index = 100 * sum(index.n_positive for index in counted) / n_nuclei
    tissue = [is_stained(x, WHITE) for x in he]
    positive = sum(
        int((t & (stain_densities(y, WHITE)[..., 1] > POSITIVE_OD)).sum())
        for t, y in zip(tissue, ihc, strict=True)
    )
    white = np.mean([whitespace_error(y, x, WHITE, WHITE).error_fraction for x, y in pairs])
    values = Page(page).texts["dd"][:15:3]

    assert 5 < index < 100
    assert values == [
        percent(index),
        percent(100 * positive / sum(int(t.sum()) for t in tissue)),
        f"{np.mean([dab_p90(y) for y in ihc]):.2f}",
        f"{np.mean([sobel_ssim(y, x) for x, y in pairs]):.2f}",
        percent(100 * float(white)),
    ]
    assert f"of {n_nuclei:,} nuclei" in page.read_text(encoding="utf-8")


def test_nothing_points_outside_when_all_files_are_searched(page: Path) -> None:
    folder = page.parent
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        if path.suffix in (".html", ".js", ".css") and relative != LIBRARY:
            text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
            assert re.findall(r"(?:https?|wss?|ftp)://|[\"'(=]//|@import", text) == [], relative
    library = (folder / LIBRARY).read_bytes()
    note = (folder / LIBRARY).with_name("VERSION.txt").read_text(encoding="utf-8")
    assert f"File sha256: {hashlib.sha256(library).hexdigest()}" in note
    assert "Redistribution" in (folder / LIBRARY).with_name("LICENSE.txt").read_text("utf-8")
    policy = [a["content"] for _, a in Page(page).tags if a.get("http-equiv")]
    assert policy[0] is not None
    assert policy[0].startswith("default-src 'none'; ")
    assert "http" not in policy[0]


def test_page_has_all_it_needs_when_moved(page: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(page.parent, moved)
    found = Page(moved / "index.html")
    viewer = found.viewer()
    references = [*found.references(), "positive.png"]
    for stain in ("he", "ihc"):
        for level in range(viewer["levels"]):
            step = viewer["tile"] << (viewer["levels"] - 1 - level)
            references += [
                f"{stain}/{level}/{x}_{y}.jpg"
                for x in range(-(-viewer["width"] // step))
                for y in range(-(-viewer["height"] // step))
            ]
    assert len(references) > 20
    assert [name for name in references if not (moved / name).is_file()] == []
    pictures = {path.relative_to(moved).as_posix() for path in moved.rglob("*.jpg")}
    assert pictures <= set(references)


def test_page_tells_no_place_or_person_when_searched(
    run: Path, page: Path, synthetic_slide: Path
) -> None:
    html = page.read_text(encoding="utf-8")
    for secret in (str(run.parent), str(synthetic_slide), synthetic_slide.stem, "jane", "/home"):
        assert secret not in html
    assert "<dt>bundle (flag)</dt><dd>mine</dd>" in html


def test_hostile_texts_stay_texts_when_shown(tmp_path: Path, make_run: MakeRun) -> None:
    name = """a"'><img src=q onerror=boom()>&lt;_ki67"""
    evil = "</script><script>boom()</script>{{ 7 * 7 }}"
    run = make_run(tmp_path, name, marker=evil, note=evil)
    page = write_report(run)
    found = Page(page)
    assert found.texts["h1"] == [name]
    assert all("onerror" not in attributes for _, attributes in found.tags)
    assert len([tag for tag, _ in found.tags if tag == "script"]) == 3
    assert "boom()" not in "".join(found.texts["script"])
    assert found.texts["figcaption"][1] == f"Virtual {evil}"


def test_numbers_stay_when_the_overview_is_reduced(
    page: Path, tmp_path: Path, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsi_stain.write.overview.choose_reduction", lambda size: 4)
    reduced, whole = Page(write_report(make_run(tmp_path))), Page(page)
    viewer = reduced.viewer()
    assert (viewer["width"], viewer["height"], viewer["reduction"]) == (351, 276, 4)
    assert viewer["tissue"] == whole.viewer()["tissue"]
    assert viewer["fields"] == whole.viewer()["fields"]
    assert reduced.texts["dd"][:15] == whole.texts["dd"][:15]


def test_lost_tissue_is_flagged_at_its_place_when_planted(
    tmp_path: Path, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsi_stain.write.overview.choose_reduction", lambda size: 2)
    page = write_report(make_run(tmp_path, blank=(256, 256, 512, 512)))
    # Cell by cell, px of the virtual slide: two cells of 256 px in each direction are blank.
    boxes = Page(page).viewer()["doubts"]
    assert [256, 256, 256, 256] in boxes
    assert all(256 <= x < 768 and 256 <= y < 768 for x, y, _, _ in boxes)
    assert f"{len(boxes)} of 30 places flagged: {len(boxes)} lost tissue" in page.read_text("utf-8")


def test_doubt_about_the_slide_stands_among_the_checks(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path)
    assert "no remarks" in write_report(run).read_text("utf-8")
    file = run / "manifest.json"
    record = json.loads(file.read_text())
    record["stain"]["notes"] = ["Is this an IHC? 12 % of it is brown."]  # beside the fit's own
    file.write_text(json.dumps(record))
    page = write_report(run).read_text("utf-8")
    assert "no remarks" not in page
    assert "Is this an IHC? 12 % of it is brown." in page


def test_report_is_small_when_slide_is_at_the_bound(page: Path) -> None:
    viewer = Page(page).viewer()
    n_bytes = sum(path.stat().st_size for path in page.parent.rglob("*") if path.is_file())
    megapixels = 2 * viewer["width"] * viewer["height"] / 1e6
    # JPEG of this noisy picture costs under a byte per pixel, upper levels and fields included.
    assert n_bytes < 1e6 * (1.0 + 1.6 * megapixels)


def test_report_is_the_same_when_slide_is_given_later(
    run: Path, page: Path, tmp_path: Path, make_run: MakeRun, synthetic_slide: Path
) -> None:
    late = make_run(tmp_path, keeps_he=False)
    with pytest.raises(OutputError, match="no H&E") as caught:
        write_report(late)
    assert "--slide" in caught.value.hint
    again = Page(write_report(late, slide=synthetic_slide))
    assert again.viewer() == Page(page).viewer()
    assert again.texts["dd"][:15] == Page(page).texts["dd"][:15]
    assert HeFolder(late / "he").record().fields == HeFolder(run / "he").record().fields


def test_other_slide_is_refused_when_given(
    tmp_path: Path, make_run: MakeRun, coordinate_slide: Path
) -> None:
    run = make_run(tmp_path, keeps_he=False)
    with pytest.raises(OutputError, match="not the slide"):
        write_report(run, slide=coordinate_slide)
    assert not (run / "report").exists()


def test_old_page_is_replaced_when_written_again(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path)
    first = write_report(run)
    (first.parent / "left.txt").write_text("over")
    assert write_report(run) == first
    assert not (first.parent / "left.txt").exists()


def test_flagged_tiles_are_listed_and_drawn_inside_the_picture(
    tmp_path: Path, make_run: MakeRun
) -> None:
    run = make_run(tmp_path)
    (run / "tiles.csv").write_text(
        "tile,x_px_out,y_px_out,size_px,x_um,y_um,structure,sobel_ssim,white_error,dab_p90,"
        "dab_sd,flags\n"
        "3,0,0,256,0,0,0.91,0.8,0.01,0.2,,\n"
        "7,1280,1024,256,640,512,0.11,0.3,0.02,0.3,,structure;white_error\n"
        "8,256,0,256,128,0,0.2,0.3,0.02,0.3,0.04,structure\n"
    )
    page = Page(write_report(run))
    assert page.viewer()["doubts"] == [[1280, 1024, 123, 77], [256, 0, 256, 256]]
    html = (run / "report" / "index.html").read_text(encoding="utf-8")
    assert "2 flagged: structure 2, white error 1" in html
    assert page.texts["button"][-2 - len(page.viewer()["fields"]) :][:2] == ["Tile 7", "Tile 8"]
    assert "Structure kept 0.11, Sobel-SSIM 0.3, White error 0.02, Strongest DAB OD 0.3<" in html
    assert "DAB OD sd over seeds 0.04<" in html

    (run / "tiles.csv").write_text("tile,x_px_out,y_px_out,size_px,flags\n3,0,0,256,\n")
    assert "none flagged" in write_report(run).read_text(encoding="utf-8")


def test_checks_of_the_file_are_not_repeated_when_the_run_just_ended(
    tmp_path: Path, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    for name in ("validate", "sha256_any"):
        monkeypatch.setattr(f"wsi_stain.evaluate.report.{name}", None)  # may not be called
    heard: list[str] = []
    page = write_report(run, is_fresh=True, listener=lambda event: heard.append(event.kind))
    assert heard == ["start", "finish"]
    assert "read back by the run" in page.read_text(encoding="utf-8")


def test_change_of_the_file_is_told_when_digest_differs(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path)
    with run.with_name("S-1_ki67.ome.tiff").open("ab") as file:
        file.write(b"\0")
    html = write_report(run).read_text(encoding="utf-8")
    assert "SHA-256 differs from the record" in html
    assert '<span class="verdict fault">' in html


@pytest.mark.parametrize(
    ("state", "words", "hint"),
    [("running", "has no picture yet", "translate"), ("finished", "moved or removed", "beside")],
)
def test_missing_picture_is_an_error_that_says_why(
    tmp_path: Path, make_run: MakeRun, state: str, words: str, hint: str
) -> None:
    run = make_run(tmp_path)
    run.with_name("S-1_ki67.ome.tiff").unlink()
    manifest = run / "manifest.json"
    text = manifest.read_text("utf-8")
    manifest.write_text(text.replace('"state": "finished"', f'"state": "{state}"', 1), "utf-8")
    with pytest.raises(OutputError, match=f"is missing: .*{words}") as caught:
        write_report(run)
    assert hint in caught.value.hint
