"""Verb `evaluate`."""

from __future__ import annotations

from pathlib import Path

import click

from wsi_stain.verbs.options import PATH, quiet_option

__all__ = ["evaluate"]


@click.command()
@click.option("--recipe", type=PATH, required=True, help="TOML file; see pipelines/evaluate/.")
@click.option("--out", type=PATH, required=True, help="Folder for results, tables, pictures.")
@click.option("--bundle", help="Model: a shipped name or a folder; beats the recipe.")
@quiet_option
def evaluate(recipe: Path, out: Path, bundle: str | None, quiet: bool) -> None:
    """Judge variants of a model beside null rows.

    On H&E images and pairs; goes on where it stopped.

    \b
    wsi-stain evaluate --recipe pipelines/evaluate/quick.toml --out results
    """
    from wsi_stain.console import ProgressDisplay
    from wsi_stain.evaluate.judge import evaluate as judge

    with ProgressDisplay(quiet=quiet) as display:
        table = judge(recipe, out, bundle=bundle, listener=display)
    click.echo(str(table))
