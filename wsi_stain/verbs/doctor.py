"""Verb `doctor`."""

from __future__ import annotations

import click

from wsi_stain.verbs.options import json_option, show_facts

__all__ = ["doctor"]


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Say what is wrong with this machine, and what to do.

    Exit code 7 when something would keep `translate` from working.

    \b
    wsi-stain doctor
    """
    from wsi_stain.doctor import examine
    from wsi_stain.errors import DeviceError

    found = examine()
    if as_json:
        show_facts(found.as_json(), as_json)
    else:
        show_facts(dict(found.facts), as_json)
        for heading, remarks in (("wrong", found.problems), ("good to know", found.advice)):
            for remark in remarks:
                click.echo(f"\n{heading}: {remark.what}\n  do: {remark.do}")
        if not found.problems:
            click.echo("\nNothing is wrong with this machine.")
    if found.problems:
        raise DeviceError(
            f"{len(found.problems)} of the checks failed: {found.problems[0].what}",
            hint=found.problems[0].do,
        )
