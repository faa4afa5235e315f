"""Bad input ends with one line, its own exit code, and nothing made; doubtful input is told."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
import torch

from wsi_stain.archive.source import find_entries
from wsi_stain.cli import main
from wsi_stain.config import BundleSpec, NetSpec, WriteConfig
from wsi_stain.errors import ConfigError, OutputError, SlideError
from wsi_stain.geometry import Size
from wsi_stain.layout import RunFiles, find_run
from wsi_stain.slides.image import SlideSource
from wsi_stain.translate.bundle import save_nets
from wsi_stain.translate.networks import ScoreNet
from wsi_stain.write.omezarr import write_omezarr
from wsi_stain.write.validate import validate

Pixels = npt.NDArray[np.uint8]
Write = Callable[..., Path]
SERIAL = '[cluster]\nexecutor = "serial"\nattempts = 1\n'


@dataclass(frozen=True)
class Yard:
    """Where a case's input lies, and what it is made with."""

    folder: Path
    write: Write
    he: Pixels
    bundle: Path
    net_bundle: Path

    @property
    def out(self) -> Path:
        """The output folder."""
        return self.folder / "out"

    def slide(self, name: str = "s.tiff", mpp: float | None = 0.5, **how: Any) -> Path:
        """Write a sound small slide."""
        pixels = how.pop("pixels", self.he)
        return self.write(self.folder / name, pixels, mpp, **how)

    def file(self, name: str, data: bytes) -> Path:
        """Write any file."""
        path = self.folder / name
        path.write_bytes(data)
        return path


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bundle without nets, and one with a small one."""
    folder = tmp_path_factory.mktemp("bundles")
    save_nets(
        folder / "identity", BundleSpec(name="identity", marker="Test", start_image="source"), {}
    )
    net = NetSpec(channels=(16, 16), blocks=1)
    torch.manual_seed(0)
    spec = BundleSpec(name="tiny", marker="Test", tile_px=128, net=net, start_image="stain")
    save_nets(folder / "tiny", spec, {"score": ScoreNet(net).state_dict()})
    return folder / "identity", folder / "tiny"


@pytest.fixture
def yard(tmp_path: Path, write_slide: Write, he_pixels: Pixels, bundles: tuple[Path, Path]) -> Yard:
    """Give a fresh yard."""
    return Yard(tmp_path, write_slide, he_pixels[200:620, 150:700], *bundles)


@pytest.fixture
def translate(
    yard: Yard, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Give the function that translates a slide: exit code, stdout, stderr."""

    def call(slide: Path, *flags: object, json_flag: bool = True) -> tuple[int, str, str]:
        given = [str(flag) for flag in flags]
        words = ["wsi-stain", "translate", str(slide), *given, *["--json"] * json_flag]
        for flag, value in (("--out", yard.out), ("--bundle", yard.bundle)):
            if flag not in given:
                words += [flag, str(value)]
        if "--recipe" not in given:
            words += ["--recipe", str(yard.file("serial.toml", SERIAL.encode()))]
        monkeypatch.setattr(sys, "argv", words)
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return call


# ---- slides that cannot be used --------------------------------------------------------------


def _broken_tile(yard: Yard) -> Path:
    path = yard.slide(codec="jpeg", levels=3)
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[-1]
        at, length = page.dataoffsets[0], page.databytecounts[0]
    data = bytearray(path.read_bytes())
    data[at : at + length] = bytes(length)
    path.write_bytes(data)
    return path


def _patched(yard: Yard, sides: dict[int, int], **how: Any) -> Path:
    """Write a slide, then let its first directory lie about numbers."""
    path = yard.slide(codec="jpeg", levels=2, **how)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        for code, value in sides.items():
            tiff.pages.first.tags[code].overwrite(value)
    return path


def _cut(yard: Yard, kept: float) -> Path:
    data = yard.slide("whole.svs", kind="aperio", codec="jpeg", levels=2).read_bytes()
    return yard.file("cut.svs", data[: int(kept * len(data))])


def _fifo(yard: Yard) -> Path:
    os.mkfifo(yard.folder / "pipe.svs")
    return yard.folder / "pipe.svs"


def _dark(yard: Yard) -> Path:
    noise = np.random.default_rng(0).integers(0, 25, (400, 500, 3))
    noise[100:200, 100:200, 2] = 220
    return yard.slide(pixels=noise.astype(np.uint8))


