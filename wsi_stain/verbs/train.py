"""Verb `train`."""

from __future__ import annotations

from pathlib import Path

import click

from wsi_stain.verbs.options import PATH, quiet_option

__all__ = ["train"]


@click.command()
@click.argument("stage", type=click.Choice(["score", "mine", "refine"]))
@click.option("--recipe", type=PATH, required=True, help="TOML file; see pipelines/train/.")
@click.option("--run", type=PATH, required=True, help="Run folder: checkpoint and log.")
@click.option("--bundle", type=PATH, help="Write the averaged weights into this bundle folder.")
@click.option("--samples", type=int, help="Budget in samples; beats the recipe.")
@click.option("--threads", type=int, help="CPU threads; 0: all cores.")
@quiet_option
def train(
    stage: str,
    recipe: Path,
    run: Path,
    bundle: Path | None,
    samples: int | None,
    threads: int | None,
    quiet: bool,
) -> None:
    """Train one stage of a bundle; goes on from the checkpoint in the run folder.

    \b
    wsi-stain train score --recipe pipelines/train/1-score.toml --run .runs/score --bundle my-ki67
    """
    from wsi_stain.console import ProgressDisplay
    from wsi_stain.train.run import train_stage

    with ProgressDisplay(quiet=quiet) as display:
        train_stage(stage, recipe, run, bundle, display, samples=samples, threads=threads)
