"""Normalize the H&E color of one patch: python examples/normalize_patch.py slide.svs patch.png."""

import sys

import numpy as np
from PIL import Image

from wsi_stain import SlideSource
from wsi_stain.bundles import find_bundle, read_spec
from wsi_stain.geometry import Region, Scale
from wsi_stain.stain.density import is_stained
from wsi_stain.stain.normalize import fit_stain
from wsi_stain.stain.white import estimate_white


def main(slide: str, out: str, side_px: int = 512) -> None:
    """Fit the stains on the whole slide, once; then change one patch from its middle."""
    reference = read_spec(find_bundle("ki67")).color
    with SlideSource.open(slide) as source:
        white = estimate_white(source.thumbnail(mpp=8.0), source.background).rgb
        # Of sharp pixels: in a smaller picture nuclei and stroma melt into one color.
        pixels = source.thumbnail(mpp=1.0)
        transform = fit_stain(pixels[is_stained(pixels, white)], white, reference)
        width_px, height_px = source.size_l0
        middle = Region((width_px - side_px) // 2, (height_px - side_px) // 2, side_px, side_px)
        patch = source.read_out(middle, Scale(1.0, source.mpp_l0, source.size_l0))
    normal = transform.apply(patch)  # uint8 in, uint8 out, same shape
    Image.fromarray(np.hstack([patch, normal])).save(out)
    print(*transform.notes, sep="\n", end="\n" if transform.notes else "")
    print("stains (OD):", *[np.round(vector, 2).tolist() for vector in transform.stain_od])


if __name__ == "__main__":
    main(*sys.argv[1:3])
