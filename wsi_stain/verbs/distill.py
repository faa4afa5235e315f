"""Verb `distill`."""

from __future__ import annotations

from pathlib import Path

import click

from wsi_stain.verbs.options import PATH, quiet_option

__all__ = ["distill"]


@click.command()
@click.option("--recipe", type=PATH, required=True, help="TOML file; see pipelines/train/.")
@click.option("--run", type=PATH, required=True, help="Run folder: pairs, checkpoint, log.")
@click.option("--bundle", type=PATH, required=True, help="Bundle folder that gets the student.")
@click.option("--samples", type=click.IntRange(min=1), help="Budget in samples; beats the recipe.")
@click.option("--threads", type=click.IntRange(min=0), help="CPU threads; 0: all cores.")
@quiet_option
def distill(
    recipe: Path, run: Path, bundle: Path, samples: int | None, threads: int | None, quiet: bool
) -> None:
    """Teach a bundle a student of 1 to 4 steps.

    Goes on from the pairs and the checkpoint in the run folder.

    \b
    wsi-stain distill --recipe pipelines/train/4-distill.toml --run .runs/student --bundle my-ki67
    """
    from wsi_stain.console import ProgressDisplay
    from wsi_stain.train.distill import distill_bundle

    with ProgressDisplay(quiet=quiet) as display:
        distill_bundle(recipe, run, bundle, display, samples=samples, threads=threads)
