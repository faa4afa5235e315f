"""The OME-XML that is written, and what is read from others."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_stain.geometry import Size
from wsi_stain.write.omexml import build_ome_xml, parse_ome_xml

SIZE = Size(5931, 4437)


@given(st.text(), st.text(), st.floats(0.05, 20.0))
def test_xml_survives_a_round_trip_when_names_are_wild(
    name: str, description: str, mpp: float
) -> None:
    facts = parse_ome_xml(build_ome_xml(name, SIZE, mpp, description).decode())
    assert (facts.size, facts.mpp_x, facts.mpp_y) == (SIZE, mpp, mpp)
    assert (facts.n_images, facts.n_channels, facts.samples_per_pixel) == (1, 1, "3")
    assert set(facts.name) <= set(name) | {" "}  # line ends become spaces in attributes


def test_name_is_escaped_when_it_holds_markup() -> None:
    facts = parse_ome_xml(build_ome_xml('a<b>&"\x00\x1f\ufffe', SIZE, 0.5, "x").decode())
    assert facts.name == 'a<b>&"'


def test_xml_tells_no_more_than_readers_need() -> None:
    root = ET.fromstring(build_ome_xml("slide", SIZE, 0.5, "virtual stain"))  # noqa: S314  ours
    tags = [element.tag.rpartition("}")[2] for element in root.iter()]
    assert tags == ["OME", "Image", "Description", "Pixels", "Channel", "TiffData"]
    assert not {"UUID", "AcquisitionDate"} & {key for item in root.iter() for key in item.attrib}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Aperio Image Library", "not XML"),
        ("", "not XML"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', "document type"),
        ("<a/>", "no OME element"),
        ('<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"/>', "no OME element"),
    ],
)
def test_text_is_refused_when_it_is_no_ome_xml(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_ome_xml(text)
