"""An archive's run: right outputs and failures, nothing twice, equal bytes by any executor."""

from __future__ import annotations

import csv
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from wsi_stain.archive.jobs import Part
from wsi_stain.archive.lanes import Lanes
from wsi_stain.archive_record import ArchiveRecord, read_archive
from wsi_stain.config import RunConfig
from wsi_stain.errors import LockedError, SlideError
from wsi_stain.files import sha256_any
from wsi_stain.lock import OutputLock
from wsi_stain.manifest import Event
from wsi_stain.pipeline import translate_slide
from wsi_stain.write.validate import validate

RunOver = Callable[..., ArchiveRecord]
Settle = Callable[..., RunConfig]
States = Callable[[ArchiveRecord], dict[str, str]]

WHOLE_SLIDES = {f"s{index}_test" for index in range(8)}
BROKEN = {"cut_test", "empty_test", "no_mpp_test", "glass_test"}


def outputs(out: Path) -> dict[str, str]:
    return {path.name: sha256_any(path) for path in sorted(out.glob("*.ome.tiff"))}


def test_archive_of_twelve_ends_with_the_right_outputs_and_failures(
    tmp_path: Path, archive_folder: Path, run_over: RunOver, settle: Settle, states: States
) -> None:
    out = tmp_path / "serial"
    locked = out / "s3_test.run"
    locked.mkdir(parents=True)
    with OutputLock(locked / "lock"):
        record = run_over(archive_folder, out)
    found = states(record)
    assert {name for name, state in found.items() if state == "failed"} == BROKEN | {"s3_test"}
    assert {name for name, state in found.items() if state == "done"} == WHOLE_SLIDES - {"s3_test"}
    errors = {slide.name: slide.error for slide in record.of_state("failed")}
    assert "pixel size" in errors["no_mpp_test"]
    assert "empty" in errors["empty_test"]
    assert "No tissue" in errors["glass_test"]
    assert "Another run" in errors["s3_test"]
    assert all(slide.next for slide in record.of_state("failed"))

    began = Counter[str]()

    def count(name: str, event: Event) -> None:
        if (event.stage, event.kind) == ("translate", "start"):
            began[name] += 1

    again = states(run_over(archive_folder, out, listener=count))
    assert {name for name, state in again.items() if state == "skipped"} == WHOLE_SLIDES - {
        "s3_test"
    }
    assert again["s3_test"] == "done"
    assert began == {"s3_test": 1}, "finished slides are not begun again"
    for path in out.glob("*.ome.tiff"):
        assert validate(path).ok
    made = outputs(out)
    assert len(made) == 8


def test_slides_share_the_workers_of_a_cluster_and_get_the_same_bytes(
    tmp_path: Path, archive_folder: Path, run_over: RunOver, settle: Settle, states: States
) -> None:
    pattern = f"{archive_folder}/[cs][u0-2]*.tiff"
    dask = settle(cluster__executor="dask", cluster__workers=2)
    in_work, most = set[str](), list[int]()

    def count(name: str, event: Event) -> None:
        if event.stage == "archive" and event.kind == "start":
            in_work.add(name)
        if event.stage == "archive" and event.kind == "finish":
            in_work.discard(name)
        most.append(len(in_work))

    shared = run_over(pattern, tmp_path / "dask", base=dask, slides_at_once=2, listener=count)
    alone = run_over(pattern, tmp_path / "serial")
    assert states(shared) == states(alone)
    assert Counter(states(shared).values()) == {"done": 3, "failed": 1}
    assert max(most) == 2, "two at once, never more"
    assert outputs(tmp_path / "dask") == outputs(tmp_path / "serial")


def test_record_is_readable_and_names_no_folder(
    tmp_path: Path, archive_folder: Path, run_over: RunOver
) -> None:
    source = tmp_path / "Jane Doe"
    source.mkdir()
    for name in ("s0.tiff", "cut.tiff", "no_mpp.tiff"):
        shutil.copy(archive_folder / name, source)
    out = tmp_path / "out"
    record = run_over(source, out)
    assert read_archive(out / "archive.json") == record
    raw = json.loads((out / "archive.json").read_text())
    assert raw["schema"] == 1
    assert raw["state"] == "finished"
    assert {slide["name"] for slide in raw["slides"]} == {"s0_test", "cut_test", "no_mpp_test"}
    done = next(slide for slide in raw["slides"] if slide["name"] == "s0_test")
    assert done["output"] == "s0_test.ome.tiff"
    assert done["run"] == "s0_test.run"
    assert done["tiles"] > 0
    assert (out / done["output"]).exists()
    assert 0.0 <= done["positive_fraction"] <= 1.0
    failed = next(slide for slide in raw["slides"] if slide["name"] == "cut_test")
    assert failed["positive_fraction"] is None
    rows = list(csv.DictReader((out / "archive.csv").read_text().splitlines()))
    assert [row["state"] for row in rows] == [slide["state"] for slide in raw["slides"]]
    for path in (out / "archive.json", out / "archive.csv", *(out / "logs").iterdir()):
        text = path.read_text()
        assert str(tmp_path) not in text
        assert "Jane" not in text


