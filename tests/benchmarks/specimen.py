"""What the benchmarks work on: a picture of tissue, and slides made of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile

__all__ = ["GLASS", "dense_tissue", "tissue_picture", "write_svs"]

Pixels = npt.NDArray[np.uint8]

GLASS = (243, 243, 244)
REAL = Path(__file__).resolve().parents[2] / "../shared/data/slides/CMU-1-Small-Region.svs"
TILE_PX = 256


@functools.cache
def _base() -> tuple[str, Pixels]:
    if REAL.is_file():
        return "CMU-1-Small-Region, mirrored", np.asarray(tifffile.imread(REAL, key=0))
    return "drawn", _drawn()


def tissue_picture(width_px: int, height_px: int) -> tuple[str, Pixels]:
    """Give a picture and its name: real tissue where it lies beside the checkout, else drawn.

    It is repeated with mirrored copies, so that no seam shows.
    """
    name, base = _base()
    return name, _repeated(base, width_px, height_px)


def dense_tissue(width_px: int, height_px: int) -> Pixels:
    """Give a picture that is tissue all over."""
    _, base = _base()
    return _repeated(base[1024:1536, 512:1536], width_px, height_px)


def _repeated(base: Pixels, width_px: int, height_px: int) -> Pixels:
    double = np.concatenate([base, base[:, ::-1]], axis=1)
    quad = np.concatenate([double, double[::-1]], axis=0)
    repeats = (-(-height_px // quad.shape[0]), -(-width_px // quad.shape[1]), 1)
    return np.ascontiguousarray(np.tile(quad, repeats)[:height_px, :width_px])


def _drawn() -> Pixels:
    rng = np.random.default_rng(0)
    texture = cv2.GaussianBlur(rng.normal(0.0, 1.0, (2048, 2048, 2)), (0, 0), 3)
    density = np.clip(0.5 + texture * [4.0, 3.0], 0.1, 2.0)
    density[:1024] = 0.0
    od = density @ np.array([[0.651, 0.701, 0.290], [0.216, 0.801, 0.558]])
    pixels: Pixels = np.rint(np.array(GLASS) * np.exp(-od)).astype(np.uint8)
    return pixels


def write_svs(path: Path, block: Pixels, width_px: int, height_px: int, *, gap: bool) -> Path:
    """Write a slide of 0.5 um/px with the layout of an Aperio SVS: 256 px tiles, JPEG 90, 4:2:0.

    Parameters
    ----------
    block
        uint8 (h, w, 3), sides multiples of 256 px. It is repeated over the slide, and each of its
        tiles is encoded once: a huge slide is cheap.
    gap
        Leave the last tile out, as Aperio sometimes does: then the slide is read by OpenSlide.
    """
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        tiff.write(
            _tiles(block, -(-width_px // TILE_PX), -(-height_px // TILE_PX), gap=gap),
            shape=(height_px, width_px, 3),
            dtype=np.uint8,
            tile=(TILE_PX, TILE_PX),
            photometric="ycbcr",
            subsampling=(2, 2),
            compression="jpeg",
            description=f"Aperio Image Library\n{width_px}x{height_px} (256x256)|MPP = 0.5000",
            metadata=None,
        )
    return path


def _tiles(block: Pixels, across: int, down: int, *, gap: bool) -> Iterator[bytes]:
    rows, columns = block.shape[0] // TILE_PX, block.shape[1] // TILE_PX

    @functools.cache
    def encoded(row: int, column: int) -> bytes:
        ys = slice(row * TILE_PX, (row + 1) * TILE_PX)
        tile = np.ascontiguousarray(block[ys, column * TILE_PX : (column + 1) * TILE_PX])
        return bytes(imagecodecs.jpeg8_encode(tile, level=90, subsampling="420"))

    places = [(row, column) for row in range(down) for column in range(across)]
    for row, column in places[:-1]:
        yield encoded(row % rows, column % columns)
    yield b"" if gap else encoded(places[-1][0] % rows, places[-1][1] % columns)
