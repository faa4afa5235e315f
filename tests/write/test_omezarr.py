"""The OME-Zarr as strangers see it, its check, and what happens when writing fails."""

from __future__ import annotations

import json
import os
import resource
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
import pytest
import zarr
from ome_zarr.io import parse_url
from ome_zarr.reader import Reader
from ome_zarr_models.v05 import Image

from wsi_stain.config import WriteConfig
from wsi_stain.errors import OutputError, SlideError
from wsi_stain.geometry import Region, Scale, Size, pyramid_sizes
from wsi_stain.slides.image import SlideSource
from wsi_stain.write.levels import halve
from wsi_stain.write.omezarr import write_omezarr
from wsi_stain.write.tiff import PyramidFacts
from wsi_stain.write.validate import Expected, validate

Pixels = npt.NDArray[np.uint8]

SPEC = WriteConfig(format="ome-zarr", tile_px=128)


def write(path: Path, pixels: Pixels, spec: WriteConfig = SPEC, mpp: float = 0.5) -> PyramidFacts:
    bands = (pixels[y_px : y_px + 200] for y_px in range(0, len(pixels), 200))
    size = Size(pixels.shape[1], pixels.shape[0])
    return write_omezarr(path, size, bands, mpp, spec, name="slide_test")


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_all_levels_are_exact_when_the_ome_zarr_package_reads_them(
    tmp_path: Path, he_pixels: Pixels
) -> None:
    path = tmp_path / "a.ome.zarr"
    facts = write(path, he_pixels, mpp=0.499)
    location = parse_url(path, mode="r")
    assert location is not None
    (node,) = list(Reader(location)())
    assert node.metadata["channel_names"] == ["Red", "Green", "Blue"]
    assert [axis["name"] for axis in node.metadata["axes"]] == ["c", "y", "x"]
    truth = he_pixels
    assert len(node.data) == len(facts.levels)
    for number, level in enumerate(node.data):
        assert isinstance(level, da.Array)  # lazy: nothing was read so far
        assert level.chunksize[0] == 1
        assert np.array_equal(np.moveaxis(level.compute(scheduler="sync"), 0, -1), truth)
        scale = node.metadata["coordinateTransformations"][number][0]["scale"]
        assert scale == pytest.approx([1.0, 0.499 * 2**number, 0.499 * 2**number], rel=1e-12)
        truth = halve(truth)


def test_metadata_follow_the_schema_and_say_research_use(tmp_path: Path, he_pixels: Pixels) -> None:
    path = tmp_path / "a.ome.zarr"
    write(path, he_pixels)
    attributes = json.loads((path / "zarr.json").read_text())["attributes"]
    Image.from_zarr(zarr.open_group(path, mode="r"))
    assert attributes["ome"]["version"] == "0.5"
    assert "research use only" in attributes["wsi_stain"]["statement"]
    assert "research use only" in attributes["ome"]["multiscales"][0]["metadata"]["description"]
    array = json.loads((path / "0" / "zarr.json").read_text())
    assert [codec["name"] for codec in array["codecs"]] == ["sharding_indexed"]
    assert array["dimension_names"] == ["c", "y", "x"]


def test_levels_lie_over_each_other_when_placed_by_their_transforms(
    tmp_path: Path, he_pixels: Pixels
) -> None:
    path = tmp_path / "a.ome.zarr"
    write(path, he_pixels, mpp=0.5)
    ome = json.loads((path / "zarr.json").read_text())["attributes"]["ome"]
    for number, dataset in enumerate(ome["multiscales"][0]["datasets"]):
        scale, *shift = dataset["coordinateTransformations"]
        # The left edge of the first pixel: half a pixel before its center.
        start_um = (shift[0]["translation"][2] if shift else 0.0) - scale["scale"][2] / 2
        assert start_um == pytest.approx(-0.25), number