def test_pages_are_written_of_slides_that_were_done_before_too(
    tmp_path: Path, archive_folder: Path, run_over: RunOver, states: States
) -> None:
    out, page = tmp_path / "out", Path("report/index.html")
    run_over(f"{archive_folder}/s0.tiff", out)
    assert not (out / "s0_test.run" / page).exists()
    record = run_over(f"{archive_folder}/s[01].tiff", out, report=True)
    assert states(record) == {"s0_test": "skipped", "s1_test": "done"}
    written = [out / f"{name}.run" / page for name in ("s0_test", "s1_test")]
    assert all("Virtual stain" in path.read_text(encoding="utf-8") for path in written)
    assert not [slide.notes for slide in record.slides if "report" in " ".join(slide.notes)]
    before = [path.stat().st_mtime_ns for path in written]
    run_over(f"{archive_folder}/s[01].tiff", out, report=True)
    assert [path.stat().st_mtime_ns for path in written] == before, "a page that is there stays"


def test_work_of_workers_elsewhere_is_known_again(
    tmp_path: Path, archive_folder: Path, run_over: RunOver, states: States
) -> None:
    # The record of a run over a scheduler holds no address, without which it is no settings.
    source, out = f"{archive_folder}/s0.tiff", tmp_path / "out"
    run_over(source, out)
    path = out / "s0_test.run" / "manifest.json"
    record = json.loads(path.read_text())
    record["settings"]["cluster"]["executor"] = "address"
    path.write_text(json.dumps(record))
    assert states(run_over(source, out)) == {"s0_test": "skipped"}


