"""The scan's own pixel size and objective, wherever its picture stands in the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile

from wsi_stain.geometry import Size
from wsi_stain.slides.image import SlideSource
from wsi_stain.slides.ome_facts import ome_pixel_sizes, ome_power

MACRO, SCAN = Size(120, 80), Size(700, 500)
HEAD = '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
OBJECTIVES = (
    '<Instrument ID="Instrument:0"><Objective ID="Objective:0" NominalMagnification="1.25"/>'
    '<Objective ID="Objective:1" NominalMagnification="40.0"/></Instrument>'
)


def picture(size: Size, mpp: str, *, objective: int | None = None, unit: str = "") -> str:
    asked = "" if objective is None else f'<ObjectiveSettings ID="Objective:{objective}"/>'
    return (
        f'<Image>{asked}<Pixels PhysicalSizeX="{mpp}" {unit} '
        f'PhysicalSizeY="{mpp}" SizeX="{size.width_px}" SizeY="{size.height_px}"/></Image>'
    )


@pytest.mark.parametrize("scan_first", [True, False])
def test_facts_are_those_of_the_picture_asked_for(scan_first: bool) -> None:
    pictures = [picture(SCAN, "0.25", objective=1), picture(MACRO, "8.0", objective=0)]
    xml = HEAD + OBJECTIVES + "".join(pictures if scan_first else pictures[::-1]) + "</OME>"
    for size, mpp, power in ((SCAN, 0.25, 40.0), (MACRO, 8.0, 1.25)):
        (found,) = ome_pixel_sizes(xml, size)
        assert (found.x_um, found.y_um) == (mpp, mpp)
        assert ome_power(xml, size) == power
    assert ome_pixel_sizes(xml, Size(1, 1)) == []


def test_only_picture_is_meant_and_only_objective_is_its_own() -> None:
    xml = HEAD + '<Instrument><Objective NominalMagnification="20"/></Instrument>'
    xml += picture(SCAN, "0.5") + "</OME>"
    assert ome_pixel_sizes(xml, Size(1, 1))[0].mean_um == 0.5
    assert ome_power(xml, SCAN) == 20.0
    assert ome_power(HEAD + OBJECTIVES + picture(SCAN, "0.5"), SCAN) is None, "which of two?"


@pytest.mark.parametrize("unit", ["µm", "&#181;m", "&#xB5;m", "um"])
def test_unit_is_read_however_it_is_written(unit: str) -> None:
    units = f'PhysicalSizeXUnit="{unit}" PhysicalSizeYUnit="{unit}"'
    assert ome_pixel_sizes(picture(SCAN, "0.5", unit=units), SCAN)[0].mean_um == 0.5
    assert ome_pixel_sizes(picture(SCAN, "0.5", unit='PhysicalSizeXUnit="pixel"'), SCAN) == []


def test_empty_text_says_nothing() -> None:
    assert (ome_pixel_sizes("", SCAN), ome_power("", SCAN)) == ([], None)


def test_macro_that_comes_first_does_not_size_the_scan(tmp_path: Path) -> None:
    path = tmp_path / "macro_first.ome.tiff"
    rng = np.random.default_rng(5)
    with tifffile.TiffWriter(path, ome=True) as file:
        for size, mpp in ((MACRO, 8.0), (SCAN, 0.25)):
            file.write(
                rng.integers(120, 250, (size.height_px, size.width_px, 3), np.uint8),
                photometric="rgb",
                tile=(256, 256),
                metadata={"axes": "YXS", "PhysicalSizeX": mpp, "PhysicalSizeY": mpp},
            )
    with SlideSource.open(path) as source:
        assert (source.size_l0, source.mpp_l0) == (SCAN, 0.25)
