"""The command line: its verbs by heading, errors as one line, exit codes. No logic.

In: arguments. Out: text, files, an exit code. Not here: the verbs themselves (`verbs`).

Exit codes: 0 ok, 1 a bug, 2 usage, 3 slide, 4 no tissue, 5 plan refused, 6 bundle, 7 device or
cluster, 8 output, 9 batch finished with failures, 130 interrupted.
"""

from __future__ import annotations

import gc
import importlib
import io
import sys

import click

from wsi_stain import __version__
from wsi_stain.errors import WsiStainError

__all__ = ["SECTIONS", "cli", "main"]

# Heading to verbs, in the order of use. Verb `x` is the command `x` of module `verbs.x`.
SECTIONS = {
    "One slide": ["translate", "plan", "info", "validate", "report", "quantify"],
    "Many slides": ["batch"],
    "Start here": ["sample", "doctor", "completion"],
    "Models": ["train", "distill", "evaluate"],
}


class SectionedGroup(click.Group):
    """Lists the verbs under headings, and loads a verb when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Give all verbs, in the order of use."""
        return [name for names in SECTIONS.values() for name in names]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load a verb; none where there is no such."""
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"wsi_stain.verbs.{cmd_name}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb that was typed; of an unknown one, say which is near."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            if not near:
                raise
            message = f"{error.message} Did you mean {near[0]}?"
            raise click.UsageError(message, ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the headings and their verbs."""
        for heading, names in SECTIONS.items():
            commands = [(name, self.get_command(ctx, name)) for name in names]
            rows = [(name, command.get_short_help_str(60)) for name, command in commands if command]
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


def main() -> None:
    """Run the command line; errors made on purpose become one line and a documented code."""
    for stream in (sys.stdout, sys.stderr):
        # Paths may hold bytes that no terminal can show: they come as escapes, not as a crash.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        cli(prog_name="wsi-stain", standalone_mode=False)
        # The system takes back all memory at once; Python would visit torch's objects before.
        gc.freeze()
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
