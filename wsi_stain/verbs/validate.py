"""Verb `validate`."""

from __future__ import annotations

from pathlib import Path

import click

from wsi_stain.verbs.options import PATH, json_option, show_facts

__all__ = ["validate"]


@click.command()
@click.argument("pyramid", type=PATH)
@json_option
def validate(pyramid: Path, as_json: bool) -> None:
    """Check that a pyramid is sound.

    Levels, pixel size, tiles, metadata, some pixels; exit code 8 when something is wrong.

    \b
    wsi-stain validate slide_ki67.ome.tiff
    wsi-stain validate slide_ki67.ome.zarr --json
    """
    from wsi_stain.errors import OutputError
    from wsi_stain.write.validate import validate as check

    found = check(pyramid)
    facts = {"file": str(pyramid), "ok": found.ok, "problems": list(found.problems), **found.facts}
    show_facts(facts, as_json)
    if not found.ok:
        raise OutputError(
            f"{pyramid} is not sound: {'; '.join(found.problems)}.",
            hint="Run wsi-stain translate again with --overwrite.",
        )
