"""The record of a run: true after each step, readable, repeatable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from wsi_stain.archive_record import (
    ARCHIVE_FILE,
    ArchiveRecord,
    ArchiveSlide,
    read_archive,
    write_archive,
)
from wsi_stain.config import RunConfig
from wsi_stain.errors import OutputError
from wsi_stain.manifest import RunManifest

Begin = Callable[..., RunManifest]


@pytest.fixture
def begin(tmp_path: Path) -> Begin:
    def make(**changes: Any) -> RunManifest:
        facts: dict[str, Any] = {
            "settings": json.loads(msgspec.json.encode(RunConfig(seed=5))),
            "origins": {"seed": "flag"},
            "slide": {"digest": "d1", "size": "10 x 20 px", "pixel size um": 0.5},
            "grid_digest": "g1",
            "bundle": {"name": "ki67", "digest": "b1"},
            "seed": 5,
            "versions": {"python": "3.11"},
        }
        return RunManifest.begin(tmp_path / "manifest.json", **(facts | changes))

    return make


def on_disk(manifest: RunManifest) -> Any:
    return json.loads(manifest.path.read_text())


def test_file_holds_everything_when_begun(begin: Begin) -> None:
    found = on_disk(begin())
    assert found["state"] == "running"
    assert found["schema"] == 1
    assert found["seed"] == 5
    assert found["origins"] == {"seed": "flag"}
    assert found["slide"]["digest"] == "d1"
    assert "research use only" in found["statement"]
    assert msgspec.convert(found["settings"], RunConfig) == RunConfig(seed=5)


def test_file_is_for_people_when_written(begin: Begin) -> None:
    text = begin().path.read_text()
    assert text.startswith('{\n  "schema": 1,\n')
    assert text.endswith("}\n")


def test_file_follows_each_step_of_a_run(begin: Begin, tmp_path: Path) -> None:
    manifest = begin()
    manifest.stage_started("fill", total=4, done=1)
    assert on_disk(manifest)["stages"] == [
        {
            "name": "fill",
            "state": "running",
            "done": 1,
            "total": 4,
            "seconds": 0.0,
            "busy_seconds": 0.0,
            "attempts": 1,
        }
    ]
    manifest.stage_finished("fill", done=4, seconds=2.5)
    assert (
        on_disk(manifest)["stages"][0] | {"state": "finished", "done": 4, "seconds": 2.5}
        == (on_disk(manifest)["stages"][0])
    )
    manifest.record(stain={"white": [1.0, 2.0, 3.0]}, devices=["cpu float32"])
    assert on_disk(manifest)["stain"] == {"white": [1.0, 2.0, 3.0]}
    output = tmp_path / "a.ome.tiff"
    output.write_bytes(b"pixels")
    manifest.finish([output])
    found = on_disk(manifest)
    assert found["state"] == "finished"
    assert found["finished_utc"] >= found["begun_utc"]
    digest = hashlib.sha256(b"pixels").hexdigest()
    assert found["outputs"] == [{"name": "a.ome.tiff", "bytes": 6, "sha256": digest}]


def test_stage_takes_time_when_none_is_given(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = begin()
    clock = iter([10.0, 13.25])
    monkeypatch.setattr("wsi_stain.manifest.time.monotonic", lambda: next(clock))
    manifest.stage_started("fit", total=1)
    manifest.stage_finished("fit", done=1)
    assert manifest.stages[0].seconds == 3.25


def test_loaded_equals_written(begin: Begin) -> None:
    manifest = begin()
    manifest.stage_started("fill", total=4)
    manifest.note("a remark")
    manifest.note("a remark")
    loaded = RunManifest.load(manifest.path)
    assert loaded.content == manifest.content
    assert loaded.content.notes == ["a remark"]


def test_stages_carry_on_when_the_same_run_starts_again(begin: Begin) -> None:
    first = begin()
    first.stage_started("fill", total=4)
    first.stage_finished("fill", done=4, seconds=2.0)
    first.stage_started("translate", total=4)
    second = begin()
    assert [(s.name, s.state) for s in second.stages] == [
        ("fill", "finished"),
        ("translate", "interrupted"),
    ]
    second.stage_started("translate", total=4, done=3)
    second.stage_finished("translate", done=4, seconds=1.5)
    assert second.stages[1].attempts == 2
    assert second.stages[1].seconds == 1.5
    assert second.content.begun_utc == first.content.begun_utc


@pytest.mark.parametrize(
    "change", [{"seed": 6}, {"grid_digest": "g2"}, {"bundle": {"name": "x", "digest": "b2"}}]
)
def test_stages_begin_anew_when_the_work_differs(begin: Begin, change: dict[str, Any]) -> None:
    first = begin()
    first.stage_started("fill", total=4)
    assert begin(**change).stages == []


def test_stages_begin_anew_when_the_old_run_is_finished(begin: Begin) -> None:
    first = begin()
    first.stage_started("fill", total=4)
    first.finish([])
    second = begin()
    assert second.stages == []
    assert on_disk(second)["state"] == "running"


@pytest.mark.parametrize("damage", [b"", b'{"schema": 1', b"\xff\xfe", b'{"schema": 1}', b"[]"])
def test_error_is_clear_when_damaged(begin: Begin, damage: bytes) -> None:
    path = begin().path
    path.write_bytes(damage)
    with pytest.raises(OutputError, match=r"manifest\.json is damaged: .*Delete it"):
        RunManifest.load(path)
    with pytest.raises(OutputError, match="is damaged"):
        begin()


def test_error_is_clear_when_from_a_later_version(begin: Begin) -> None:
    path = begin().path
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 2}))
    with pytest.raises(OutputError, match=r"has schema 2; this version reads up to 1\. Install"):
        RunManifest.load(path)


def test_fields_added_later_are_ignored_when_loading(begin: Begin) -> None:
    path = begin().path
    path.write_text(json.dumps(json.loads(path.read_text()) | {"later": True}))
    assert RunManifest.load(path).content.seed == 5


def test_error_names_the_file_when_missing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"none\.json cannot be read: No such file"):
        RunManifest.load(tmp_path / "none.json")


def test_what_is_fixed_at_birth_cannot_be_recorded(begin: Begin) -> None:
    with pytest.raises(TypeError, match="seed"):
        begin().record(seed=7)


def test_finish_fails_when_an_output_is_missing(begin: Begin, tmp_path: Path) -> None:
    manifest = begin()
    with pytest.raises(OutputError, match=r"gone\.tiff cannot be read"):
        manifest.finish([tmp_path / "gone.tiff"])
    assert on_disk(manifest)["state"] == "running"


def test_stage_that_never_started_cannot_finish(begin: Begin) -> None:
    with pytest.raises(KeyError):
        begin().stage_finished("fill", done=1)


def test_archive_comes_back_as_written(tmp_path: Path) -> None:
    record = ArchiveRecord(
        begun_utc="2026-01-01T00:00:00+00:00",
        bundle="ki67",
        slides=[
            ArchiveSlide(name="a", state="done", tiles=81, positive_fraction=0.25),
            ArchiveSlide(name="b", state="failed", error="Slide b is broken.", next="see b"),
        ],
    )
    write_archive(tmp_path / ARCHIVE_FILE, record)
    assert read_archive(tmp_path / ARCHIVE_FILE) == record
    assert json.loads((tmp_path / ARCHIVE_FILE).read_text())["slides"][1]["run"] == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("{", "damaged"),
        ('{"schema": 1, "slides": 3}', "damaged"),
        ('{"schema": 99}', "schema 99"),
    ],
)
def test_archive_is_refused_when_not_whole(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / ARCHIVE_FILE
    if text is not None:
        path.write_text(text)
    with pytest.raises(OutputError, match=said):
        read_archive(path)
