"""The terminal: the plan first, lines or bars, a summary; nothing of it on stdout but results."""

from __future__ import annotations

import re

import pytest

from wsi_stain.console import (
    ArchiveDisplay,
    ProgressDisplay,
    duration,
    megabytes,
    plan_rows,
    summary_rows,
)
from wsi_stain.manifest import Event

PLAN = {
    "format": "aperio",
    "size": "2220 x 2967 px",
    "pixel size um": 0.499,
    "pixel size from": "aperio.MPP",
    "bundle": "ki67 (Ki-67, 0.5 um/px, research use only)",
    "output size": "1110 x 1484 px",
    "output pixel size um": 0.998,
    "tiles": "81 of 256 px in 11 shards",
    "scratch disk MB": 31.9,
    "output MB (about)": 1400.0,
    "memory MB (about)": 1912,
    "minutes (about)": 2.5,
}
SUMMARY = {
    "output": "o/a_ki67.ome.tiff",
    "run folder": "o/a_ki67.run",
    "size": "1110 x 1484 px",
    "pixel size um": 0.998,
    "bytes": 2_100_000,
    "tiles": 81,
    "flags": [],
    "seconds": {"fill": 5.61, "translate": 64.2, "in all": 66.0},
    "note": "virtual stain, research use only",
}


def test_plan_says_slide_model_work_and_needs() -> None:
    rows = dict(plan_rows(PLAN))
    assert rows["slide"] == "aperio, 2220 x 2967 px, 0.499 um/px (from aperio.MPP)"
    assert rows["plan"] == "81 tiles of 256 px in 11 shards -> 1110 x 1484 px, 0.998 um/px"
    assert rows["needs"].startswith("about 2 min, 1.9 GB of memory, 31.9 MB of scratch disk")
    assert "research use only" in rows["model"]


def test_plan_names_the_solver_and_what_it_costs_a_tile() -> None:
    bare = dict(plan_rows(PLAN))["model"]
    few = dict(plan_rows({**PLAN, "solver": "solver", "evaluations a tile": 8}))["model"]
    one = dict(plan_rows({**PLAN, "solver": "student", "evaluations a tile": 1}))["model"]
    assert few == f"{bare}; solver, 8 evaluations a tile"
    assert one == f"{bare}; student, 1 evaluation a tile"


def test_summary_tells_files_flags_times_and_what_else_there_is() -> None:
    rows = dict(summary_rows({**SUMMARY, "numbers": {"labelling index %": 12.5}}))
    assert rows["picture"] == "1110 x 1484 px, 0.998 um/px, 81 tiles, 2.1 MB"
    assert rows["time"] == "read patches 5.6 s, translate 64 s; beside each other, 66 s in all"
    assert rows["flags"] == "none"
    assert rows["numbers"] == "labelling index % 12.5"
    assert rows["next"] == "wsi-stain report o/a_ki67.run"
    reported = dict(summary_rows({**SUMMARY, "report": "o/a_ki67.run/report/index.html"}))
    assert reported["report"] == "o/a_ki67.run/report/index.html"
    assert reported["next"] == "wsi-stain quantify o/a_ki67.ome.tiff"
    assert dict(summary_rows({**SUMMARY, "flags": ["seam"]}))["flags"] == "seam"
    spaced = dict(summary_rows({**SUMMARY, "run folder": "my slides/a_ki67.run"}))
    assert spaced["next"] == "wsi-stain report 'my slides/a_ki67.run'"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.96, "10.0 s"), (64.2, "64 s"), (600, "10 min"), (9000, "2.5 h")],
)
def test_duration_has_a_sensible_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text
    assert megabytes(999.9) == "999.9 MB"
    assert megabytes(1912) == "1.9 GB"


def drive(display: ProgressDisplay, monkeypatch: pytest.MonkeyPatch) -> None:
    """Play a run of 80 tiles in 40 s, with a clock of our own."""
    clock = [0.0]
    monkeypatch.setattr("wsi_stain.console.time.monotonic", lambda: clock[0])
    with display:
        display(Event("plan", "start"))
        display(Event("plan", "finish", facts=PLAN))
        display(Event("translate", "start", total=80))
        for done in (20, 40, 60, 80):
            clock[0] += 10.0
            display(Event("translate", "advance", done=done, total=80))
        display(Event("run", "note", text="Is this slide H&E?"))
        display(Event("translate", "finish", done=80, total=80))


def test_lines_are_plain_and_on_stderr_when_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drive(ProgressDisplay(), monkeypatch)
    out, err = capsys.readouterr()
    assert out == ""
    assert "\x1b" not in err
    lines = err.splitlines()
    assert lines[0] == "find tissue, plan: done in 0.0 s"
    assert lines[1].startswith("slide  aperio")
    assert "translate: 40/80, 2.0 tiles/s, 20 s left" in lines
    assert "note: Is this slide H&E?" in lines
    assert lines[-1] == "translate: done in 40.0 s"


def test_one_bar_per_stage_with_its_rate_when_there_is_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    drive(ProgressDisplay(), monkeypatch)
    out, err = capsys.readouterr()
    assert out == ""
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", err)
    assert "slide  aperio" in shown
    assert "Is this slide H&E?" in shown
    bar = [line for line in shown.splitlines() if line.startswith("translate")][-1]
    assert "80/80" in bar
    assert "2.0 tiles/s" in bar
    assert "ETA" not in bar  # it is over
    assert "1/1" not in shown  # a stage that counts nothing


def test_bar_says_how_long_it_will_take_while_it_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    with ProgressDisplay() as display:
        display(Event("translate", "start", total=80))
        display(Event("translate", "advance", done=20, total=80))
    assert re.search(
        r"20/80.*ETA -?[0-9-]", re.sub(r"\x1b\[[0-9;?]*m", "", capsys.readouterr().err)
    )


def test_nothing_is_shown_when_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drive(ProgressDisplay(quiet=True), monkeypatch)
    assert capsys.readouterr() == ("", "")


def test_line_about_workers_stands_alone(capsys: pytest.CaptureFixture[str]) -> None:
    line = "waiting for workers: 0 of 2, job 17 PENDING (Resources)"
    event = Event("workers", "note", text=line, facts={"dashboard": "http://127.0.0.1:1/status"})
    with ProgressDisplay() as display:
        display(event)
    with ArchiveDisplay(3) as archive:
        archive("", event)
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [line, line]
    assert printed.out == ""


def test_line_ends_with_its_count_when_it_is_too_early_for_a_rate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [100.0]
    monkeypatch.setattr("wsi_stain.console.time.monotonic", lambda: clock[0])
    with ProgressDisplay() as display:
        display(Event("fill", "start", total=9))
        clock[0] += 0.1
        display(Event("fill", "advance", done=4, total=9))
    assert capsys.readouterr().err.splitlines() == ["read patches: 4/9"]
