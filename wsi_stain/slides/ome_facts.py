"""What an OME-XML says of one picture of a file: pixel size, objective.

Room 1 of 4. In: the XML, the picture's size. Out: candidates. Not here: files, which answer counts.

A file may hold the scan beside a macro and a label, each with a pixel size of its own and in any
order; the scan's is that of the `Image` whose `Pixels` are as large.
"""

from __future__ import annotations

import html
import re

from wsi_stain.geometry import Size
from wsi_stain.slides.pixel_size import PixelSize

__all__ = ["ome_pixel_sizes", "ome_power"]

_NUMBER = r"\d+(?:\.\d*)?(?:[eE][+-]?\d+)?"
_UM = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4}


def ome_pixel_sizes(xml: str, size: Size) -> list[PixelSize]:
    """Read the pixel size of the picture of that size, as a candidate; or none.

    Parameters
    ----------
    xml
        OME-XML; its namespace may have any prefix.
    size
        Of the picture, px.
    """
    pixels = _attributes(_image(xml, size), "Pixels")
    sides: list[float] = []
    for axis in "XY":
        number = re.fullmatch(_NUMBER, pixels.get(f"PhysicalSize{axis}", ""))
        um_per_unit = _UM.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
        if number and um_per_unit:
            sides.append(float(number.group()) * um_per_unit)
    return [PixelSize("OME PhysicalSizeX", *sides)] if len(sides) == 2 else []


def ome_power(xml: str, size: Size) -> float | None:
    """Read the magnification of the objective that the picture of that size was scanned with.

    Where the picture names no objective, the file's only one is meant.
    """
    asked = _attributes(_image(xml, size), "ObjectiveSettings").get("ID")
    objectives = [_attributes(tag, "Objective") for tag in _tags(xml, "Objective")]
    powers = {
        item["NominalMagnification"]
        for item in objectives
        if "NominalMagnification" in item and asked in (None, item.get("ID"))
    }
    power = re.fullmatch(_NUMBER, powers.pop()) if len(powers) == 1 else None
    return float(power.group()) if power else None


def _image(xml: str, size: Size) -> str:
    """Cut out the picture's `Image`; the only one is it, empty where several are and none fits."""
    _, *images = re.split(r"(?=<(?:\w+:)?Image\b)", xml)
    if len(images) < 2:
        return "".join(images)
    return next((image for image in images if _size(image) == size), "")


def _size(image: str) -> tuple[int, ...]:
    pixels = _attributes(image, "Pixels")
    sides = (pixels.get(f"Size{axis}", "") for axis in "XY")
    return tuple(int(side) for side in sides if side.isdecimal())


def _tags(xml: str, name: str) -> list[str]:
    return re.findall(rf"<(?:\w+:)?{name}\b[^>]*>", xml)


def _attributes(xml: str, name: str) -> dict[str, str]:
    """Read the attributes of the first tag of that name."""
    tags = _tags(xml, name)
    found = re.findall(r'\b(\w+)="([^"]*)"', tags[0]) if tags else []
    return {name: html.unescape(value) for name, value in found}
