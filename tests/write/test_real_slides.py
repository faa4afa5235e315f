"""Outputs of six real slides, read by those that QuPath reads with: Bio-Formats and OpenSlide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import openslide
import pytest
import tifffile

from tests.write.qupath_rules import read_objects
from wsi_stain.config import BundleSpec, resolve_run_config
from wsi_stain.geometry import Size, pyramid_sizes
from wsi_stain.pipeline import RunResult, translate_slide
from wsi_stain.slides.image import SlideSource
from wsi_stain.translate.bundle import save_nets

AskBioFormats = Callable[[Sequence[Path], Path], list[dict[str, Any]]]

pytestmark = [pytest.mark.slow, pytest.mark.slide]

# Aperio JPEG, TIFF with a pixel size 100 times wrong, JPEG 2000, no pixel size, OME-TIFF.
SLIDES = {
    "CMU-1-Small-Region.svs": None,
    "CMU-1-Small-Region.jpeg.tiff": 0.499,
    "gastric_he_1.svs": None,
    "gastric_he_2.svs": None,
    "tcga_no_mpp.svs": 0.5,
    "OS-1-detail.ome.tif": None,
}
MOST_DIFFERENCE = 2.0  # grey levels, mean: decoders smooth chroma each in their way


class Made(NamedTuple):
    """A run, and the field of its slide, um."""

    result: RunResult
    field_um: tuple[float, float]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> dict[str, Made]:
    """Runs of all slides by a bundle without nets: only the road is looked at here."""
    out = tmp_path_factory.mktemp("real")
    spec = BundleSpec(name="identity", marker="Test", start_image="stain")
    save_nets(out / "identity", spec, {})
    found = {}
    for name, mpp in SLIDES.items():
        asked = {"bundle": str(out / "identity"), "cluster.executor": "serial", "slide.mpp": mpp}
        config = resolve_run_config({key: value for key, value in asked.items() if value})[0]
        slide = shared_data / "slides" / name
        result = translate_slide(slide, out / name, config)
        with SlideSource.open(slide, mpp=mpp) as source:
            width_px, height_px = source.size_l0
            found[name] = Made(result, (width_px * source.mpp_l0, height_px * source.mpp_l0))
    return found


@pytest.fixture(scope="module")
def seen(
    made: dict[str, Made], ask_bioformats: AskBioFormats, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, dict[str, Any]], Path]:
    """What Bio-Formats says of each output, and the folder of the pixels it gives."""
    folder = tmp_path_factory.mktemp("pixels")
    facts = ask_bioformats([each.result.files.output for each in made.values()], folder)
    return dict(zip(made, facts, strict=True)), folder


@pytest.mark.parametrize("name", SLIDES)
def test_output_is_whole_in_bioformats_and_openslide(
    name: str, made: dict[str, Made], seen: tuple[dict[str, dict[str, Any]], Path]
) -> None:
    output = made[name].result.files.output
    with tifffile.TiffFile(output) as tiff:
        pages = [cast(tifffile.TiffPage, page).asarray() for page in tiff.pages]
    sizes = [list(level) for level in pyramid_sizes(Size(pages[0].shape[1], pages[0].shape[0]))]
    facts, number = seen[0][name], list(SLIDES).index(name)
    assert (facts["series"], facts["rgb"], facts["channels"]) == (1, True, 3)
    assert facts["levels"] == sizes
    with openslide.OpenSlide(output) as slide:
        assert [list(size) for size in slide.level_dimensions] == sizes
        mpp = [float(slide.properties[f"openslide.mpp-{axis}"]) for axis in "xy"]
        assert mpp == pytest.approx(facts["mpp"], rel=1e-3)
        for level, (ours, size) in enumerate(zip(pages, sizes, strict=True)):
            theirs = np.asarray(slide.read_region((0, 0), level, (size[0], size[1])))[..., :3]
            assert _difference(theirs, ours) <= MOST_DIFFERENCE, level
            bio = np.load(seen[1] / f"{number}_{level}.npy")
            assert _difference(bio, ours) <= MOST_DIFFERENCE, level
    # The same field as the slide's, to one px.
    for um, px, pixel_um in zip(made[name].field_um, sizes[0], facts["mpp"], strict=True):
        assert px * pixel_um == pytest.approx(um, abs=pixel_um)


@pytest.mark.parametrize("name", SLIDES)
def test_metadata_are_valid_and_objects_are_taken(
    name: str, made: dict[str, Made], show_in_bioformats: Callable[[Path], str]
) -> None:
    files = made[name].result.files
    assert "No validation errors found." in show_in_bioformats(files.output)
    with tifffile.TiffFile(files.output) as tiff:
        first = tiff.pages.first
        objects = read_objects(
            files.geojson.read_text("utf-8"), (first.imagewidth, first.imagelength)
        )
    kinds = [found.object_type for found in objects]
    assert kinds.count("tile") == made[name].result.facts()["tiles"]
    assert any(found.class_name == "Tissue" for found in objects)


def _difference(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> float:
    return float(np.abs(one.astype(float) - other).mean())
