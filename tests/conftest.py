"""Slides that the tests write themselves, and the way to the real ones.

Test modules can't import from here, so helpers come as fixtures that give a function.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, Protocol

import cv2
import hypothesis
import imagecodecs
import numpy as np
import numpy.typing as npt
import pytest
import tifffile

# A busy machine is no failure of a property.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")

Pixels = npt.NDArray[np.uint8]
Blocks = Callable[[int, int], Pixels]
Kind = Literal["generic", "aperio", "ome", "plain"]

GLASS = (243, 243, 244)
SYNTHETIC_SIZE = (1403, 1101)
SYNTHETIC_MPP = 0.5
TILE_PX = 256


class WriteSlide(Protocol):
    """Signature of the `write_slide` fixture."""

    def __call__(
        self,
        path: Path,
        pixels: Pixels | Blocks,
        mpp: float | None,
        *,
        size: tuple[int, int] | None = None,
        levels: int = 1,
        kind: Kind = "generic",
        codec: str = "lzw",
    ) -> Path:
        """Write the slide and give its path."""
        ...


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real histology data that lies beside the checkout; skips when it does not."""
    folder = (Path(__file__).resolve().parents[1] / "../shared/data").resolve()
    if not (folder / "manifest.csv").is_file():
        pytest.skip(f"no real data: {folder} is absent")
    return folder


@pytest.fixture(scope="session")
def write_slide() -> WriteSlide:
    """Give the function that writes a tiled TIFF slide.

    `pixels` is uint8 (h, w, 3) RGB, or a function (row, column) -> uint8 (tile_px, tile_px, 3)
    with `size` = (width, height) and one level; a read-only block is encoded once however often
    it is given, so that a huge and mostly empty slide is cheap. `kind`: "generic" (levels in the
    main chain), "aperio" (SVS description), "ome" (OME-XML, levels as SubIFDs) or "plain" (strips,
    one level).
    `codec`: "lzw", "deflate", "jpeg" (quality 95, 4:4:4) or "none". ``mpp=None``: no pixel size.
    """
    return _write_slide


@pytest.fixture(scope="session")
def he_pixels() -> Pixels:
    """Picture of two H&E-like tissue blobs on glass, uint8 (1101, 1403, 3), 0.5 um/px."""
    return _draw_tissue(*SYNTHETIC_SIZE)


@pytest.fixture(scope="session")
def synthetic_slide(tmp_path_factory: pytest.TempPathFactory, he_pixels: Pixels) -> Path:
    """Tiled JPEG pyramid of `he_pixels`: 1403 x 1101 px, 0.5 um/px, three levels."""
    path = tmp_path_factory.mktemp("slides") / "synthetic.tiff"
    return _write_slide(path, he_pixels, SYNTHETIC_MPP, levels=3, codec="jpeg")


@pytest.fixture(scope="session")
def coordinates() -> Callable[[int, int, int, int], Pixels]:
    """Give the function (x, y, width, height) -> the pixels of `coordinate_slide` there.

    Red is x mod 256, green is y mod 256, blue holds both high parts: every pixel up to 4096 px
    tells its own place.
    """
    return _coordinates


