"""What is marked done is safe on disk; what is not is made again."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from wsi_stain.errors import OutputError, PlanError
from wsi_stain.geometry import Scale, Size
from wsi_stain.slides.plan import TileGrid
from wsi_stain.slides.store import PatchStore

Pixels = npt.NDArray[np.uint8]
KEY = "k1"


def _grid(n_tiles: int = 10, shard_tiles: int = 4, tile_px: int = 32) -> TileGrid:
    rc = np.stack([np.zeros(n_tiles), np.arange(n_tiles)], axis=1).astype(np.int32)
    size = Size(n_tiles * tile_px, tile_px)
    tissue = np.ones(n_tiles, np.float32)
    return TileGrid(Scale(1.0, 0.5, size), tile_px, 0, shard_tiles, rc, tissue)


def _tiles(shard: int, grid: TileGrid) -> Pixels:
    rng = np.random.default_rng(shard)
    shape = (len(grid.shard(shard)), grid.tile_px, grid.tile_px, 3)
    return rng.integers(0, 256, shape, np.uint8)


def _full(path: Path, grid: TileGrid) -> PatchStore:
    store = PatchStore.create(path, grid)
    for shard in range(grid.n_shards):
        store.write("he", shard, _tiles(shard, grid), KEY)
    return store


def _shard_file(path: Path, shard: int) -> Path:
    return path / f"he/c.{shard}.0.0.0"


def test_read_gives_what_was_written_when_last_shard_is_short(tmp_path: Path) -> None:
    grid = _grid()
    _full(tmp_path / "s", grid)
    store = PatchStore.open(tmp_path / "s")
    assert [len(store.read("he", shard)) for shard in range(3)] == [4, 4, 2]
    for shard in range(3):
        assert np.array_equal(store.read("he", shard), _tiles(shard, grid))
    for index in range(10):
        expected = _tiles(index // 4, grid)[index % 4]
        assert np.array_equal(store.read_tile("he", index), expected)
    in_order = store.tiles_in_order("he")
    for index in (0, 3, 4, 9, 1):  # in any other order, too
        assert np.array_equal(in_order(index), store.read_tile("he", index))
    with pytest.raises(IndexError, match="shard 3 of 3"):
        in_order(12)
    assert store.pending("he", KEY, verify=True) == []
    assert store.pending("ihc", KEY) == [0, 1, 2]


def test_shard_is_one_file_of_raw_tiles(tmp_path: Path) -> None:
    grid = _grid()
    _full(tmp_path / "s", grid)
    tile_bytes = 32 * 32 * 3
    size_bytes = _shard_file(tmp_path / "s", 0).stat().st_size
    assert 4 * tile_bytes <= size_bytes <= 4 * (tile_bytes + 32)
    assert sorted(entry.name for entry in (tmp_path / "s/he").iterdir()) == [
        *(_shard_file(tmp_path, shard).name for shard in range(3)),
        "zarr.json",
    ]


def test_black_tiles_are_written_when_they_equal_the_fill_value(tmp_path: Path) -> None:
    grid = _grid(4)
    store = PatchStore.create(tmp_path / "s", grid)
    store.write("he", 0, np.zeros((4, 32, 32, 3), np.uint8), KEY)
    assert store.is_done("he", 0, KEY, verify=True)
    assert not store.read("he", 0).any()


def test_one_shard_holds_all_when_slide_is_small(tmp_path: Path) -> None:
    grid = _grid(2, 64)
    store = _full(tmp_path / "s", grid)
    assert np.array_equal(store.read("he", 0), _tiles(0, grid))
    assert store.pending("he", KEY, verify=True) == []


def test_shards_are_pending_when_key_differs(tmp_path: Path) -> None:
    store = _full(tmp_path / "s", _grid())
    assert store.pending("he", "k2") == [0, 1, 2]
    store.write("he", 1, _tiles(1, store.grid), "k2")
    assert store.pending("he", "k2") == [0, 2]
    assert store.pending("he", KEY) == [1]


@pytest.mark.parametrize("fault", ["gone", "short", "empty", "marker gone", "marker garbage"])
def test_shard_is_pending_when_file_or_marker_is_bad(tmp_path: Path, fault: str) -> None:
    store = _full(tmp_path / "s", _grid())
    file, marker = _shard_file(store.path, 1), store.path / "done/he/000001.json"
    if fault == "gone":
        file.unlink()
    elif fault == "short":
        file.write_bytes(file.read_bytes()[:-100])
    elif fault == "empty":
        file.write_bytes(b"")
    elif fault == "marker gone":
        marker.unlink()
    else:
        marker.write_bytes(b"\x00\xff")
    assert store.pending("he", KEY) == [1]
    store.write("he", 1, _tiles(1, store.grid), KEY)
    assert store.pending("he", KEY, verify=True) == []


@pytest.mark.parametrize("place", [100, -10])
def test_verify_finds_shard_when_one_byte_is_flipped(tmp_path: Path, place: int) -> None:
    store = _full(tmp_path / "s", _grid())
    file = _shard_file(store.path, 2)
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    assert store.pending("he", KEY) == []
    assert store.pending("he", KEY, verify=True) == [2]
    store.write("he", 2, _tiles(2, store.grid), KEY)
    assert store.pending("he", KEY, verify=True) == []
    assert np.array_equal(store.read("he", 2), _tiles(2, store.grid))


def test_read_refuses_when_shard_was_never_written(tmp_path: Path) -> None:
    store = PatchStore.create(tmp_path / "s", _grid())
    with pytest.raises(OutputError, match="never written"):
        store.read("he", 0)
    with pytest.raises(OutputError, match="never written"):
        store.read_tile("ihc", 9)


def test_read_refuses_when_shard_is_cut(tmp_path: Path) -> None:
    store = _full(tmp_path / "s", _grid())
    file = _shard_file(store.path, 0)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(OutputError, match="damaged"):
        store.read("he", 0)


@pytest.mark.parametrize("shape", [(3, 32, 32, 3), (4, 32, 31, 3), (4, 32, 32)])
def test_write_refuses_when_shape_is_wrong(tmp_path: Path, shape: tuple[int, ...]) -> None:
    store = PatchStore.create(tmp_path / "s", _grid())
    with pytest.raises(OutputError, match="takes uint8"):
        store.write("he", 0, np.zeros(shape, np.uint8), KEY)
    with pytest.raises(IndexError):
        store.write("he", 3, np.zeros((4, 32, 32, 3), np.uint8), KEY)


def test_create_keeps_work_when_grid_is_the_same(tmp_path: Path) -> None:
    _full(tmp_path / "s", _grid())
    assert PatchStore.create(tmp_path / "s", _grid()).pending("he", KEY, verify=True) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda codecs: codecs.clear(),
        lambda codecs: codecs[0]["configuration"]["codecs"].clear(),
        lambda codecs: codecs[0]["configuration"]["index_codecs"].pop(0),
        lambda codecs: codecs[0]["configuration"]["index_codecs"][0].update(
            configuration={"endian": None}
        ),
    ],
    ids=["none", "inner", "index", "endian"],
)
def test_create_voids_work_whose_codecs_zarr_opens_but_cannot_run(
    tmp_path: Path, spoil: Callable[[Any], None]
) -> None:
    _full(tmp_path / "s", _grid())
    path = tmp_path / "s/he/zarr.json"
    metadata = json.loads(path.read_text())
    spoil(metadata["codecs"])
    path.write_text(json.dumps(metadata))
    store = PatchStore.create(tmp_path / "s", _grid())
    assert store.pending("he", KEY) == [0, 1, 2]
    store.write("he", 0, _tiles(0, _grid()), KEY)
    assert np.array_equal(store.read("he", 0), _tiles(0, _grid()))


def test_create_voids_work_whose_grid_has_a_header_that_is_no_python(tmp_path: Path) -> None:
    _full(tmp_path / "s", _grid())
    path = tmp_path / "s/grid.npy"
    path.write_bytes(path.read_bytes().replace(b"'shape': (10, 3)", b"'shape': (10L 3("))
    assert PatchStore.create(tmp_path / "s", _grid()).pending("he", KEY) == [0, 1, 2]


def test_store_of_an_earlier_layout_is_refused_and_made_anew(tmp_path: Path) -> None:
    _full(tmp_path / "s", _grid())
    metadata = tmp_path / "s/he/zarr.json"
    text = metadata.read_text()
    metadata.write_text(re.sub(r'"separator":\s*"\."', '"separator": "/"', text))
    assert metadata.read_text() != text
    with pytest.raises(OutputError, match="layout of an earlier version"):
        PatchStore.open(tmp_path / "s").read("he", 0)
    again = PatchStore.create(tmp_path / "s", _grid())
    assert again.pending("he", KEY) == [0, 1, 2]
    again.write("he", 0, _tiles(0, _grid()), KEY)
    assert np.array_equal(again.read("he", 0), _tiles(0, _grid()))


def test_create_voids_work_when_grid_differs(tmp_path: Path) -> None:
    _full(tmp_path / "s", _grid())
    store = PatchStore.create(tmp_path / "s", _grid(9))
    assert store.pending("he", KEY) == [0, 1, 2]
    assert not _shard_file(store.path, 0).exists()


def test_create_refuses_when_folder_holds_other_files(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(OutputError, match="other files") as caught:
        PatchStore.create(tmp_path, _grid())
    assert caught.value.exit_code == 8
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_create_removes_left_overs_of_dead_writers(tmp_path: Path) -> None:
    store = _full(tmp_path / "s", _grid())
    left = [
        _shard_file(store.path, 0).with_name("0.1234.partial"),
        store.path / "done/he/000000.json.99.partial",
    ]
    for file in left:
        file.write_bytes(b"half")
    PatchStore.create(store.path, _grid())
    assert not any(file.exists() for file in left)
    assert store.pending("he", KEY, verify=True) == []


def test_open_refuses_when_there_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        PatchStore.open(tmp_path)


def test_marker_is_readable_by_a_person(tmp_path: Path) -> None:
    store = _full(tmp_path / "s", _grid())
    record = json.loads((store.path / "done/he/000000.json").read_text())
    assert set(record) == {"key", "bytes", "sha256"}
    assert record["key"] == KEY


def _write_some(store: PatchStore, shards: list[int]) -> None:
    for shard in shards:
        store.write("he", shard, _tiles(shard, store.grid), KEY)


def test_two_processes_lose_nothing_when_shards_are_disjoint(tmp_path: Path) -> None:
    grid = _grid(64)
    store = PatchStore.create(tmp_path / "s", grid)
    assert pickle.loads(pickle.dumps(store)).path == store.path  # noqa: S301 - our own bytes
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=_write_some, args=(store, list(range(start, 16, 2))))
        for start in (0, 1)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert store.pending("he", KEY, verify=True) == []
    for shard in range(16):
        assert np.array_equal(store.read("he", shard), _tiles(shard, grid))


_WRITER = """
import sys
from pathlib import Path
import numpy as np
from wsi_stain.slides.store import PatchStore
store = PatchStore.open(Path(sys.argv[1]))
print("ready", flush=True)
for turn in range(10_000):
    for shard in range(store.grid.n_shards):
        n = len(store.grid.shard(shard))
        tiles = np.full((n, 128, 128, 3), (turn * 7 + shard) % 256, np.uint8)
        store.write("he", shard, tiles, str(turn))
"""


@pytest.mark.slow
def test_no_done_shard_is_torn_when_writer_is_killed(tmp_path: Path) -> None:
    grid = _grid(24, 4, 128)
    delays_s = np.random.default_rng(5).uniform(0.02, 0.4, 8)
    for delay_s in delays_s:
        store = PatchStore.create(tmp_path / "s", grid)
        command = [sys.executable, "-c", _WRITER, str(store.path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
            time.sleep(delay_s)
            writer.send_signal(signal.SIGKILL)
        for shard in range(grid.n_shards):
            marker = store.path / f"done/he/{shard:06d}.json"
            if marker.exists():
                key = json.loads(marker.read_text())["key"]
                assert store.is_done("he", shard, key, verify=True)
    assert any((store.path / "done/he").glob("*.json"))
