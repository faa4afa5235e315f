"""Verb `validate`."""

from __future__ import annotations

from pathlib import Path

import click

from wsi_stain.verbs.options import PATH, json_option, show_facts

__all__ = ["validate"]


@click.command()
@click.argument("tiff", type=PATH)
@json_option
def validate(tiff: Path, as_json: bool) -> None:
    """Check that a pyramid is sound: levels, pixel size, tiles, metadata. Exit 8 when not."""
    from wsi_stain.errors import OutputError
    from wsi_stain.write.validate import validate as check

    found = check(tiff)
    facts = {"file": str(tiff), "ok": found.ok, "problems": list(found.problems), **found.facts}
    show_facts(facts, as_json)
    if not found.ok:
        raise OutputError(
            f"{tiff} is not sound: {'; '.join(found.problems)}.",
            hint="Run wsi-stain translate again with --overwrite.",
        )
