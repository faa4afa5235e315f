"""Show what a slide would cost, without doing it: python examples/plan_only.py slide.svs."""

import sys
from pathlib import Path

from wsi_stain import RunConfig, plan_slide


def main(slide: str) -> None:
    """Open the slide, find tissue, plan the tiles."""
    plan = plan_slide(Path(slide), RunConfig())
    with plan.source:
        print(f"{plan.grid.n_tiles} tiles in {plan.grid.n_shards} shards")
        print(f"{plan.mask.tissue_fraction:.0%} tissue, {plan.projection.seconds / 60:.1f} minutes")


if __name__ == "__main__":
    main(*sys.argv[1:])
