"""Write docs/cli.md from the verbs themselves: `make docs`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from wsi_stain.cli import SECTIONS, cli

PAGE = Path(__file__).with_name("cli.md")
WIDTH = 100
HEAD = """# Command line

Made from the code by `make docs`; a test compares. Exit codes and messages are in the README.
"""


def reference() -> str:
    """Give the page: the list of verbs, then the help of each under its heading."""
    parts = [HEAD, _block(cli, "wsi-stain")]
    for heading, names in SECTIONS.items():
        parts.append(f"## {heading}\n")
        for name in names:
            command = cli.get_command(click.Context(cli), name)
            if command is not None:
                parts += [f"### wsi-stain {name}\n", _block(command, f"wsi-stain {name}")]
    return "\n".join(parts)


def _block(command: click.Command, name: str) -> str:
    context = click.Context(command, info_name=name, terminal_width=WIDTH, max_content_width=WIDTH)
    context.help_option_names = ["-h", "--help"]
    lines = [line.rstrip() for line in command.get_help(context).splitlines()]
    return "\n".join(["```", *lines, "```", ""])


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")
