"""How far an archive is: counts, time left, and files that are whole at any moment."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from wsi_stain.archive import watch as module
from wsi_stain.archive.jobs import Part, make_jobs
from wsi_stain.archive.record import ArchiveFiles
from wsi_stain.archive.source import Entry
from wsi_stain.archive.watch import Watch
from wsi_stain.config import RunConfig
from wsi_stain.manifest import Event

SAMPLE = re.compile(r'^wsi_stain_archive_\w+(\{state="\w+"\})? -?[0-9.e+]+$')


@pytest.fixture
def watch(
    tmp_path: Path, settle: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> Watch:
    """A watch over four slides of 100, 100, 200 and 400 bytes that writes at each event."""
    monkeypatch.setattr(module, "WRITE_EVERY_S", -1.0)
    entries = []
    for name, size_bytes in (("a", 100), ("b", 100), ("c", 200), ("d", 400)):
        (tmp_path / f"{name}.svs").write_bytes(bytes(size_bytes))
        entries.append(Entry(tmp_path / f"{name}.svs", name))
    return Watch(ArchiveFiles(tmp_path, Part()), make_jobs(entries, settle()))


def read(folder: Path) -> dict[str, object]:
    status: dict[str, object] = json.loads((folder / "status.json").read_text())
    return status


def test_status_counts_slides_and_tiles(tmp_path: Path, watch: Watch) -> None:
    assert read(tmp_path)["slides"] == {
        "pending": 4,
        "running": 0,
        "done": 0,
        "skipped": 0,
        "failed": 0,
    }
    for name in ("a_test", "b_test"):
        watch.hear(name, Event("archive", "start"))
        watch.hear(name, Event("translate", "start", done=10, total=50))
    watch.hear("a_test", Event("translate", "advance", done=30, total=50))
    status = read(tmp_path)
    assert status["tiles_done"] == 20, "those of an earlier run are not this one's"
    assert status["left_seconds"] is None
    in_work = status["in_work"]
    assert isinstance(in_work, list)
    assert in_work[0]["stages"] == {"translate": [30, 50]}

    # A second attempt goes on from the tiles of the first.
    watch.hear("a_test", Event("archive", "note", text="again"))
    watch.hear("a_test", Event("archive", "start"))
    watch.hear("a_test", Event("translate", "start", done=30, total=50))
    watch.hear("a_test", Event("translate", "advance", done=50, total=50))
    watch.hear("a_test", Event("archive", "finish", text="done"))
    watch.hear("b_test", Event("archive", "finish", text="failed: it is cut"))
    watch.hear("c_test", Event("archive", "finish", text="skipped"))
    status = read(tmp_path)
    assert status["tiles_done"] == 40
    assert status["slides"] == {"pending": 1, "running": 0, "done": 1, "skipped": 1, "failed": 1}
    # One slide of 100 bytes was worked on, 400 bytes are left.
    left_s, seconds = status["left_seconds"], status["seconds"]
    assert isinstance(left_s, float)
    assert isinstance(seconds, float)
    assert left_s == pytest.approx(4 * seconds, abs=0.5)


def test_metrics_are_prometheus_text(tmp_path: Path, watch: Watch) -> None:
    watch.hear("a_test", Event("archive", "start"))
    watch.hear("a_test", Event("archive", "finish", text="done"))
    watch.write("finished")
    text = (tmp_path / "archive.prom").read_text()
    assert text.endswith("\n")
    for line in text.splitlines():
        assert line.startswith(("# HELP wsi_stain_archive_", "# TYPE wsi_stain_")) or SAMPLE.match(
            line
        ), line
    assert 'wsi_stain_archive_slides{state="done"} 1' in text
    assert "wsi_stain_archive_running 0" in text
    assert "svs" not in text


def test_what_is_said_of_workers_is_there_at_once(
    tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WRITE_EVERY_S", 60.0)
    line = "waiting for workers: 0 of 2, job 17 PENDING (Resources)"
    watch.hear("", Event("workers", "note", text=line))
    link = "http://127.0.0.1:8787/status"
    watch.hear("", Event("workers", "note", text=f"Dask: {link}", facts={"dashboard": link}))
    status = read(tmp_path)
    assert (status["workers"], status["dashboard"]) == (line, link)
    assert status["slides"] == {"pending": 4, "running": 0, "done": 0, "skipped": 0, "failed": 0}
