"""Verb `report`."""

from __future__ import annotations

from pathlib import Path

import click

from wsi_stain.verbs.options import PATH

__all__ = ["report"]


@click.command()
@click.argument("run", type=PATH)
@click.option("--slide", type=PATH, help="The H&E slide, where the run kept no pictures of it.")
@click.option("--open", "show", is_flag=True, help="Open the page in the browser.")
def report(run: Path, slide: Path | None, show: bool) -> None:
    """Write the HTML page of a run.

    H&E beside virtual IHC, numbers, provenance; opens from disk.

    \b
    wsi-stain report slide_ki67.run --open
    """
    from wsi_stain.evaluate.report import write_report

    page = write_report(run, slide=slide)
    click.echo(str(page))
    if show:
        click.launch(page.absolute().as_uri())
