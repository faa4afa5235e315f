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
@click.option("--samples", type=click.IntRange(min=1), help="Budget in samples; beats the recipe.")
@click.option("--threads", type=click.IntRange(min=0), help="CPU threads; 0: all cores.")
@click.option(
    "--measure",
    is_flag=True,
    help="Train nothing; measure the run's net, or the bundle's: memorization (score), "
    "information by noise level (mine).",
)
@quiet_option
def train(  # noqa: PLR0913 - one parameter per flag
    stage: str,
    recipe: Path,
    run: Path,
    bundle: Path | None,
    samples: int | None,
    threads: int | None,
    measure: bool,
    quiet: bool,
) -> None:
    """Train one stage of a bundle.

    Goes on from the checkpoint in the run folder.

    \b
    wsi-stain train score --recipe pipelines/train/1-score.toml --run .runs/score --bundle my-ki67
    wsi-stain train score --recipe pipelines/train/1-score.toml --run .runs/score --measure
    torchrun --nproc-per-node 4 -m wsi_stain train score ...    one process per CUDA device
    """
    from wsi_stain.console import ProgressDisplay
    from wsi_stain.train.measure import measure_stage
    from wsi_stain.train.run import read_recipe, train_stage

    with ProgressDisplay(quiet=quiet) as display:
        if measure:
            folder = str(bundle.resolve()) if bundle else None  # never a shipped one of that name
            measure_stage(read_recipe(stage, recipe), run, folder, display)
            return
        train_stage(stage, recipe, run, bundle, display, samples=samples, threads=threads)
