"""Verb `quantify`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from wsi_stain.verbs.options import PATH, json_option, quiet_option, show_facts

__all__ = ["quantify"]


@click.command()
@click.argument("picture", type=PATH)
@click.option("--out", type=PATH, help="Output folder [default: <name>_quantify beside it].")
@click.option("--mpp", type=float, help="Pixel size of the picture, um/px.")
@click.option("--positive-od", type=float, help="DAB OD (log10) above which is positive.")
@click.option("--tile-um", type=float, help="Side of a tile of the heat map, um.")
@click.option("--hot-spot-mm2", type=float, help="Size of the hot spot, mm2.")
@quiet_option
@json_option
def quantify(
    picture: Path, out: Path | None, mpp: float | None, quiet: bool, as_json: bool, **options: Any
) -> None:
    """Measure the stain of a picture, virtual or real.

    Positive area, IOD, labelling index by nucleus, hot spot, heat map; as JSON, CSV and GeoJSON.

    \b
    wsi-stain quantify slide_ki67.ome.tiff
    wsi-stain quantify real_ki67.svs --out numbers --json
    """
    from wsi_stain.config import QuantifyConfig
    from wsi_stain.config.decode import decode_flags
    from wsi_stain.console import ProgressDisplay
    from wsi_stain.evaluate.quantify_files import quantify as run

    config = decode_flags(options, QuantifyConfig)
    with ProgressDisplay(quiet=quiet or as_json) as display:
        numbers, folder = run(picture, out, mpp=mpp, config=config, listener=display)
    facts = numbers.full() if as_json else numbers.facts()
    show_facts({**facts, "folder": str(folder)}, as_json)
