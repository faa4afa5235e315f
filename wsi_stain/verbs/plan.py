"""Verb `plan`."""

from __future__ import annotations

from typing import Any

import click

from wsi_stain.verbs.options import (
    PATH,
    GroupedCommand,
    json_option,
    plan_options,
    settle,
    show_facts,
    solver_options,
)

__all__ = ["plan"]


@click.command(cls=GroupedCommand)
@click.argument("slide", type=PATH)
@plan_options
@solver_options
@json_option
def plan(**options: Any) -> None:
    """Show what translate would do, and how long it would take.

    Tissue, tiles, memory, disk, time: in seconds, without a GPU.

    \b
    wsi-stain plan slide.svs
    wsi-stain plan slide.svs --solver student
    wsi-stain plan slide.svs --mpp 0.25 --workers 4 --json
    """
    from wsi_stain.planning import check_memory, plan_slide

    slide, as_json = options.pop("slide"), options.pop("as_json")
    config, _ = settle(options)
    planned = plan_slide(slide, config)
    with planned.source:
        show_facts(planned.facts(), as_json)
        check_memory(planned, config.cluster)