def _glass(yard: Yard) -> Path:
    noise = np.random.default_rng(0).normal(243, 1.5, (400, 500, 3))
    return yard.slide(pixels=noise.clip(0, 255).astype(np.uint8))


def _pen(yard: Yard) -> Path:
    glass = np.full((900, 1000, 3), 243, np.uint8)
    glass[100:220, 80:900] = (40, 60, 170)
    glass[400:800, 300:420] = (30, 150, 90)
    return yard.slide(pixels=glass)


def _huge_and_empty(yard: Yard) -> Path:
    """Write a sparse file whose directory is sound, for a slide of half a meter."""
    side_px, tile_px = 2**20, 2**13
    n_tiles = (side_px // tile_px) ** 2
    path = yard.slide(pixels=np.full((300, 300, 3), 200, np.uint8), codec="none")
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(
            iter([b""] * n_tiles),
            shape=(side_px, side_px, 3),
            dtype=np.uint8,
            tile=(tile_px, tile_px),
            photometric="rgb",
            compression="jpeg",
            resolution=(20_000, 20_000),
            resolutionunit="CENTIMETER",
            metadata=None,
        )
    return path


def _negative(yard: Yard, name: str, kind: str) -> Path:
    """Write a slide whose width is -1: a signed number, which TIFF does not ask for."""
    path = yard.slide(name, kind=kind)
    with tifffile.TiffFile(path) as tiff:
        at = tiff.pages.first.tags[256].offset
    data = bytearray(path.read_bytes())
    struct.pack_into("<H", data, at + 2, 9)  # SLONG
    struct.pack_into("<i", data, at + 8, -1)
    path.write_bytes(data)
    return path


SIDES = {256: 10**9, 257: 10**9}
BAD_SLIDES: dict[str, tuple[Callable[[Yard], Path], int, str]] = {
    "missing": (lambda yard: yard.folder / "none.svs", 3, "No such file"),
    "empty": (lambda yard: yard.file("empty.svs", b""), 3, "empty (0 bytes)"),
    "text": (lambda yard: yard.file("t.svs", b"not a slide\n" * 400), 3, "no format"),
    "cut in the middle": (lambda yard: _cut(yard, 0.5), 3, "truncated"),
    "cut at the end": (lambda yard: _cut(yard, 0.99), 3, "refused by OpenSlide"),
    "cut in the header": (lambda yard: _cut(yard, 0.0001), 3, "damaged"),
    "folder": (lambda yard: yard.folder, 3, "is a folder"),
    "pipe": (_fifo, 3, "is a pipe"),
    "mrxs alone": (
        lambda yard: yard.file("a.mrxs", b"\xff\xd8\xff\xe0" * 99),
        3,
        "lacks the folder a/",
    ),
    "huge": (lambda yard: _patched(yard, SIDES), 3, "needs"),
    "huge svs": (lambda yard: _patched(yard, SIDES, name="s.svs", kind="aperio"), 3, "needs"),
    "huge ome": (lambda yard: _patched(yard, SIDES, name="s.ome.tiff", kind="ome"), 3, "needs"),
    "huge and empty": (_huge_and_empty, 3, "mm large"),
    "no size": (lambda yard: _patched(yard, {256: 0, 257: 0}), 3, "no size"),
    "no size ome": (
        lambda yard: _patched(yard, {256: 0}, name="s.ome.tiff", kind="ome"),
        3,
        "no size",
    ),
    "negative size": (lambda yard: _negative(yard, "s.tiff", "generic"), 3, "damaged"),
    "negative size svs": (lambda yard: _negative(yard, "s.svs", "aperio"), 3, "damaged"),
    "broken tile": (_broken_tile, 3, "--allow-missing"),
    "no pixel size": (lambda yard: yard.slide(mpp=None), 3, "--mpp 0.25"),
    "pixel 100 times too large": (lambda yard: yard.slide(mpp=50.0), 3, "rejected 50 um/px"),
    "pixel 100 times too small": (lambda yard: yard.slide(mpp=0.005), 3, "rejected 0.005"),
    "fluorescence": (_dark, 3, "not brightfield"),
    "all glass": (_glass, 4, "No tissue"),
    "pen on glass": (_pen, 4, "No tissue"),
    "name of 300 letters": (lambda yard: yard.folder / ("x" * 300), 3, "too long"),
}


@pytest.mark.parametrize("case", BAD_SLIDES)
def test_bad_slide_is_one_line_and_nothing_is_made(
    case: str, yard: Yard, translate: Callable[..., tuple[int, str, str]]
) -> None:
    build, expected, words = BAD_SLIDES[case]
    slide = build(yard)
    (yard.folder / "serial.toml").write_text(SERIAL)
    before = digests(yard.folder)
    code, out, err = translate(slide)
    assert (code, out) == (expected, ""), err
    assert words in err
    assert err.startswith("wsi-stain: ")
    assert err.count("\n") == 1
    assert digests(yard.folder) == before


def test_slide_that_may_not_be_read_is_refused(
    yard: Yard, translate: Callable[..., tuple[int, str, str]]
) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is closed to others than root
        os.chmod(folder, 0o711)  # noqa: S103 - who may not read the slide must get as far as it
        slide = shutil.copy(yard.slide(), folder)
        os.chmod(slide, 0)
        root = os.geteuid() == 0
        if root:
            SlideSource.open(slide).close()  # imports what nobody may have no right to
            with pytest.raises(SlideError, match="Permission denied"), _as_nobody():
                SlideSource.open(slide)
        else:
            code, _, err = translate(Path(slide))
            assert code == 3
            assert "permission" in err


def test_folder_that_may_not_be_entered_is_told() -> None:
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o711)  # noqa: S103 - as above
        closed = Path(place) / "closed.run"
        root = os.geteuid() == 0
        closed.mkdir(mode=0o700 if root else 0)
        with _as_nobody() if root else nullcontext():
            with pytest.raises(SlideError, match="Permission denied"):
                SlideSource.open(closed)
            with pytest.raises(OutputError, match="Permission denied"):
                find_run(closed)
            with pytest.raises(ConfigError, match="Permission denied"):
                find_entries(str(closed), Path(place) / "out")
            assert "Permission denied" in validate(closed / "a.ome.tiff").problems[0]


