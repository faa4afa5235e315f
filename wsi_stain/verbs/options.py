"""Flags that several verbs share, and what becomes of them: settings, printed facts.

In: click's options. Out: decorators, a `RunConfig`, text on stdout. Not here: any verb.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

__all__ = [
    "PATH",
    "GroupedCommand",
    "json_option",
    "plan_options",
    "quiet_option",
    "settings_flags",
    "settle",
    "show_facts",
    "solver_options",
    "together",
]

F = TypeVar("F", bound=Callable[..., Any])
# What may not be read is told where it is opened: in one line, by the exit code of what it is.
PATH = click.Path(path_type=Path, readable=False)
# Heading to the settings (first part of a flag's place) and flags that stand under it.
HEADINGS = {
    "Archive": {"archive", "recursive", "dry_run", "part", "scratch"},
    "Slide and tiles": {"slide", "tiles"},
    "Model": {"bundle", "seed", "sample", "stain", "unguided"},
    "Output": {"out", "write", "keep_store", "no_report"},
    "Machine": {"cluster"},
}


class GroupedCommand(click.Command):
    """A verb with many flags: `--help` lists them by what they are about."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section per heading; what belongs under none comes last."""
        sections: dict[str, list[tuple[str, str]]] = {**{name: [] for name in HEADINGS}, "More": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                sections[_heading(parameter.name or "")].append(record)
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


def _heading(name: str) -> str:
    first = name.split("__")[0]
    return next((heading for heading, names in HEADINGS.items() if first in names), "More")


def together(options: list[Callable[[F], F]]) -> Callable[[F], F]:
    """Make one decorator of several options, listed in this order by --help."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


solver_options = together(
    [
        click.option(
            "--solver",
            "sample__solver",
            help="student (1 step), solver (few steps) or teacher (many); else as the bundle says.",
        ),
        click.option("--steps", "sample__steps", type=int, help="Steps of the solver."),
    ]
)

plan_options = together(
    [
        click.option("--mpp", "slide__mpp", type=float, help="Pixel size of the slide, um/px."),
        click.option(
            "--allow-missing",
            "slide__allow_missing",
            is_flag=True,
            default=None,
            help="Tiles that cannot be read become background, and are listed.",
        ),
        click.option("--bundle", "bundle", help="Model: a shipped name or a folder."),
        click.option("--recipe", type=PATH, help="TOML file with settings; flags beat it."),
        click.option(
            "--seeds",
            "sample__seeds",
            type=int,
            help="Noise seeds: K > 1 also writes the spread of the brown, at K times the cost.",
        ),
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
        click.option(
            "--workers", "cluster__workers", type=int, help="0: one per core, up to 4 per device."
        ),
        click.option(
            "--scheduler", "cluster__scheduler", help="Workers elsewhere: tls://HOST:PORT."
        ),
        click.option("--tls-ca", "cluster__tls_ca", help="Certificate of the authority, PEM."),
        click.option("--tls-cert", "cluster__tls_cert", help="Certificate of this client, PEM."),
        click.option("--tls-key", "cluster__tls_key", help="Its private key, mode 600."),
        click.option(
            "--insecure-tcp",
            "cluster__insecure_tcp",
            is_flag=True,
            default=None,
            help="Allow tcp:// to another host.",
        ),
    ]
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
quiet_option = click.option("--quiet", is_flag=True, help="Show no progress.")


def settings_flags(command: click.Command) -> list[click.Parameter]:
    """Give the flags of a verb that are settings, for another verb that takes the same."""
    others = {"bundle", "recipe", "seed"}
    return [flag for flag in command.params if "__" in (flag.name or "") or flag.name in others]


def settle(options: dict[str, Any]) -> tuple[Any, dict[str, str]]:
    """Turn flags into settings: flags beat the recipe, which beats the defaults."""
    from wsi_stain.config import resolve_run_config

    recipe = options.pop("recipe")
    if options.get("cluster__scheduler") is not None:
        options["cluster__executor"] = "address"
    # A flag's name in Python is its place in the settings: write__quality is write.quality.
    flags = {name.replace("__", "."): value for name, value in options.items()}
    return resolve_run_config(flags, recipe)


def show_facts(facts: dict[str, Any], as_json: bool) -> None:
    """Print facts on stdout: a table for people, or JSON for machines."""
    if as_json:
        import json

        # Not msgspec: a path that is no UTF-8 has a JSON form here, and none there.
        click.echo(json.dumps(facts, indent=2))
        return
    from wsi_stain.console import print_facts

    print_facts(facts.items())
