"""Write a pyramid from your own array: python examples/write_pyramid.py picture.ome.tiff."""

import sys
from pathlib import Path

import numpy as np

from wsi_stain import write_pyramid
from wsi_stain.config import WriteConfig
from wsi_stain.geometry import Size


def main(out: str) -> None:
    """Write a colored ramp of 3000 x 2000 px at 0.5 um/px, in bands of 500 rows."""
    ys, xs = np.mgrid[0:2000, 0:3000]
    picture = np.stack([xs % 256, ys % 256, (xs + ys) % 256], axis=-1).astype(np.uint8)
    bands = (picture[top : top + 500] for top in range(0, 2000, 500))
    facts = write_pyramid(Path(out), Size(3000, 2000), bands, 0.5, WriteConfig(), name="ramp")
    print(*[f"{level.width_px} x {level.height_px}" for level in facts.levels], sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
