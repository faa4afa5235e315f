"""The OME-XML of a pyramid: built here, and read back here by the check.

Room 4 of 4. In: name, size, pixel size. Out: XML bytes; or the other way round. Not here: TIFF.

Only what readers need (schema 2016-06): one Image, one RGB Channel of three samples, pixel size
with its unit. No date, path, UUID or other trace of the patient or the machine.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from wsi_stain.geometry import Size

__all__ = ["OmeFacts", "build_ome_xml", "parse_ome_xml"]

NAMESPACE = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
CREATOR = "wsi-stain"
MICROMETER = "\u00b5m"

# XML 1.0 forbids control characters and surrogates, even escaped.
FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class OmeFacts:
    """What an OME-XML says of its first image; `None` or "" where it says nothing."""

    n_images: int
    n_channels: int
    samples_per_pixel: str
    pixel_type: str
    size: Size | None
    mpp_x: float | None
    mpp_y: float | None
    unit_x: str
    unit_y: str
    name: str


def build_ome_xml(name: str, size: Size, mpp: float, description: str) -> bytes:
    """Describe one RGB picture.

    Parameters
    ----------
    name, description
        Any text; characters that XML cannot hold are left out.
    size
        Size of level 0, px.
    mpp
        Pixel size of level 0, um/px.

    Returns
    -------
    bytes
        UTF-8, with declaration.
    """
    root = ET.Element(
        "OME",
        {
            "xmlns": NAMESPACE,
            "xmlns:xsi": "http://www.w3.org/2001/XMLSchema-instance",
            "xsi:schemaLocation": f"{NAMESPACE} {NAMESPACE}/ome.xsd",
            "Creator": CREATOR,
        },
    )
    image = ET.SubElement(root, "Image", {"ID": "Image:0", "Name": _legal(name)})
    ET.SubElement(image, "Description").text = _legal(description)
    pixels = ET.SubElement(
        image,
        "Pixels",
        {
            "ID": "Pixels:0",
            "DimensionOrder": "XYCZT",
            "Type": "uint8",
            "SignificantBits": "8",
            "Interleaved": "true",
            "BigEndian": "false",
            "SizeX": str(size.width_px),
            "SizeY": str(size.height_px),
            "SizeC": "3",
            "SizeZ": "1",
            "SizeT": "1",
            "PhysicalSizeX": repr(float(mpp)),
            "PhysicalSizeXUnit": MICROMETER,
            "PhysicalSizeY": repr(float(mpp)),
            "PhysicalSizeYUnit": MICROMETER,
        },
    )
    ET.SubElement(pixels, "Channel", {"ID": "Channel:0:0", "SamplesPerPixel": "3"})
    ET.SubElement(pixels, "TiffData", {"IFD": "0", "PlaneCount": "1"})
    data: bytes = ET.tostring(root, encoding="UTF-8", xml_declaration=True)
    return data


def parse_ome_xml(text: str) -> OmeFacts:
    """Read back what `build_ome_xml` and other writers state.

    Raises
    ------
    ValueError
        Not XML, with a document type, not OME, no Pixels element, or a size that is no number.
    """
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError("a document type, which OME-XML never has")
    try:
        root = ET.fromstring(text.encode())  # noqa: S314  entities are refused above
    except ET.ParseError as error:
        raise ValueError(f"not XML ({error})") from error
    images = root.findall("{*}Image")
    pixels = images[0].find("{*}Pixels") if images else None
    if not root.tag.endswith("}OME") or pixels is None:
        raise ValueError("no OME element with Image and Pixels")
    channels = pixels.findall("{*}Channel")
    return OmeFacts(
        n_images=len(images),
        n_channels=len(channels),
        samples_per_pixel=channels[0].get("SamplesPerPixel", "") if channels else "",
        pixel_type=pixels.get("Type", ""),
        size=Size(int(pixels.get("SizeX", "0")), int(pixels.get("SizeY", "0"))),
        mpp_x=_number(pixels.get("PhysicalSizeX")),
        mpp_y=_number(pixels.get("PhysicalSizeY")),
        unit_x=pixels.get("PhysicalSizeXUnit", MICROMETER),  # the schema's default unit
        unit_y=pixels.get("PhysicalSizeYUnit", MICROMETER),
        name=images[0].get("Name", ""),
    )


def _legal(text: str) -> str:
    return FORBIDDEN.sub("", text)


def _number(text: str | None) -> float | None:
    return None if text is None else float(text)
