"""The command line: every verb, flag, help text and exit code. No logic, numpy or torch.

In: arguments. Out: text, files, an exit code. Not here: decisions about slides or models.

Exit codes: 0 ok, 1 a bug, 2 usage, 3 slide, 4 no tissue, 5 plan refused, 6 bundle, 7 device or
cluster, 8 output, 9 batch finished with failures, 130 interrupted.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from wsi_stain import __version__
from wsi_stain.errors import WsiStainError

__all__ = ["cli", "main"]

F = TypeVar("F", bound=Callable[..., Any])
SLIDE = click.Path(path_type=Path)

SECTIONS = {
    "One slide": ["translate", "plan", "info", "validate", "report"],
    "Start here": ["sample", "doctor"],
    "Models": ["train", "evaluate"],
}


class SectionedGroup(click.Group):
    """Lists the verbs under headings, in the order of use."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the headings and their verbs."""
        for heading, names in SECTIONS.items():
            rows = [(n, self.commands[n].get_short_help_str(60)) for n in names]
            with formatter.section(heading):
                formatter.write_dl(rows)


def _show_versions(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from wsi_stain.doctor import package_versions

    for name, version in package_versions().items():
        click.echo(f"{name} {version}")
    ctx.exit()


@click.group(cls=SectionedGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="wsi-stain")
@click.option(
    "--versions",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_versions,
    help="Versions of all packages that touch pixels.",
)
def cli() -> None:
    """Turn H&E whole slides into virtual IHC pyramids. Research use only.

    \b
    wsi-stain sample demo             a small real slide to try
    wsi-stain translate demo/CMU-1-Small-Region.svs
    """


def _with(options: list[Callable[[F], F]]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


plan_options = _with(
    [
        click.option("--mpp", "slide__mpp", type=float, help="Pixel size of the slide, um/px."),
        click.option("--bundle", "bundle", help="Model: a shipped name or a folder."),
        click.option("--recipe", type=SLIDE, help="TOML file with settings; flags beat it."),
        click.option("--overlap-px", "tiles__overlap_px", type=int, help="Overlap of tiles, px."),
        click.option(
            "--tissue-min-fraction",
            "tiles__tissue_min_fraction",
            type=float,
            help="Least share of tissue in a tile; 0 keeps all.",
        ),
        click.option(
            "--shard-tiles", "tiles__shard_tiles", type=int, help="Tiles per task; 0: by size."
        ),
        click.option("--device", "cluster__device", help="auto, cuda or cpu."),
        click.option("--workers", "cluster__workers", type=int, help="0: one per device or core."),
    ]
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
quiet_option = click.option("--quiet", is_flag=True, help="Show errors only.")


@cli.command()
@click.argument("slide", type=SLIDE)
@click.option("--out", type=SLIDE, default=Path(), help="Output folder [default: here].")
@plan_options
@click.option("--seed", type=int, help="Seed of the noise; same seed, same picture.")
@click.option("--solver", "sample__solver", help="solver (few steps) or teacher (300 steps).")
@click.option("--steps", "sample__steps", type=int, help="Steps of the solver.")
@click.option("--unguided", is_flag=True, help="Leave the guidance out (ablation).")
@click.option("--method", "stain__method", help="Color fit: macenko, reinhard or vahadane.")
@click.option("--batch", "sample__batch_tiles", type=int, help="Tiles per batch.")
@click.option("--quality", "write__quality", type=int, help="JPEG quality.")
@click.option("--subsampling", "write__subsampling", help="JPEG chroma, 4:2:0 or 4:4:4.")
@click.option("--lossless", "write__lossless", is_flag=True, default=None, help="LZW, no JPEG.")
@click.option(
    "--overwrite", "write__overwrite", is_flag=True, default=None, help="Replace the output."
)
@click.option("--keep-store", is_flag=True, help="Keep the patch store after the run.")
@quiet_option
@json_option
def translate(**options: Any) -> None:
    """Translate a slide into a virtual IHC pyramid (OME-TIFF).

    \b
    wsi-stain translate slide.svs
    wsi-stain translate slide.svs --out results --mpp 0.25 --overwrite

    Stopped runs go on where they stopped: type the same command again.
    """
    from wsi_stain.console import ProgressDisplay, print_facts
    from wsi_stain.pipeline import translate_slide

    slide, out = options.pop("slide"), options.pop("out")
    quiet, as_json = options.pop("quiet"), options.pop("as_json")
    keep_store, unguided = options.pop("keep_store"), options.pop("unguided")
    options["sample__guided"] = False if unguided else None
    config, origins = _settle(options)
    with ProgressDisplay(quiet=quiet or as_json) as display:
        result = translate_slide(
            slide, out, config, origins=origins, listener=display, keep_store=keep_store
        )
    _print(result.facts(), as_json, print_facts)


@cli.command()
@click.argument("slide", type=SLIDE)
@plan_options
@json_option
def plan(**options: Any) -> None:
    """Show what `translate` would do: tissue, tiles, memory, disk, time. Seconds, no GPU."""
    from wsi_stain.console import print_facts
    from wsi_stain.planning import plan_slide

    slide, as_json = options.pop("slide"), options.pop("as_json")
    config, _ = _settle(options)
    planned = plan_slide(slide, config)
    with planned.source:
        _print(planned.facts(), as_json, print_facts)


@cli.command()
@click.argument("slide", type=SLIDE)
@click.option("--mpp", type=float, help="Pixel size of the slide, um/px.")
@json_option
def info(slide: Path, mpp: float | None, as_json: bool) -> None:
    """Show size, pixel size and its origin, and levels of a slide."""
    from wsi_stain.console import print_facts
    from wsi_stain.planning import slide_facts
    from wsi_stain.slides.image import SlideSource

    with SlideSource.open(slide, mpp=mpp) as source:
        levels = [f"{level.size} (1/{level.downsample:.4g})" for level in source.levels]
        _print({**slide_facts(source), "levels": ", ".join(levels)}, as_json, print_facts)


@cli.command()
@click.argument("tiff", type=SLIDE)
@json_option
def validate(tiff: Path, as_json: bool) -> None:
    """Check that a pyramid is sound: levels, pixel size, tiles, metadata. Exit 8 when not."""
    from wsi_stain.console import print_facts
    from wsi_stain.errors import OutputError
    from wsi_stain.write.validate import validate as check

    found = check(tiff)
    facts = {"file": str(tiff), "ok": found.ok, "problems": list(found.problems), **found.facts}
    _print(facts, as_json, print_facts)
    if not found.ok:
        raise OutputError(
            f"{tiff} is not sound: {'; '.join(found.problems)}.",
            hint="Run wsi-stain translate again with --overwrite.",
        )


@cli.command()
@click.argument("run", type=SLIDE)
@click.option("--slide", type=SLIDE, help="The H&E slide, where the run kept no pictures of it.")
@click.option("--open", "show", is_flag=True, help="Open the page in the browser.")
def report(run: Path, slide: Path | None, show: bool) -> None:
    """Write the HTML page of a run: H&E beside virtual IHC, numbers, provenance."""
    from wsi_stain.evaluate.report import write_report

    page = write_report(run, slide=slide)
    click.echo(str(page))
    if show:
        click.launch(page.as_uri())


@cli.command()
@click.argument("directory", type=SLIDE, default=Path())
@click.option("--from", "from_file", type=SLIDE, help="Take the slide from this file (offline).")
def sample(directory: Path, from_file: Path | None) -> None:
    """Fetch a small real H&E slide (CMU-1-Small-Region.svs, CC0, 2 MB) to try things on."""
    from wsi_stain.slides.sample import fetch_sample

    click.echo(str(fetch_sample(directory, from_file=from_file)))


@cli.command()
@json_option
def doctor(as_json: bool) -> None:
    """Say what this machine can do, what is wrong with it, and what to do about it."""
    from wsi_stain.console import print_facts
    from wsi_stain.doctor import examine

    facts = examine()
    if not as_json:
        del facts["versions"]  # wsi-stain --versions lists them
    _print(facts, as_json, print_facts)


@cli.command()
@click.argument("stage", type=click.Choice(["score", "mine", "refine"]))
@click.option("--recipe", type=SLIDE, required=True, help="TOML file; see pipelines/train/.")
@click.option("--run", type=SLIDE, required=True, help="Run folder: checkpoint and log.")
@click.option("--bundle", type=SLIDE, help="Write the averaged weights into this bundle folder.")
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


@cli.command()
@click.option("--recipe", type=SLIDE, required=True, help="TOML file; see pipelines/evaluate/.")
@click.option("--out", type=SLIDE, required=True, help="Folder for results, tables, pictures.")
@click.option("--bundle", help="Model: a shipped name or a folder; beats the recipe.")
@quiet_option
def evaluate(recipe: Path, out: Path, bundle: str | None, quiet: bool) -> None:
    """Judge variants of a model on H&E images and pairs; goes on where it stopped.

    \b
    wsi-stain evaluate --recipe pipelines/evaluate/quick.toml --out results
    """
    from wsi_stain.console import ProgressDisplay
    from wsi_stain.evaluate.judge import evaluate as judge

    with ProgressDisplay(quiet=quiet) as display:
        table = judge(recipe, out, bundle=bundle, listener=display)
    click.echo(str(table))


def _settle(options: dict[str, Any]) -> tuple[Any, dict[str, str]]:
    from wsi_stain.config import resolve_run_config

    recipe = options.pop("recipe")
    # A flag's name in Python is its place in the settings: write__quality is write.quality.
    flags = {name.replace("__", "."): value for name, value in options.items()}
    return resolve_run_config(flags, recipe)


def _print(facts: dict[str, Any], as_json: bool, print_facts: Callable[[Any], None]) -> None:
    if as_json:
        import json

        # Not msgspec: a path that is no UTF-8 has a JSON form here, and none there.
        click.echo(json.dumps(facts, indent=2))
        return
    print_facts(facts.items())


def main() -> None:
    """Run the command line; errors made on purpose become one line and a documented code."""
    for stream in (sys.stdout, sys.stderr):
        # Paths may hold bytes that no terminal can show: they come as escapes, not as a crash.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        cli(prog_name="wsi-stain", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("wsi-stain: interrupted; the same command goes on from here.", err=True)
        sys.exit(130)
    except MemoryError:
        click.echo("wsi-stain: out of memory. Try fewer workers: --workers 1", err=True)
        sys.exit(5)
    except WsiStainError as error:
        line = " ".join(str(error).split())
        click.echo(f"wsi-stain: {line}", err=True)
        sys.exit(error.exit_code)