def test_file_count_stays_small_and_every_shard_is_there(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.zarr"
    black = np.zeros((1000, 5000, 3), np.uint8)
    facts = write(path, black)
    shards = [name for name in files_of(path) if name.startswith("0/c/") and name.count("/") == 4]
    assert len(shards) == 8 * 3  # rows of chunks x shards of 16 chunks
    assert facts.levels == tuple(pyramid_sizes(Size(5000, 1000)))
    assert validate(path).ok


def test_sound_folder_validates_against_what_is_expected(tmp_path: Path, he_pixels: Pixels) -> None:
    path = tmp_path / "a.ome.zarr"
    write(path, he_pixels)
    tissue, glass = Region(350, 400, 128, 128), Region(0, 0, 128, 128)
    white = (243.0, 243.0, 244.0)
    found = validate(
        path, expected=Expected(Size(1403, 1101), 0.5, (tissue,), (glass,), white=white)
    )
    assert found.problems == ()
    assert found.facts["levels"][0] == [1403, 1101]
    assert found.facts["mpp"] == 0.5
    swapped = Expected(Size(1403, 1101), 0.25, (glass,), (tissue,), white=white)
    text = "; ".join(validate(path, expected=swapped).problems)
    assert "instead of 0.25" in text
    swapped = Expected(tissue=(glass,), glass=(tissue,), white=white)
    text = "; ".join(validate(path, expected=swapped).problems)
    assert "is blank" in text
    assert "is stained" in text


def _lose_shard(path: Path) -> None:
    (path / "0" / "c" / "0" / "3" / "0").unlink()


def _cut_shard(path: Path) -> None:
    file = path / "0" / "c" / "0" / "3" / "0"
    file.write_bytes(file.read_bytes()[:-100])


def _lose_chunk(path: Path) -> None:
    file = path / "1" / "c" / "0" / "0" / "0"
    data = bytearray(file.read_bytes())
    n_chunks = 3 * 6
    at = len(data) - 4 - 16 * n_chunks
    data[at : at + 16] = b"\xff" * 16
    file.write_bytes(bytes(data))


def _lose_level(path: Path) -> None:
    (path / "2" / "zarr.json").unlink()


def _damage_chunks(path: Path) -> None:
    file = path / "0" / "c" / "0" / "0" / "0"
    data = bytearray(file.read_bytes())
    data[:2000] = b"\0" * 2000
    file.write_bytes(bytes(data))


def _edit(path: Path, old: str, new: str) -> None:
    file = path / "zarr.json"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def _other_version(path: Path) -> None:
    _edit(path, '"0.5"', '"0.4"')


def _other_unit(path: Path) -> None:
    _edit(path, '"micrometer"', '"millimeter"')


def _other_scale(path: Path) -> None:
    _edit(path, "2.0,", "2.5,")


def _other_picture(path: Path) -> None:
    (path / "1").rename(path / "old")
    write(path.parent / "b.ome.zarr", np.full((1101, 1403, 3), 90, np.uint8))
    (path.parent / "b.ome.zarr" / "1").rename(path / "1")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (_lose_shard, "level 0: shard 0/3/0 is missing; 1 of 9 so"),
        (_cut_shard, "level 0: shard 0/3/0 "),
        (_lose_chunk, "level 1: shard 0/0/0 lacks a chunk"),
        (_lose_level, "cannot be read as OME-Zarr"),
        (_damage_chunks, "cannot be decoded"),
        (_other_version, "version '0.4'"),
        (_other_unit, "not c, y, x"),
        (_other_scale, "not every level states a pixel size"),
        (_other_picture, "level 1 does not show level 0"),
    ],
)
def test_harm_is_named_when_validated(
    tmp_path: Path, he_pixels: Pixels, harm: Callable[[Path], None], words: str
) -> None:
    path = tmp_path / "a.ome.zarr"
    write(path, he_pixels)
    assert validate(path).ok
    harm(path)
    found = validate(path)
    assert not found.ok
    assert words in "; ".join(found.problems)


def test_foreign_folder_is_a_problem_not_an_exception(tmp_path: Path) -> None:
    found = validate(tmp_path)
    assert not found.ok
    assert "OME-Zarr" in found.problems[0]


def _short(pixels: Pixels) -> Iterator[Pixels]:
    yield pixels[:-1]


def _long(pixels: Pixels) -> Iterator[Pixels]:
    yield pixels
    yield pixels[:1]


def _failing(pixels: Pixels) -> Iterator[Pixels]:
    yield pixels[:700]
    raise SlideError("tile 7 cannot be read.")


def _interrupted(pixels: Pixels) -> Iterator[Pixels]:
    yield pixels[:700]
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (_short, OutputError, "end after 1100 rows of 1101"),
        (_long, OutputError, "reach row 1102"),
        (_failing, SlideError, "tile 7"),
        (_interrupted, KeyboardInterrupt, "^$"),
    ],
)
def test_old_folder_stays_and_nothing_is_left_when_bands_fail(
    tmp_path: Path,
    he_pixels: Pixels,
    make: Callable[[Pixels], Iterator[Pixels]],
    error: type[BaseException],
    words: str,
) -> None:
    path = tmp_path / "a.ome.zarr"
    write(path, he_pixels[:200, :200])
    before = files_of(path)
    spec = WriteConfig(format="ome-zarr", overwrite=True)
    with pytest.raises(error, match=words):
        write_omezarr(path, Size(1403, 1101), make(he_pixels), 0.5, spec, name="a")
    assert [item.name for item in tmp_path.iterdir()] == [path.name]
    assert files_of(path) == before


def test_output_is_kept_or_replaced_as_asked(tmp_path: Path, he_pixels: Pixels) -> None:
    path = tmp_path / "a.ome.zarr"
    write(path, he_pixels[:300])
    (tmp_path / "a.ome.zarr.part").mkdir()  # what a killed run left
    with pytest.raises(OutputError, match="exists already"):
        write(path, he_pixels)
    spec = WriteConfig(format="ome-zarr", overwrite=True)
    write(path, he_pixels, spec)
    assert validate(path, expected=Expected(Size(1403, 1101))).ok
    assert [item.name for item in tmp_path.iterdir()] == [path.name]
    foreign = tmp_path / "b.ome.zarr"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match="something else"):
        write(foreign, he_pixels, spec)
    assert (foreign / "thesis.txt").read_text() == "precious"


