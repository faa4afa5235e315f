"""A tile of the slide that cannot be read: named, or left as background, listed and shown."""

from __future__ import annotations

import csv
import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile

from wsi_stain.config import BundleSpec, RunConfig, resolve_run_config
from wsi_stain.errors import SlideError
from wsi_stain.geometry import Region, Size
from wsi_stain.layout import RunFiles
from wsi_stain.manifest import Event
from wsi_stain.pipeline import translate_slide
from wsi_stain.slides import openslide_read, tiff_read
from wsi_stain.slides.image import SlideSource
from wsi_stain.slides.missing import TileError
from wsi_stain.slides.streams import stream_fault
from wsi_stain.translate.bundle import save_nets

Pixels = npt.NDArray[np.uint8]
Write = Callable[..., Path]
INDEX = 4  # of the broken tile: row 1, column 1 of 3 x 3
HOLE = Region(256, 256, 256, 256)


@pytest.fixture(scope="session")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle without nets: the slide itself comes out."""
    folder = tmp_path_factory.mktemp("bundles") / "identity"
    save_nets(folder, BundleSpec(name="identity", marker="Test", start_image="source"), {})
    return folder


def settings(bundle: Path, **flags: Any) -> RunConfig:
    base = {"bundle": str(bundle), "cluster.executor": "serial", "tiles.shard_tiles": 4}
    return resolve_run_config(base | {k.replace("__", "."): v for k, v in flags.items()})[0]


def spoil(path: Path, how: str, index: int = INDEX) -> None:
    """Damage one tile's stream on level 0."""
    with tifffile.TiffFile(path, mode="r+") as tiff:
        page = tiff.pages.first
        at, length = page.dataoffsets[index], page.databytecounts[index]
        if how == "short":
            counts = [n // 2 if i == index else n for i, n in enumerate(page.databytecounts)]
            page.tags["TileByteCounts"].overwrite(tuple(counts))
            return
    data = bytearray(path.read_bytes())
    if how == "cut":  # what a download that lost its end leaves
        data[at + length // 2 : at + length] = bytes(length - length // 2)
    elif how == "noise":
        data[at + length // 2 : at + length - 2] = np.random.default_rng(0).bytes(
            length - 2 - length // 2
        )
    else:
        data[at : at + length] = bytes(length)
    path.write_bytes(data)


@pytest.fixture
def broken(tmp_path: Path, write_slide: Write, he_pixels: Pixels) -> Callable[..., Path]:
    """Give the function that writes a slide of 3 x 3 tiles with a broken one in the middle."""

    def make(name: str = "s.tiff", how: str = "cut", codec: str = "jpeg") -> Path:
        kind = {"s.tiff": "generic", "s.svs": "aperio", "s.ome.tiff": "ome"}[name]
        pixels = he_pixels[100:800, 100:820]
        path = write_slide(tmp_path / name, pixels, 0.5, levels=3, kind=kind, codec=codec)
        spoil(path, how)
        return path

    return make


@pytest.fixture(params=["direct", "openslide"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Read tiles straight from the TIFF, or have OpenSlide read them."""
    if request.param == "openslide":
        monkeypatch.setattr(openslide_read, "_is_direct", lambda page: False)
    return str(request.param)


@pytest.mark.parametrize("name", ["s.tiff", "s.svs"])
@pytest.mark.parametrize("how", ["short", "zeros"])
def test_broken_tile_is_named(broken: Callable[..., Path], way: str, name: str, how: str) -> None:
    path = broken(name, how)
    with SlideSource.open(path) as source, pytest.raises(TileError) as caught:
        source._reader.read(0, Region(100, 100, 400, 400))
    error = caught.value
    assert error.exit_code == 3
    assert f"Slide {path} is damaged: level 0, tile in row 1 and column 1" in error.message
    assert "--allow-missing" in error.hint


@pytest.mark.parametrize("name", ["s.tiff", "s.svs"])
def test_broken_tile_is_background_where_allowed(
    broken: Callable[..., Path], way: str, name: str, he_pixels: Pixels
) -> None:
    with SlideSource.open(broken(name, "short"), allow_missing=True) as source:
        found = source._reader.read(0, Region(100, 100, 500, 500))
        again = source._reader.read(0, Region(100, 100, 500, 500))
        missing = source.missing
    assert (found[156:412, 156:412] == 255).all()
    np.testing.assert_array_equal(found, again)
    expected = he_pixels[200:700, 200:700].astype(int)
    away = np.ones((500, 500), bool)
    away[156:412, 156:412] = False
    assert np.abs(found - expected)[away].mean() < 2, "all but the tile is as it was"
    assert [(tile.level, tile.row, tile.column, tile.region_l0) for tile in missing] == [
        (0, 1, 1, HOLE)
    ]
    assert missing[0].reason


@pytest.mark.parametrize("codec", ["jpeg", "lzw", "deflate"])
def test_ome_tiff_with_a_broken_tile_is_read_around_it(
    broken: Callable[..., Path], codec: str
) -> None:
    path = broken("s.ome.tiff", "zeros", codec)
    with SlideSource.open(path, allow_missing=True) as source:
        found = source._reader.read(0, HOLE)
    assert (found == 255).all()
    assert len(source.missing) == 1


def test_streams_that_decoders_would_take_are_faulty(
    broken: Callable[..., Path], tmp_path: Path
) -> None:
    with tifffile.TiffFile(broken(how="noise")) as tiff:
        page = tiff.pages.first
        for index, (at, length) in enumerate(
            zip(page.dataoffsets, page.databytecounts, strict=True)
        ):
            tiff.filehandle.seek(at)
            data = tiff.filehandle.read(length)
            assert bool(stream_fault(data, 7)) is (index == INDEX)
            assert "cut off" in stream_fault(data[: length // 2], 7)
            assert stream_fault(data, 8) == ""


def test_run_names_the_tile_or_lists_and_shows_it(
    broken: Callable[..., Path], tmp_path: Path, identity: Path, he_pixels: Pixels
) -> None:
    slide, out = broken("s.svs"), tmp_path / "out"
    with pytest.raises(SlideError, match=r"level 0, tile in row 1.*--allow-missing") as caught:
        translate_slide(slide, out, settings(identity))
    assert caught.value.exit_code == 3
    assert not list(out.glob("*.tiff*"))
    allowed = settings(identity, slide__allow_missing=True)
    result = translate_slide(slide, out, allowed)
    record = json.loads(result.files.manifest.read_text())
    assert record["flags"] == ["tiles missing in the slide: 1"]
    assert any("level 0, row 1, column 1" in note for note in record["notes"])
    with result.files.missing.open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert [row[f"{side}_l0"] for side in ("x_px", "y_px", "width_px")] == ["256", "256", "256"]
    made = tifffile.imread(result.files.output)
    assert made[270:500, 270:500].min() > 225, "background"
    stained = he_pixels[100:350, 100:700].min(axis=-1) < 150
    difference = np.abs(made[:250, :600].astype(int) - he_pixels[100:350, 100:700])
    assert difference[stained].mean() < 6, "beside it the slide"
    shown = json.loads(result.files.geojson.read_text())["features"]
    (shape,) = [
        feature["geometry"]["coordinates"]
        for feature in shown
        if feature["properties"].get("classification", {}).get("name") == "Missing in the slide"
    ]
    assert shape[0][0] == [256.0, 256.0]
    assert shape[0][2] == [512.0, 512.0]


def test_shards_with_holes_are_not_taken_over_once_the_slide_must_be_whole(
    broken: Callable[..., Path], tmp_path: Path, identity: Path
) -> None:
    class Stop(Exception):
        """Ends the run before its store goes."""

    def stop(event: Event) -> None:
        if (event.stage, event.kind) == ("validate", "start"):
            raise Stop

    slide, out = broken("s.tiff"), tmp_path / "out"
    allowed = settings(identity, slide__allow_missing=True, write__overwrite=True)
    with pytest.raises(Stop):
        translate_slide(slide, out, allowed, listener=stop)
    with pytest.raises(SlideError, match="level 0, tile in row 1"):
        translate_slide(slide, out, settings(identity, write__overwrite=True))
    done: dict[str, tuple[int, int]] = {}

    def watch(event: Event) -> None:
        if event.kind == "start" and event.stage in ("fill", "translate"):
            done[event.stage] = (event.done, event.total)

    files = RunFiles.of(out, slide, "Test")
    result = translate_slide(slide, out, allowed, listener=watch)
    assert done["fill"][0] > 0, "whole shards are kept"
    assert json.loads(files.manifest.read_text())["flags"] == ["tiles missing in the slide: 1"]
    assert result.files.missing.is_file()


def test_bad_block_of_the_disk_is_a_missing_tile_and_a_cut_file_is_not(
    broken: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = broken("s.ome.tiff", "zeros")
    with SlideSource.open(path, allow_missing=True) as source:
        handle = source._reader.opened.backend._file.filehandle  # type: ignore[attr-defined]
        monkeypatch.setattr(
            type(handle), "read", _raising(OSError(errno.EIO, "Input/output error"))
        )
        assert (source._reader.read(0, Region(0, 0, 100, 100)) == 255).all()
        assert {tile.reason for tile in source.missing} >= {"input/output error"}
        monkeypatch.setattr(
            type(handle), "read", _raising(OSError(errno.ESTALE, "Stale file handle"))
        )
        with pytest.raises(SlideError, match="cannot be read any more: Stale"):
            source._reader.read(0, Region(600, 600, 50, 50))
        monkeypatch.setattr(type(handle), "read", lambda self, size: b"")
        with pytest.raises(SlideError, match="was cut while it was read"):
            source._reader.read(0, Region(600, 0, 50, 50))


def _raising(error: OSError) -> Callable[..., bytes]:
    def read(self: Any, size: int) -> bytes:
        raise error

    return read


def test_openslide_says_where_it_does_not_know_tiles(
    broken: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openslide_read, "_is_direct", lambda page: False)
    monkeypatch.setattr(openslide_read, "BLOCK_PX", 64)
    monkeypatch.setattr(openslide_read, "LARGEST_CELL_PX", 1)
    with SlideSource.open(broken("s.svs", "short"), allow_missing=True) as source:
        backend = source._reader.opened.backend
        assert backend._tile_size(0) == Size(64, 64)  # type: ignore[attr-defined]
        source._reader.read(0, Region(200, 200, 100, 100))
        assert {(tile.row, tile.column) for tile in source.missing} == {(4, 4)}
    assert tiff_read.is_tiff(source.path)
