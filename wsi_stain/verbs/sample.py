"""Verb `sample`."""

from __future__ import annotations

from pathlib import Path

import click

from wsi_stain.verbs.options import PATH

__all__ = ["sample"]


@click.command()
@click.argument("directory", type=PATH, default=Path())
@click.option("--from", "from_file", type=PATH, help="Take the slide from this file (offline).")
def sample(directory: Path, from_file: Path | None) -> None:
    """Fetch a small real H&E slide to try things on.

    CMU-1-Small-Region.svs, 2220 x 2967 px, CC0, 2 MB.

    \b
    wsi-stain sample demo
    """
    from wsi_stain.slides.sample import fetch_sample

    click.echo(str(fetch_sample(directory, from_file=from_file)))
