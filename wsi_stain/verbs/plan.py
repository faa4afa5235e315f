"""Verb `plan`."""

from __future__ import annotations

from typing import Any

import click

from wsi_stain.verbs.options import PATH, json_option, plan_options, settle, show_facts

__all__ = ["plan"]


@click.command()
@click.argument("slide", type=PATH)
@plan_options
@json_option
def plan(**options: Any) -> None:
    """Show what `translate` would do: tissue, tiles, memory, disk, time. Seconds, no GPU."""
    from wsi_stain.planning import plan_slide

    slide, as_json = options.pop("slide"), options.pop("as_json")
    config, _ = settle(options)
    planned = plan_slide(slide, config)
    with planned.source:
        show_facts(planned.facts(), as_json)