@pytest.fixture(scope="session")
def coordinate_slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lossless one-level slide of 1403 x 1101 px, 0.5 um/px, whose pixels encode their place."""
    path = tmp_path_factory.mktemp("slides") / "coordinates.tiff"
    return _write_slide(path, _coordinates(0, 0, *SYNTHETIC_SIZE), SYNTHETIC_MPP)


def _coordinates(x_px: int, y_px: int, width_px: int, height_px: int) -> Pixels:
    ys, xs = np.mgrid[y_px : y_px + height_px, x_px : x_px + width_px]
    high = (xs // 256 % 16) + 16 * (ys // 256 % 16)
    return np.stack([xs % 256, ys % 256, high], axis=-1).astype(np.uint8)


def _draw_tissue(width_px: int, height_px: int, seed: int = 7) -> Pixels:
    """Draw eosin with soft texture and hematoxylin nuclei in two ellipses, by Beer-Lambert."""
    rng = np.random.default_rng(seed)
    ys, xs = np.mgrid[0:height_px, 0:width_px]
    blobs = np.zeros((height_px, width_px), np.uint8)
    for cx, cy, rx, ry in ((0.29, 0.42, 0.21, 0.30), (0.72, 0.60, 0.19, 0.27)):
        inside = ((xs / width_px - cx) / rx) ** 2 + ((ys / height_px - cy) / ry) ** 2 < 1
        blobs[inside] = 1
    texture = cv2.GaussianBlur(rng.standard_normal((height_px, width_px)), (0, 0), 9)
    eosin = blobs * np.clip(0.55 + 0.16 * texture / texture.std(), 0.15, 1.2)
    nuclei = np.zeros((height_px, width_px), np.float64)
    for x_px, y_px in rng.uniform((0, 0), (width_px, height_px), (width_px * height_px // 500, 2)):
        axes = (int(rng.integers(5, 9)), int(rng.integers(4, 7)))
        center = (int(x_px), int(y_px))
        cv2.ellipse(nuclei, center, axes, float(rng.uniform(0, 180)), 0, 360, 1.0, -1)
    hematoxylin = blobs * cv2.GaussianBlur(nuclei, (0, 0), 1.2) * 1.3
    vectors = np.array([[0.651, 0.701, 0.290], [0.216, 0.801, 0.558]])
    density = np.stack([hematoxylin, eosin], axis=-1) @ vectors
    noise = rng.normal(0.0, 1.0, (height_px, width_px, 3))
    picture = np.rint(np.array(GLASS) * np.exp(-density) + noise)
    pixels: Pixels = np.clip(picture, 0, 255).astype(np.uint8)
    return pixels


def _write_slide(
    path: Path,
    pixels: Pixels | Blocks,
    mpp: float | None,
    *,
    size: tuple[int, int] | None = None,
    levels: int = 1,
    kind: Kind = "generic",
    codec: str = "lzw",
) -> Path:
    if callable(pixels):
        assert size is not None
        tile_px = pixels(0, 0).shape[0]
        shapes, sources = [(size[1], size[0])], [pixels]
    elif kind == "plain":
        tifffile.imwrite(path, pixels, photometric="rgb", metadata=None, rowsperstrip=64)
        return path
    else:
        tile_px = TILE_PX
        pyramid = _halve(pixels, levels)
        shapes = [(level.shape[0], level.shape[1]) for level in pyramid]
        sources = [_cut(level, tile_px) for level in pyramid]
    with tifffile.TiffWriter(path, bigtiff=False) as tiff:
        for index, ((height_px, width_px), blocks) in enumerate(zip(shapes, sources, strict=True)):
            grid = (-(-height_px // tile_px), -(-width_px // tile_px))
            per_cm = 1e4 / (mpp * 2**index) if mpp else 1.0
            tiff.write(
                _encode(blocks, grid, codec),
                shape=(height_px, width_px, 3),
                dtype=np.uint8,
                tile=(tile_px, tile_px),
                photometric="ycbcr" if codec == "jpeg" else "rgb",
                subsampling=(1, 1) if codec == "jpeg" else None,
                compression=None if codec == "none" else codec,
                description=_description(kind, mpp, width_px, height_px) if index == 0 else None,
                metadata=None,
                software=False,
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER" if mpp and kind != "aperio" else "NONE",
                subfiletype=1 if index else 0,
                subifds=len(shapes) - 1 if index == 0 and kind == "ome" else None,
            )
    return path


def _halve(pixels: Pixels, levels: int) -> list[Pixels]:
    """Make a pyramid by 2 x 2 means, repeating an odd last row or column."""
    pyramid = [pixels]
    for _ in range(levels - 1):
        last = pyramid[-1]
        pad = [(0, last.shape[0] % 2), (0, last.shape[1] % 2), (0, 0)]
        even = np.pad(last, pad, mode="edge").astype(np.uint16)
        total = even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]
        pyramid.append(((total + 2) // 4).astype(np.uint8))
    return pyramid


def _cut(pixels: Pixels, tile_px: int) -> Blocks:
    def block(row: int, column: int) -> Pixels:
        ys = slice(row * tile_px, (row + 1) * tile_px)
        part = pixels[ys, column * tile_px : (column + 1) * tile_px]
        pad = [(0, tile_px - part.shape[0]), (0, tile_px - part.shape[1]), (0, 0)]
        return np.pad(part, pad, mode="edge")

    return block


def _encode(blocks: Blocks, grid: tuple[int, int], codec: str) -> Iterator[bytes]:
    """Encode tiles row by row; a read-only block, one that its maker gives again, only once."""
    shared: dict[int, bytes] = {}
    for row in range(grid[0]):
        for column in range(grid[1]):
            block = blocks(row, column)
            if block.flags.writeable:
                yield _encode_block(block, codec)
                continue
            if id(block) not in shared:
                shared[id(block)] = _encode_block(block, codec)
            yield shared[id(block)]


def _encode_block(block: Pixels, codec: str) -> bytes:
    if codec == "none":
        return block.tobytes()
    if codec == "jpeg":
        return bytes(imagecodecs.jpeg8_encode(block, level=95, subsampling="444"))
    encode = imagecodecs.lzw_encode if codec == "lzw" else imagecodecs.zlib_encode
    return bytes(encode(block.tobytes()))


def _description(kind: Kind, mpp: float | None, width_px: int, height_px: int) -> bytes | None:
    if kind == "aperio":
        size = f"{width_px}x{height_px} (256x256)"
        facts = f"|AppMag = 20|MPP = {mpp:.4f}" if mpp else ""
        return f"Aperio Image Library v11.2.1\n{size} RGB{facts}".encode()
    if kind == "ome":
        sizes = f'PhysicalSizeX="{mpp}" PhysicalSizeY="{mpp}"' if mpp else ""
        return (
            '<?xml version="1.0" encoding="UTF-8"?>'
            '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
            '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" '
            f'SizeX="{width_px}" SizeY="{height_px}" SizeC="3" SizeZ="1" SizeT="1" {sizes}>'
            '<Channel ID="Channel:0:0" SamplesPerPixel="3"/><TiffData IFD="0" PlaneCount="1"/>'
            "</Pixels></Image></OME>"
        ).encode()
    return json.dumps({"made_by": "tests"}).encode()