@contextmanager
def _as_nobody() -> Iterator[None]:
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


# ---- settings and bundles that cannot be used ------------------------------------------------


def _recipe(yard: Yard, text: str) -> list[object]:
    return ["--recipe", yard.file("r.toml", text.encode("utf-8", "surrogateescape"))]


def _spec(yard: Yard, **changes: Any) -> list[object]:
    folder = yard.folder / "changed"
    shutil.copytree(yard.bundle, folder)
    record = json.loads((folder / "bundle.json").read_text()) | changes
    (folder / "bundle.json").write_text(json.dumps(record))
    return ["--bundle", folder]


def _damaged_weights(yard: Yard) -> list[object]:
    folder = yard.folder / "damaged"
    shutil.copytree(yard.net_bundle, folder)
    weights = folder / "score.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    return ["--bundle", folder]


def _net(yard: Yard, **changes: Any) -> list[object]:
    folder = yard.folder / "lying"
    shutil.copytree(yard.net_bundle, folder)
    record = json.loads((folder / "bundle.json").read_text())
    record["net"] |= changes
    (folder / "bundle.json").write_text(json.dumps(record))
    return ["--bundle", folder]


def _lost_weights(yard: Yard) -> list[object]:
    folder = yard.folder / "lost"
    shutil.copytree(yard.net_bundle, folder)
    (folder / "score.safetensors").unlink()
    return ["--bundle", folder]


