"""A client that is killed or interrupted: the same command goes on, and does nothing twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from wsi_stain.archive_record import ArchiveRecord, read_archive
from wsi_stain.config import RunConfig
from wsi_stain.files import sha256_file
from wsi_stain.manifest import Event, RunManifest

RunOver = Callable[..., ArchiveRecord]
Settle = Callable[..., RunConfig]
CHECKOUT = Path(__file__).resolve().parents[2]
DEADLINE_S = 400.0


def start(source: str, out: Path, bundle: Path) -> subprocess.Popen[str]:
    """Type the command in a real shell's stead."""
    recipe = out.with_suffix(".toml")
    recipe.write_text('[tiles]\nshard_tiles = 1\n[cluster]\nexecutor = "serial"\n')
    command = ["batch", source, "--out", out, "--recipe", recipe, "--bundle", bundle]
    return subprocess.Popen(
        [sys.executable, "-m", "wsi_stain", *map(str, command)],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(moment: Callable[[], bool], client: subprocess.Popen[str]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not moment():
        assert client.poll() is None, client.communicate()
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def finished(out: Path) -> set[str]:
    paths = out.glob("*.run/manifest.json")
    records = {path.parent.stem: RunManifest.load(path).content.state for path in paths}
    return {name for name, state in records.items() if state == "finished"}


def translated(out: Path) -> int:
    """Count the shards that are done in slides that are not."""
    ended = finished(out)
    markers = out.glob("*.run/store/done/ihc/*.json")
    return sum(path.relative_to(out).parts[0][: -len(".run")] not in ended for path in markers)


def in_the_second_slide(out: Path) -> bool:
    return bool(finished(out)) and translated(out) > 0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_client_goes_on_and_does_nothing_twice(
    tmp_path: Path,
    archive_folder: Path,
    identity_bundle: Path,
    run_over: RunOver,
    settle: Settle,
    how: signal.Signals,
) -> None:
    source, out = f"{archive_folder}/s[13].tiff", tmp_path / "out"
    client = start(source, out, identity_bundle)
    try:
        wait_for(lambda: in_the_second_slide(out), client)
        os.kill(client.pid, how)
    except BaseException:
        client.kill()
        raise
    finally:
        _, err = client.communicate(timeout=DEADLINE_S)
    assert client.returncode == (-9 if how == signal.SIGKILL else 130)
    if how == signal.SIGTERM:
        assert err.splitlines()[-1] == (
            "wsi-stain: interrupted; the same command goes on from here."
        )
        assert json.loads((out / "status.json").read_text())["state"] == "stopped"
        assert not [*out.rglob("*lock")]
        assert {slide.error for slide in read_archive(out / "archive.json").slides} == {""}
    before = finished(out)
    kept = translated(out)
    assert read_archive(out / "archive.json").state == "running"

    begun: dict[str, int] = {}

    def count(name: str, event: Event) -> None:
        if (event.stage, event.kind) == ("translate", "start"):
            begun[name] = event.done

    base = settle(tiles__shard_tiles=1)
    record = run_over(source, out, base=base, listener=count)
    assert {slide.name for slide in record.of_state("skipped")} == before
    assert set(begun) == {"s1_test", "s3_test"} - before
    assert sum(begun.values()) == kept, "finished tiles are not translated again"

    straight = tmp_path / "straight"
    run_over(source, straight, base=base)
    for path in straight.glob("*.ome.tiff"):
        assert sha256_file(out / path.name) == sha256_file(path)
