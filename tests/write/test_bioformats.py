"""The real Bio-Formats, which is what QuPath reads with, on the files that we write.

Its jar is for tests only and never shipped: see `bioformats_jar`. On outputs of real slides:
`test_real_slides.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
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
AskBioFormats = Callable[[Sequence[Path], Path], list[dict[str, Any]]]

pytestmark = pytest.mark.slow

SPECS = {
    "4:2:0": WriteConfig(tile_px=256),
    "4:4:4": WriteConfig(tile_px=256, subsampling="4:4:4"),
    "lossless": WriteConfig(tile_px=256, lossless=True),
}
SIZES = ((1403, 1101), (1025, 3001), (511, 2))
MPP = 0.499
NAME = "slide <3> & Ki-67"


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
    ask_bioformats: AskBioFormats,
    files: dict[tuple[str, tuple[int, int]], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[list[dict[str, Any]], Path]:
    """What Bio-Formats says of each file, and the folder of the pixels it gives."""
    folder = tmp_path_factory.mktemp("pixels")
    return ask_bioformats(list(files.values()), folder), folder


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
    show_in_bioformats: Callable[[Path], str], files: dict[tuple[str, tuple[int, int]], Path]
) -> None:
    shown = show_in_bioformats(files["4:2:0", SIZES[0]])
    assert "No validation errors found." in shown
    assert re.search(r"Series count = 1\b", shown)
    assert re.search(r"Resolutions = 3\b", shown)
    assert "RGB = true (3)" in shown
