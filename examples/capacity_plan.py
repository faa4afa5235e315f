"""What an archive takes: python examples/capacity_plan.py [slides] [GPUs].

Put your own inputs in; `wsi-stain plan SLIDE` tells tiles, disk and minutes of one slide.
"""

import sys

from wsi_stain.slides.projection import OUTPUT_BYTES_PER_PX

TISSUE_MM2 = 200.0  # of a slide
SLIDE_GB = 1.0  # the file, read once
TILE_S = 25 * 1.6 * 0.0005  # steps x guidance x seconds of a step: projected, not measured
EFFICIENCY = 0.9  # share of their time in which GPUs translate
OPEN_SLIDES = 20  # at once: their patches lie on scratch until the pyramid is checked
TILE_PX, STRIDE_PX, MPP, SHARD_TILES = 256, 224, 0.5, 64


def plan(slides: int = 10_000, gpus: int = 100) -> dict[str, float]:
    """Compute days, disk and network."""
    tiles = TISSUE_MM2 / (STRIDE_PX * MPP / 1000) ** 2
    seconds = slides * tiles * TILE_S / gpus / EFFICIENCY
    patches_gb = tiles * 2 * 3 * TILE_PX**2 / 1e9  # H&E and IHC, RGB
    pyramid_gb = tiles * STRIDE_PX**2 * OUTPUT_BYTES_PER_PX / 1e9
    moved_gb = SLIDE_GB + 2 * patches_gb + pyramid_gb  # patches are written and read
    return {
        "days": seconds / 86_400,
        "GPU hours": seconds / 3600 * gpus,
        "results, TB": slides * pyramid_gb / 1000,
        "scratch, GB": OPEN_SLIDES * patches_gb,
        "network, GB/s": slides * moved_gb / seconds,
        "shards/s": slides * tiles / SHARD_TILES / seconds,
    }


if __name__ == "__main__":
    for name, value in plan(*map(int, sys.argv[1:3])).items():
        print(f"{name:14} {value:10.2f}")
