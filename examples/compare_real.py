"""Compare virtual with real IHC: python examples/compare_real.py virtual.ome.tiff real.svs."""

import sys

import numpy as np

from wsi_stain import SlideSource
from wsi_stain.evaluate.metrics_nuclei import labelling_index
from wsi_stain.evaluate.metrics_stain import POSITIVE_OD, dab_p90
from wsi_stain.geometry import Region, choose_scale
from wsi_stain.stain.density import dab_od
from wsi_stain.stain.white import estimate_white

MPP, SIDE_PX = 0.5, 1024  # the same pixel size and field for both


def measure(path: str) -> tuple[float, float, float]:
    """Brown area %, labelling index %, DAB OD (90th percentile) of the middle of a slide."""
    with SlideSource.open(path) as slide:
        white = estimate_white(slide.thumbnail(8.0), slide.background).rgb
        scale = choose_scale(slide.size_l0, slide.mpp_l0, MPP, 0.1)
        size = scale.size_out
        left, top = max(0, (size.width_px - SIDE_PX) // 2), max(0, (size.height_px - SIDE_PX) // 2)
        middle = Region(left, top, SIDE_PX, SIDE_PX).intersect(Region(0, 0, *size))
        rgb = slide.read_out(middle, scale)
    index = labelling_index(rgb, scale.mpp_out, POSITIVE_OD, white)
    return 100 * float(np.mean(dab_od(rgb) > POSITIVE_OD)), index.percent or 0.0, dab_p90(rgb)


def main(*paths: str) -> None:
    """Print one row per slide. Two sections never match nucleus by nucleus: compare areas."""
    print(f"{'':>24} brown area %  labelling %  DAB OD p90")
    for path in paths:
        area, labelled, p90 = measure(path)
        print(f"{path[-24:]:>24} {area:12.2f} {labelled:12.1f} {p90:11.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
