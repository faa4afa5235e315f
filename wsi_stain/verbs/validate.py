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
    seen = {name: value for name, value in found.facts.items() if name != "path"}
    facts = {"file": str(pyramid), "ok": found.ok, "problems": list(found.problems), **seen}
    if as_json or found.ok:
        show_facts(facts, as_json)
    if not found.ok:
        raise OutputError(
            f"{pyramid} is not sound: {'; '.join(found.problems)}.",
            hint=_remedy(pyramid, is_pyramid="levels" in seen),
        )


def _remedy(pyramid: Path, *, is_pyramid: bool) -> str:
    """Say what to do; levels are among the facts of whatever could be opened as a pyramid."""
    from wsi_stain.layout import is_output

    if not is_pyramid:
        return "Give a pyramid: an .ome.tiff file or an .ome.zarr folder."
    if is_output(pyramid):
        return "Run wsi-stain translate again with --overwrite."
    return "A pyramid of translate is what these rules are for; wsi-stain info shows any slide."
