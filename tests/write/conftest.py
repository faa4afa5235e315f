"""Pyramids that the tests of room 4 write and break."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from wsi_stain.config import WriteConfig
from wsi_stain.geometry import Size
from wsi_stain.write.tiff import PyramidFacts, write_pyramid

Pixels = npt.NDArray[np.uint8]
WritePixels = Callable[..., PyramidFacts]


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
