"""Translate a picture that you hold as an array: python examples/translate_array.py he.png ihc.png.

The array becomes a small slide, so that tiling, color fit and checks are those of any slide.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from wsi_stain import RunConfig, SlideSource, translate_slide, write_pyramid
from wsi_stain.config import ClusterConfig, WriteConfig
from wsi_stain.geometry import Size


def translate_array(he: np.ndarray, mpp: float, config: RunConfig) -> np.ndarray:
    """H&E uint8 (h, w, 3) of `mpp` um/px -> virtual IHC uint8 (h', w', 3), about 0.5 um/px."""
    with tempfile.TemporaryDirectory() as folder:
        slide, size = Path(folder, "he.ome.tiff"), Size(he.shape[1], he.shape[0])
        write_pyramid(slide, size, [he], mpp, WriteConfig(lossless=True), name="he")
        result = translate_slide(slide, Path(folder), config)
        with SlideSource.open(result.files.output) as ihc:
            return ihc.thumbnail(ihc.mpp_l0)  # its largest level, whole


def main(he: str, out: str, bundle: str = "ki67", mpp: float = 0.5) -> None:
    """Translate an image file of 0.5 um/px (a 20x scan)."""
    pixels = np.asarray(Image.open(he).convert("RGB"))
    here = ClusterConfig(executor="serial")  # no worker processes for a small picture
    ihc = translate_array(pixels, mpp, RunConfig(bundle=bundle, cluster=here))
    Image.fromarray(ihc).save(out)
    print(ihc.shape)


if __name__ == "__main__":
    main(*sys.argv[1:4])
