"""Verb `info`."""

from __future__ import annotations

from pathlib import Path

import click

from wsi_stain.verbs.options import PATH, json_option, show_facts

__all__ = ["info"]


@click.command()
@click.argument("slide", type=PATH)
@click.option("--mpp", type=float, help="Pixel size of the slide, um/px.")
@json_option
def info(slide: Path, mpp: float | None, as_json: bool) -> None:
    """Show size, pixel size and levels of a slide.

    \b
    wsi-stain info slide.svs
    """
    from wsi_stain.planning import slide_facts
    from wsi_stain.slides.image import SlideSource

    with SlideSource.open(slide, mpp=mpp) as source:
        levels = [f"{level.size} (1/{level.downsample:.4g})" for level in source.levels]
        facts = {**slide_facts(source), "levels": ", ".join(levels), "notes": list(source.notes)}
        show_facts(facts, as_json)