BAD_SETTINGS: dict[str, tuple[Callable[[Yard], list[object]], int, str]] = {
    "recipe missing": (lambda yard: ["--recipe", yard.folder / "none.toml"], 2, "cannot be read"),
    "recipe is a folder": (lambda yard: ["--recipe", yard.folder], 2, "cannot be read"),
    "recipe is a pipe": (lambda yard: ["--recipe", _fifo(yard)], 2, "is a pipe"),
    "recipe broken": (lambda yard: _recipe(yard, "[tiles\n"), 2, "not valid TOML"),
    "recipe not UTF-8": (lambda yard: _recipe(yard, "bundle = '\udcff'"), 2, "not valid TOML"),
    "recipe too deep": (lambda yard: _recipe(yard, "a = " + "[" * 5000), 2, "not valid TOML"),
    "unknown key": (lambda yard: _recipe(yard, "[tiles]\noverlap = 3"), 2, "mean `overlap_px`?"),
    "value out of bounds": (lambda yard: _recipe(yard, "[write]\nquality = 101"), 2, "quality"),
    "value not a number": (
        lambda yard: _recipe(yard, "[tiles]\nmask_mpp = nan"),
        2,
        "$.tiles.mask_mpp is not a finite",
    ),
    "mask too fine": (lambda yard: _recipe(yard, "[tiles]\nmask_mpp = 0.05"), 2, "mask_mpp"),
    "flag not a number": (lambda yard: ["--mpp", "nan"], 2, "$.slide.mpp is not a finite"),
    "pixel size of the user": (lambda yard: ["--mpp", "0.001"], 2, "mpp"),
    "no bundle": (lambda yard: ["--bundle", "none"], 6, "No bundle none"),
    "bundle of a long name": (lambda yard: ["--bundle", "x" * 5000], 6, "No bundle"),
    "later bundle": (lambda yard: _spec(yard, schema=99), 6, "newer wsi-stain"),
    "strange key in a bundle": (lambda yard: _spec(yard, solvr={}), 6, "mean `solver`?"),
    "bundle with too few steps": (lambda yard: _spec(yard, timesteps=100), 6, "start_step 300"),
    "bundle with black glass": (
        lambda yard: _spec(yard, color={"white": [0, 0, 0]}),
        6,
        "$.color.white[0]",
    ),
    "bundle that reaches out": (
        lambda yard: _spec(yard, files={"../identity/bundle.json": "0"}),
        6,
        "lacks ../identity",
    ),
    "net without levels": (lambda yard: _net(yard, channels=[]), 6, "$.net.channels"),
    "net larger than its file": (lambda yard: _net(yard, channels=[10**6]), 6, "too few for a net"),
    "net deeper than its file": (lambda yard: _net(yard, blocks=10**6), 6, "too few for a net"),
    "damaged weights": (_damaged_weights, 6, "is damaged: SHA-256"),
    "lost weights": (_lost_weights, 6, "lacks score.safetensors"),
    "overlap too wide": (lambda yard: ["--overlap-px", "200"], 5, "overlap"),
    "memory too small": (
        lambda yard: _recipe(yard, SERIAL + "memory_limit_mb = 64"),
        5,
        "of memory",
    ),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_setting_is_one_line_and_nothing_is_made(
    case: str, yard: Yard, translate: Callable[..., tuple[int, str, str]]
) -> None:
    build, expected, words = BAD_SETTINGS[case]
    slide, flags = yard.slide(), build(yard)
    code, out, err = translate(slide, *flags)
    assert (code, out) == (expected, ""), err
    assert words in err
    assert err.startswith("wsi-stain: ")
    assert err.count("\n") == 1
    assert code != 6 or "the flag" not in err, "no flag sets what a bundle says"
    assert not yard.out.exists()


# ---- outputs that cannot be written ----------------------------------------------------------


@pytest.mark.parametrize("blocked", ["out", "out/s_test.run", "out/s_test.ome.tiff/x"])
def test_file_or_folder_in_the_way_is_refused_and_stays(
    blocked: str, yard: Yard, translate: Callable[..., tuple[int, str, str]]
) -> None:
    slide, thing = yard.slide(), yard.folder / blocked
    thing.parent.mkdir(parents=True, exist_ok=True)
    thing.write_text("mine")
    code, _, err = translate(slide, "--overwrite")
    assert code == 8, err
    assert err.count("\n") == 1
    assert thing.read_text() == "mine"


def test_output_that_is_the_slide_is_refused(
    yard: Yard, translate: Callable[..., tuple[int, str, str]]
) -> None:
    slide = yard.slide()
    before = slide.read_bytes()
    yard.out.mkdir()
    (yard.out / "s_test.ome.tiff").hardlink_to(slide)
    code, _, err = translate(slide, "--overwrite")
    assert code == 8
    assert "is the slide itself" in err
    assert slide.read_bytes() == before


def test_output_that_exists_is_refused(
    yard: Yard, translate: Callable[..., tuple[int, str, str]]
) -> None:
    slide = yard.slide()
    yard.out.mkdir()
    (yard.out / "s_test.ome.tiff").write_text("mine")
    before = digests(yard.folder)
    code, _, err = translate(slide)
    assert (code, err.count("\n")) == (8, 1)
    assert "exists already. Use --overwrite" in err
    assert digests(yard.folder) | {"serial.toml": ""} == before | {"serial.toml": ""}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a read-only folder")
def test_output_folder_that_is_read_only_is_refused(
    yard: Yard, translate: Callable[..., tuple[int, str, str]]
) -> None:
    slide, mount, umount = yard.slide(), shutil.which("mount"), shutil.which("umount")
    yard.out.mkdir()
    words = ["-t", "tmpfs", "-o", "ro", "x", str(yard.out)]
    if mount is None or umount is None or subprocess.run([mount, *words]).returncode:
        pytest.skip("no mounts here")
    try:
        code, _, err = translate(slide)
    finally:
        subprocess.run([umount, yard.out], check=True)
    assert (code, err.count("\n")) == (8, 1)
    assert "Read-only file system" in err


@pytest.mark.parametrize("name", ["manifest.json", "lock"])
@pytest.mark.timeout(60)
def test_pipe_in_a_run_folder_is_refused_unopened(
    name: str, yard: Yard, translate: Callable[..., tuple[int, str, str]]
) -> None:
    slide, folder = yard.slide(), yard.out / "s_test.run"
    folder.mkdir(parents=True)
    os.mkfifo(folder / name)
    code, _, err = translate(slide)
    assert (code, err.count("\n")) == (8, 1)
    assert "is no file" in err


@pytest.mark.parametrize("out", ["x" * 300, "x/" * 2100, "a.ome.zarr/out"])
def test_output_folder_that_cannot_be_is_refused(
    out: str, yard: Yard, translate: Callable[..., tuple[int, str, str]]
) -> None:
    slide = yard.folder / "a.ome.zarr"
    bands, settings = [yard.he], WriteConfig(format="ome-zarr")
    size = Size(yard.he.shape[1], yard.he.shape[0])
    write_omezarr(slide, size, bands, 0.5, settings, name="a")
    before = digests(slide)
    code, _, err = translate(slide, "--out", yard.folder / out)
    assert (code, err.count("\n")) == (8, 1)
    assert "lies in the slide" in err or "File name too long" in err
    assert digests(slide) == before


@pytest.mark.parametrize("name", ["validate", "report"])
@pytest.mark.timeout(60)
def test_pipe_is_refused_at_once_by_verbs_that_read_results(
    name: str, yard: Yard, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["wsi-stain", name, str(_fifo(yard))])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 8
    assert capsys.readouterr().err.count("\n") == 1


# ---- odd but usable --------------------------------------------------------------------------


def test_names_that_are_no_utf8_work_and_are_told(
    yard: Yard, translate: Callable[..., tuple[int, str, str]]
) -> None:
    odd = yard.folder / os.fsdecode(b"o\xffd\n")
    odd.mkdir()
    slide = yard.slide().rename(odd / os.fsdecode(b"a\xfe\nb.tiff"))
    code, out, err = translate(slide, "--out", odd)
    assert (code, err) == (0, "")
    made = Path(json.loads(out)["output"])
    assert made.is_file()
    assert made.name == "a__b_test.ome.tiff"


def test_long_names_give_names_that_every_file_system_takes(tmp_path: Path) -> None:
    for slide in ("x" * 251 + ".svs", "ä" * 120 + ".ndpi"):
        files = RunFiles.of(tmp_path, Path(slide), "K" * 300)
        longest = max(files.output.name + ".part", files.folder.name, key=len)
        assert len(longest.encode()) <= 200


def test_slide_that_shows_ihc_is_told_and_recorded(
    yard: Yard, translate: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, err = translate(yard.slide(pixels=_as_ihc(yard.he)), json_flag=False)
    assert code == 0, err
    assert "Is this slide H&E?" in err
    record = json.loads((yard.out / "s_test.run" / "manifest.json").read_text())
    assert any("Is this slide H&E?" in note and "brown" in note for note in record["notes"])


def test_missing_tiles_are_told_and_recorded(
    yard: Yard, translate: Callable[..., tuple[int, str, str]]
) -> None:
    slide = yard.slide(codec="jpeg")
    with tifffile.TiffFile(slide, mode="r+") as tiff:
        tag = tiff.pages.first.tags["TileByteCounts"]
        tag.overwrite((*tag.value[:-1], 0))
    code, _, err = translate(slide)
    assert code == 0, err
    record = json.loads((yard.out / "s_test.run" / "manifest.json").read_text())
    assert any(
        note.startswith("1 tiles of the largest level are missing") for note in record["notes"]
    )


# ---- the table of the README -----------------------------------------------------------------

# Row of the table: where its tests are, with the exit code it must name.
ROWS: dict[str, tuple[int, tuple[str, ...]]] = {
    "no such file": (3, ("missing",)),
    "empty file": (3, ("empty",)),
    "text renamed `.svs`": (3, ("text",)),
    "cut off: half a download": (3, ("cut in the middle", "cut at the end", "cut in the header")),
    "a tile inside that cannot be read": (3, ("broken tile",)),
    "absurd sizes: a billion pixels, none, negative": (
        3,
        (
            *("huge", "huge svs", "huge ome", "huge and empty", "no size", "no size ome"),
            *("negative size", "negative size svs"),
        ),
    ),
    "no pixel size": (3, ("no pixel size",)),
    "pixel size wrong 100 times": (3, ("pixel 100 times too large", "pixel 100 times too small")),
    "MRXS without its folder": (3, ("mrxs alone",)),
    "fluorescence": (3, ("fluorescence",)),
    "glass only; pen marks only": (4, ("all glass", "pen on glass")),
    "a folder": (3, ("folder",)),
    "a pipe or device": (3, ("pipe",)),
    "a file that may not be read": (3, ("test_slide_that_may_not_be_read_is_refused",)),
    "a name longer than the file system takes": (3, ("name of 300 letters",)),
    "a name that is not UTF-8": (0, ("test_names_that_are_no_utf8_work_and_are_told",)),
    "IHC given as H&E": (0, ("test_slide_that_shows_ihc_is_told_and_recorded",)),
    "tiles that the slide leaves out": (0, ("test_missing_tiles_are_told_and_recorded",)),
    "output exists": (8, ("test_output_that_exists_is_refused",)),
    "output is the slide": (8, ("test_output_that_is_the_slide_is_refused",)),
    "output folder read-only": (8, ("test_output_folder_that_is_read_only_is_refused",)),
    "a file in the output folder's place": (
        8,
        ("test_file_or_folder_in_the_way_is_refused_and_stays",),
    ),
    "broken recipe": (
        2,
        (
            *("recipe missing", "recipe is a folder", "recipe broken", "recipe not UTF-8"),
            *("recipe too deep", "recipe is a pipe"),
        ),
    ),
    "unknown key": (2, ("unknown key",)),
    "a value out of bounds": (
        2,
        (
            "value out of bounds",
            "value not a number",
            "mask too fine",
            "flag not a number",
            "pixel size of the user",
        ),
    ),
    "overlap or memory that cannot be": (5, ("overlap too wide", "memory too small")),
    "bundle of a later version": (6, ("later bundle",)),
    "bundle damaged, or not there": (
        6,
        (
            *("no bundle", "bundle of a long name", "damaged weights", "lost weights"),
            *("strange key in a bundle", "bundle with too few steps", "bundle with black glass"),
            "bundle that reaches out",
            *("net without levels", "net larger than its file", "net deeper than its file"),
        ),
    ),
}


def test_table_of_the_readme_names_every_case_and_its_code() -> None:
    text = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    table = text.split("<!-- bad input -->")[1].split("<!-- /bad input -->")[0]
    rows = re.findall(r"^\| (.+?) \| (\d+) \| .+ \|$", table, re.MULTILINE)
    assert {name: int(code) for name, code in rows} == {
        name: code for name, (code, _) in ROWS.items()
    }
    tested = {name: code for name, (_, code, _) in (BAD_SLIDES | BAD_SETTINGS).items()}
    for code, cases in ROWS.values():
        for case in cases:
            assert tested.get(case, code) == code
            assert case in tested or callable(globals()[case])
    assert set(tested) <= {case for _, cases in ROWS.values() for case in cases}


def _as_ihc(he: Pixels) -> Pixels:
    """Give H&E the colors of hematoxylin and DAB."""
    od = -np.log(np.maximum(he, 1) / 243.0)
    stains = od @ np.linalg.pinv(np.array([[0.651, 0.701, 0.290], [0.216, 0.801, 0.558]]))
    od = np.maximum(stains, 0) @ np.array([[0.650, 0.704, 0.286], [0.268, 0.570, 0.776]])
    pixels: Pixels = np.rint(243 * np.exp(-od)).astype(np.uint8)
    return pixels


def digests(folder: Path) -> dict[str, str]:
    """Name every file below a folder with the digest of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }
