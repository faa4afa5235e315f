"""Verb `doctor`."""

from __future__ import annotations

import click

from wsi_stain.verbs.options import json_option, show_facts

__all__ = ["doctor"]


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Say what this machine can do, what is wrong with it, and what to do about it."""
    from wsi_stain.doctor import examine

    facts = examine()
    if not as_json:
        del facts["versions"]  # wsi-stain --versions lists them
    show_facts(facts, as_json)