def test_output_is_named_when_the_system_refuses_more_bytes(tmp_path: Path) -> None:
    """A real limit on the size of files stands in for a full disk: the same kind of error."""
    pixels = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), np.uint8)
    path = tmp_path / "a.ome.zarr"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OutputError, match=r"a\.ome\.zarr\.part cannot be written: File") as e:
            write(path, pixels)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "Free space" in e.value.hint
    assert list(tmp_path.iterdir()) == []


def test_memory_is_flat_in_the_height(tmp_path: Path) -> None:
    band = np.random.default_rng(0).integers(0, 256, (256, 1024, 3), np.uint8)
    peaks = []
    for count in (4, 16):
        size = Size(1024, 256 * count)
        tracemalloc.start()
        write_omezarr(
            tmp_path / f"{count}.ome.zarr", size, (band for _ in range(count)), 0.5, SPEC, name="a"
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0] + 500_000
    assert peaks[1] < 12 * 1024 * 128 * 3 + 2_000_000


LIES: dict[str, tuple[str, Any]] = {
    "no pixels": ("shape", [3, 0, 0]),
    "a billion pixels": ("shape", [3, 10**9, 10**9]),
    "chunks of no size": (
        "chunk_grid",
        {"name": "regular", "configuration": {"chunk_shape": [0] * 3}},
    ),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.timeout(60)
def test_lie_of_a_level_is_found_by_check_and_slide_source(
    tmp_path: Path, he_pixels: Pixels, lie: str
) -> None:
    path = tmp_path / "a.ome.zarr"
    write(path, he_pixels[:300, :300])
    field, value = LIES[lie]
    record = json.loads((path / "0/zarr.json").read_text()) | {field: value}
    (path / "0/zarr.json").write_text(json.dumps(record))
    assert validate(path).problems
    with pytest.raises(SlideError, match=r"a\.ome\.zarr"):
        SlideSource.open(path)


def test_scale_beyond_all_numbers_is_found(tmp_path: Path, he_pixels: Pixels) -> None:
    path = tmp_path / "a.ome.zarr"
    write(path, he_pixels[:300, :300])
    record = json.loads((path / "zarr.json").read_text())
    (multiscale,) = record["attributes"]["ome"]["multiscales"]
    multiscale["datasets"][0]["coordinateTransformations"][0]["scale"] = [1, 10**400, 10**400]
    (path / "zarr.json").write_text(json.dumps(record))
    assert "int too large" in validate(path).problems[0]
    with pytest.raises(SlideError, match="int too large"):
        SlideSource.open(path)


@pytest.mark.timeout(60)
def test_pipe_in_the_folder_is_refused_unopened(tmp_path: Path, he_pixels: Pixels) -> None:
    path = tmp_path / "a.ome.zarr"
    write(path, he_pixels[:300, :300])
    shard = next(file for file in (path / "0/c").rglob("*") if file.is_file())
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(SlideError, match="is a pipe"):
        SlideSource.open(path)


def test_lost_shard_is_background_and_told_when_given_as_a_slide(
    tmp_path: Path, he_pixels: Pixels
) -> None:
    path = tmp_path / "a.ome.zarr"
    write(path, he_pixels)
    (path / "0/c/0/2/0").unlink()  # zarr would read black
    with SlideSource.open(path) as source:
        assert source.notes[0].startswith("1 tiles of the largest level are missing")
        read = source.read_out(Region(0, 0, *source.size_l0), Scale(1.0, 0.5, source.size_l0))
    assert (read[256:384] == 255).all()
    assert np.array_equal(read[:256], he_pixels[:256])
    assert np.array_equal(read[384:], he_pixels[384:])


def test_slide_source_reads_it_back_when_it_is_given_as_a_slide(
    tmp_path: Path, he_pixels: Pixels
) -> None:
    path = tmp_path / "a.ome.zarr"
    write(path, he_pixels, mpp=0.499)
    with SlideSource.open(path) as source:
        assert (source.format, source.mpp_l0) == ("OME-Zarr", 0.499)
        assert [level.size for level in source.levels] == pyramid_sizes(Size(1403, 1101))
        region, scale = Region(300, 350, 200, 100), Scale(1.0, 0.499, source.size_l0)
        assert np.array_equal(source.read_out(region, scale), he_pixels[350:450, 300:500])
    _edit(path, '"c"', '"z"')
    with pytest.raises(SlideError, match="axes z, y, x"):
        SlideSource.open(path)
    (path / "zarr.json").write_text("{}")
    with pytest.raises(SlideError, match="no readable OME-Zarr"):
        SlideSource.open(path)
