"""Verb `translate`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wsi_stain.verbs.options import (
    PATH,
    GroupedCommand,
    json_option,
    plan_options,
    quiet_option,
    settle,
    show_facts,
    solver_options,
)

if TYPE_CHECKING:
    from wsi_stain.config import RunConfig

__all__ = ["refuse_unused", "translate"]


@click.command(cls=GroupedCommand)
@click.argument("slide", type=PATH)
@click.option("--out", type=PATH, default=Path(), help="Output folder [default: here].")
@plan_options
@click.option("--seed", type=int, help="Seed of the noise; same seed, same picture.")
@solver_options
@click.option("--unguided", is_flag=True, help="Leave the guidance out (ablation).")
@click.option("--method", "stain__method", help="Color fit: macenko, reinhard or vahadane.")
@click.option("--batch", "sample__batch_tiles", type=int, help="Tiles per batch; 0: 4, on CUDA 64.")
@click.option(
    "--format",
    "write__format",
    type=click.Choice(["ome-tiff", "ome-zarr"]),
    help="Output; ome-zarr is lossless and larger.",
)
@click.option("--quality", "write__quality", type=int, help="JPEG quality.")
@click.option("--subsampling", "write__subsampling", help="JPEG chroma, 4:2:0 or 4:4:4.")
@click.option("--lossless", "write__lossless", is_flag=True, default=None, help="LZW, no JPEG.")
@click.option(
    "--overwrite", "write__overwrite", is_flag=True, default=None, help="Replace the output."
)
@click.option("--keep-store", is_flag=True, help="Keep the patch store after the run.")
@click.option("--no-report", is_flag=True, help="Leave out the HTML page of the run.")
@quiet_option
@json_option
def translate(**options: Any) -> None:
    """Translate a slide into a virtual IHC pyramid.

    \b
    wsi-stain translate slide.svs
    wsi-stain translate slide.svs --out results --mpp 0.25 --overwrite
    wsi-stain translate slide.svs --seeds 4
    wsi-stain translate slide.svs --format ome-zarr --workers 1

    Stopped runs go on where they stopped: type the same command again.
    """
    from wsi_stain.cluster import begin_early, share_heaps

    slide, out = options.pop("slide"), options.pop("out")
    quiet, as_json = options.pop("quiet"), options.pop("as_json")
    keep_store, unguided = options.pop("keep_store"), options.pop("unguided")
    no_report = options.pop("no_report")
    options["sample__guided"] = False if unguided else None
    config, origins = settle(options)
    refuse_unused(config, origins)
    share_heaps()
    # Workers import torch and Dask while this process imports, reads the slide and plans.
    with begin_early(config.cluster):
        facts = _work(
            slide, out, config, origins, quiet or as_json, keep_store=keep_store, page=not no_report
        )
    if as_json:
        show_facts(facts, as_json)
    else:
        from wsi_stain.console import print_summary

        print_summary(facts)


def _work(
    slide: Path,
    out: Path,
    config: RunConfig,
    origins: Mapping[str, str],
    quiet: bool,
    *,
    keep_store: bool,
    page: bool,
) -> dict[str, Any]:
    """Plan, translate, write the page; give the summary."""
    from wsi_stain.console import ProgressDisplay
    from wsi_stain.planning import plan_slide

    with ProgressDisplay(quiet=quiet) as display:
        plan = plan_slide(slide, config, display)
        from wsi_stain.evaluate.report import write_report
        from wsi_stain.pipeline import translate_planned

        result = translate_planned(
            plan, out, config, origins=origins, listener=display, keep_store=keep_store
        )
        facts = result.facts()
        if page:
            written = write_report(result.files.folder, is_fresh=True, listener=display)
            facts["report"] = str(written)
    return facts


def refuse_unused(config: RunConfig, origins: Mapping[str, str]) -> None:
    """Refuse flags that the chosen format has no use for: they would promise something."""
    from wsi_stain.errors import ConfigError

    unused = [name for name in ("quality", "subsampling", "lossless") if f"write.{name}" in origins]
    flags = [name for name in unused if origins[f"write.{name}"] == "flag"]
    if "lossless" in flags and flags[0] != "lossless":
        raise ConfigError(
            f"--lossless keeps every pixel: --{flags[0]} is for JPEG.",
            hint="Leave one of them out.",
        )
    if config.write.format == "ome-zarr" and unused:
        raise ConfigError(
            f"OME-Zarr is always lossless: --{unused[0]} is for OME-TIFF.",
            hint="Leave it out, or choose --format ome-tiff.",
        )
