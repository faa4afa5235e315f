"""What a scanner wrote about the patient stays in the slide: no file and no line we make has it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import openslide
import pytest
import tifffile
from PIL import Image

from wsi_stain.cli import main
from wsi_stain.config import BundleSpec
from wsi_stain.translate.bundle import save_nets

Pixels = npt.NDArray[np.uint8]
SECRETS = ("Doe^Jane", "ACC2024-9917", "BC4711", "11/21/24", "1971-03-02", "scanroom7", "Dr. Who")
LABEL_RGB = (7, 131, 193)  # of label and macro: in no stain, no glass and no overlay of ours
APERIO = (
    "Aperio Image Library v11.2.1\r\n550x420 (256x256) RGB|AppMag = 20|MPP = 0.5000|"
    "Filename = Doe^Jane|Barcode = BC4711|Accession = ACC2024-9917|Date = 11/21/24|"
    "User = Dr. Who|ImageID = 1971-03-02"
)
OME = (
    '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/'
    '2016-06"><Experimenter ID="Experimenter:0" LastName="Doe^Jane" UserName="Dr. Who"/>'
    '<Image ID="Image:0" Name="ACC2024-9917"><AcquisitionDate>1971-03-02T11:00:00</AcquisitionDate>'
    "<Description>BC4711 11/21/24</Description>"
    '<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="550" SizeY="420" SizeC="3" '
    'SizeZ="1" SizeT="1" PhysicalSizeX="0.5" PhysicalSizeY="0.5">'
    '<Channel ID="Channel:0:0" SamplesPerPixel="3"/><TiffData IFD="0" PlaneCount="1"/></Pixels>'
    "</Image></OME>"
)


def _write(path: Path, pixels: Pixels, description: str) -> None:
    """Write a slide whose tags say whose it is, and a label that says it, too."""
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(
            pixels,
            tile=(256, 256),
            photometric="rgb",
            compression="zlib",
            description=description,
            metadata=None,
            resolution=(20_000, 20_000),
            resolutionunit="CENTIMETER",
            software="scanroom7",
            datetime="1971:03:02 11:00:00",
            extratags=[(315, "s", 0, "Dr. Who", True), (316, "s", 0, "scanroom7", True)],
        )
        if "Aperio" in description:
            for name, kind in (("label", 1), ("macro", 9)):
                picture = np.full((100, 120, 3), LABEL_RGB, np.uint8)
                words = f"Aperio {SECRETS[2]}\r\n{name} 120x100"
                tiff.write(picture, description=words, metadata=None, subfiletype=kind)


@pytest.mark.parametrize(
    ("name", "description", "flags"),
    [("a.svs", APERIO, ()), ("a.ome.tiff", OME, ("--format", "ome-zarr"))],
)
def test_identifiers_of_the_slide_are_in_no_output(  # noqa: PLR0913 - fixtures
    name: str,
    description: str,
    flags: tuple[str, ...],
    tmp_path: Path,
    he_pixels: Pixels,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    slides = tmp_path / "Doe^Jane"
    slides.mkdir()
    _write(slides / name, he_pixels[200:620, 150:700], description)
    monkeypatch.setattr(openslide.OpenSlide, "associated_images", property(_never))
    bundle = tmp_path / "scanroom7" / "identity"
    save_nets(bundle, BundleSpec(name="identity", marker="Test", start_image="source"), {})
    recipe = tmp_path / "r.toml"
    recipe.write_text('[cluster]\nexecutor = "serial"\n')
    out = tmp_path / "out"
    settings = ["--bundle", bundle, "--recipe", recipe, "--keep-store", "--allow-missing"]
    caplog.set_level("DEBUG")

    def type_in(*words: object) -> None:
        monkeypatch.setattr(sys, "argv", ["wsi-stain", *map(str, words)])
        main()

    type_in("info", slides / name, "--json")
    type_in("plan", slides / name, *settings[:4])
    _spoil_a_tile(slides / name)
    type_in("translate", slides / name, "--out", out, *settings, *flags)
    type_in("report", out / "a_test.run")
    type_in("quantify", *out.glob("a_test.ome.*"), "--out", out / "quantity")
    said = "".join(capfd.readouterr()) + caplog.text
    made = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    kinds = {path.suffix for path in made}
    assert {".json", ".geojson", ".groovy", ".csv", ".html", ".png", ".jpg", ".npy"} <= kinds
    assert {"manifest.json", "missing.csv", "zarr.json"} <= {path.name for path in made}
    assert found(made, said) == []
    for path in (path for path in made if path.suffix in (".png", ".jpg")):
        assert not _shows_label(path), path
    # The search itself must be able to find: the slide has them all.
    slide = {slides / name: (slides / name).read_bytes()}
    assert {secret for _, secret in found(slide, "")} >= set(SECRETS)


def _never(self: openslide.OpenSlide) -> None:
    raise AssertionError("label and macro were asked for")


def _spoil_a_tile(path: Path) -> None:
    """Break a tile: what is said of it must name no path either."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        at, length = page.dataoffsets[1], page.databytecounts[1]
    data = bytearray(path.read_bytes())
    data[at : at + length] = bytes(length)
    path.write_bytes(data)


def _shows_label(path: Path) -> bool:
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    return bool((np.abs(pixels - LABEL_RGB).max(axis=-1) < 12).any())


def found(files: dict[Path, bytes], said: str) -> list[tuple[str, str]]:
    """Look for each secret in contents, names and lines, as UTF-8 and UTF-16."""
    hits = [("said", secret) for secret in SECRETS if secret in said]
    for path, data in files.items():
        for secret in SECRETS:
            forms = (secret.encode(), secret.encode("utf-16-le"), secret.encode("utf-16-be"))
            if secret in path.name or any(form in data for form in forms):
                hits.append((path.name, secret))
    return hits


def test_errors_quote_no_tag_of_the_slide(
    tmp_path: Path,
    he_pixels: Pixels,
    run_refused: Callable[[Path], str],
) -> None:
    whole = tmp_path / "whole.svs"
    _write(whole, he_pixels[:600, :600], APERIO)
    data = whole.read_bytes()
    for share in (0.2, 0.6):
        cut = tmp_path / "cut.svs"
        cut.write_bytes(data[: int(share * len(data))])
        said = run_refused(cut)
        assert said.count("\n") == 1
        assert not [secret for secret in SECRETS if secret in said]


@pytest.fixture
def run_refused(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[[Path], str]:
    """Give the function that looks at a bad slide: all that was said."""

    def call(slide: Path) -> str:
        monkeypatch.setattr(sys, "argv", ["wsi-stain", "info", str(slide)])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 3
        return "".join(capfd.readouterr())

    return call