def test_damaged_output_is_made_again_and_a_foreign_one_is_kept(
    tmp_path: Path, small_slide: Path, run_over: RunOver, settle: Settle, states: States
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    shutil.copy(small_slide, source / "a.tiff")
    run_over(source, out)
    output = out / "a_test.ome.tiff"
    good = output.read_bytes()

    output.write_bytes(good[:-1000])
    record = run_over(source, out)
    assert states(record) == {"a_test": "done"}
    assert "made again" in record.slides[0].notes[0]
    assert output.read_bytes() == good

    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    output.write_bytes(flipped)
    assert states(run_over(source, out, verify=True)) == {"a_test": "done"}
    assert output.read_bytes() == good

    other = settle(write__quality=70)
    record = run_over(source, out, base=other)
    assert states(record) == {"a_test": "failed"}
    assert "exists already" in record.slides[0].error
    assert output.read_bytes() == good
    assert states(run_over(source, out, base=settle(write__quality=70, write__overwrite=True))) == {
        "a_test": "done"
    }
    assert output.read_bytes() != good


def test_spread_that_was_lost_is_made_again(
    tmp_path: Path, archive_folder: Path, run_over: RunOver, settle: Settle, states: States
) -> None:
    source, base = archive_folder / "s1.tiff", settle(sample__seeds=2)
    run_over(source, tmp_path, base=base)
    spread = tmp_path / "s1_test_uncertainty.ome.tiff"
    whole = spread.read_bytes()
    assert states(run_over(source, tmp_path, base=base)) == {"s1_test": "skipped"}
    for left in (None, whole[:1000]):
        spread.unlink()
        if left:
            spread.write_bytes(left)
        record = run_over(source, tmp_path, base=base)
        assert states(record) == {"s1_test": "done"}
        assert "s1_test_uncertainty.ome.tiff: it" in " ".join(record.slides[0].notes)
        assert spread.read_bytes() == whole


def test_slide_done_alone_with_its_pixel_size_is_done(
    tmp_path: Path, archive_folder: Path, run_over: RunOver, settle: Settle, states: States
) -> None:
    source = archive_folder / "no_mpp.tiff"
    assert states(run_over(source, tmp_path)) == {"no_mpp_test": "failed"}
    translate_slide(source, tmp_path, settle(slide__mpp=0.5))
    assert states(run_over(source, tmp_path)) == {"no_mpp_test": "skipped"}
    other = run_over(source, tmp_path, base=settle(slide__mpp=0.25))
    assert states(other) == {"no_mpp_test": "failed"}, "another size was asked for"


def test_workers_and_shards_make_no_other_work_of_it(
    tmp_path: Path, small_slide: Path, run_over: RunOver, settle: Settle, states: States
) -> None:
    out = tmp_path / "out"
    run_over(small_slide, out)
    moved = settle(tiles__shard_tiles=8, cluster__workers=7, cluster__attempts=3)
    assert states(run_over(small_slide, out, base=moved)) == {"small_test": "skipped"}
    assert states(run_over(small_slide, out, base=settle(seed=1))) == {"small_test": "failed"}


def test_hiccup_is_tried_again_and_then_named(
    tmp_path: Path, small_slide: Path, run_over: RunOver, monkeypatch: pytest.MonkeyPatch
) -> None:
    road, calls = Lanes._road, list[int]()

    def stumble(times: int) -> Callable[..., Any]:
        def stumbling(self: Lanes, *arguments: Any) -> Any:
            calls.append(1)
            if len(calls) <= times:
                raise SlideError(f"Slide {small_slide} cannot be read.") from OSError(
                    5, "I/O error"
                )
            return road(self, *arguments)

        return stumbling

    monkeypatch.setattr(Lanes, "_road", stumble(2))
    record = run_over(small_slide, tmp_path / "a", attempts=3)
    assert record.slides[0].state == "done"
    assert record.slides[0].error == ""
    log = (tmp_path / "a" / "logs" / "small_test.log").read_text()
    assert log.count("failed: Slide small.tiff cannot be read.") == 2

    calls.clear()
    monkeypatch.setattr(Lanes, "_road", stumble(9))
    record = run_over(small_slide, tmp_path / "b", attempts=3)
    assert len(calls) == 3
    assert record.slides[0].error == "Slide small.tiff cannot be read. (3 attempts)"


def test_bug_in_one_slide_ends_that_slide_only(
    tmp_path: Path, archive_folder: Path, run_over: RunOver, monkeypatch: pytest.MonkeyPatch
) -> None:
    road = Lanes._road

    def broken(self: Lanes, slide: Path, *arguments: Any) -> Any:
        if slide.name == "s1.tiff":
            raise ZeroDivisionError("a bug")
        return road(self, slide, *arguments)

    monkeypatch.setattr(Lanes, "_road", broken)
    record = run_over(f"{archive_folder}/s[01].tiff", tmp_path, attempts=3)
    assert [(s.state, s.error) for s in record.slides] == [
        ("done", ""),
        ("failed", "ZeroDivisionError: a bug"),
    ]
    assert "Traceback" in (tmp_path / "logs" / "s1_test.log").read_text()


def test_parts_hold_all_slides_once_and_join(
    tmp_path: Path, archive_folder: Path, run_over: RunOver, states: States
) -> None:
    pattern = f"{archive_folder}/s[0-2].tiff"
    names_of_all = sorted(WHOLE_SLIDES)[:3]
    parts = [run_over(pattern, tmp_path, part=Part(i, 2)) for i in (1, 2)]
    names = [slide.name for part in parts for slide in part.slides]
    assert sorted(names) == names_of_all
    joined = read_archive(tmp_path / "archive.json")
    assert joined.state == "finished"
    assert states(joined) == dict.fromkeys(names_of_all, "done")
    assert set(states(run_over(pattern, tmp_path)).values()) == {"skipped"}
    assert all(slide.tiles > 0 for slide in read_archive(tmp_path / "archive.json").slides)


def test_second_client_of_the_same_archive_is_refused(
    tmp_path: Path, small_slide: Path, run_over: RunOver
) -> None:
    with (
        OutputLock(tmp_path / "archive.lock"),
        pytest.raises(LockedError, match=str(os.getpid())),
    ):
        run_over(small_slide, tmp_path)


def test_dead_client_of_another_host_is_told_by_its_silence(
    tmp_path: Path, small_slide: Path, run_over: RunOver
) -> None:
    run_over(small_slide, tmp_path)
    lock = tmp_path / "archive.lock"
    lock.write_text(
        '{"host": "node7", "pid": 4711, "process_start": "", "since_utc": "2026-01-02T03:04:05"}'
    )
    hours_ago_s = time.time() - 3 * 3600
    os.utime(tmp_path / "status.json", (hours_ago_s, hours_ago_s))
    with pytest.raises(LockedError, match="process 4711 on host node7") as caught:
        run_over(small_slide, tmp_path)
    assert f"`ssh node7 ps -p 4711` shows that it is dead: rm {lock}" in caught.value.hint
    assert caught.value.hint.endswith("It last wrote status.json 180 min ago.")
    lock.unlink()
    assert run_over(small_slide, tmp_path).slides[0].state == "skipped"


def test_stores_and_copies_lie_on_scratch_and_go(
    tmp_path: Path, archive_folder: Path, run_over: RunOver, states: States
) -> None:
    scratch, seen = tmp_path / "scratch", set[str]()
    scratch.mkdir()

    def look(name: str, event: Event) -> None:
        if (event.stage, event.kind) == ("translate", "advance"):
            seen.update(path.name for path in scratch.rglob("*") if path.is_dir())
            seen.update(path.name for path in scratch.rglob("*.tiff"))
            assert not (tmp_path / "out" / f"{name}.run" / "store").exists()

    record = run_over(
        f"{archive_folder}/s[01].tiff", tmp_path / "out", scratch=scratch, stage=True, listener=look
    )
    assert states(record) == {"s0_test": "done", "s1_test": "done"}
    assert {"store", "staged", "s0.tiff", "s1.tiff"} <= seen
    assert list(scratch.rglob("*")) == []
    plain = run_over(f"{archive_folder}/s[01].tiff", tmp_path / "plain")
    assert outputs(tmp_path / "out") == outputs(tmp_path / "plain")
    assert msgspec.to_builtins(plain)["slides"][0]["output"] == "s0_test.ome.tiff"
