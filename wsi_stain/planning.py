"""Steps 1 to 4 of the road: open, find tissue, plan, project. Seconds, no torch, no GPU.

In: a slide's path, settings. Out: a `SlidePlan`. Not here: any work on pixels beyond a thumbnail.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_stain.bundles import check_files, find_bundle, read_spec
from wsi_stain.cluster import available_cores
from wsi_stain.config import BundleSpec, ClusterConfig, RunConfig, resolve_sampling
from wsi_stain.doctor import machine_bytes, nvidia_files
from wsi_stain.geometry import Scale, choose_scale
from wsi_stain.manifest import Event, Listener, ignore
from wsi_stain.slides.image import SlideSource
from wsi_stain.slides.mask import TissueMask, find_tissue
from wsi_stain.slides.plan import TileGrid, plan_tiles
from wsi_stain.slides.projection import PlanProjection, Speeds, project

__all__ = ["SlidePlan", "machine_bytes", "plan_slide", "slide_facts"]

# Seconds per 256 px tile, step and worker: what a laptop core or a data-center GPU gives.
STEP_TILE_S = {"cpu": 0.08, "cuda": 0.0005}
GUIDED_COST = 1.6
WORKER_BYTES = 900 * 2**20
COST_OF_SEEDS = "each translates every tile, the time is that of all"
LARGEST_SHARD_TILES = 64
FEWEST_SHARDS = 16


@dataclass(frozen=True)
class SlidePlan:
    """Steps 1 to 4 of the road: what will be done, decided before any work.

    Attributes
    ----------
    source
        The opened slide.
    spec
        The bundle's spec.
    scale
        How the virtual slide's frame lies over the slide's.
    mask, thumbnail_rgb
        Tissue, and the thumbnail it was found on.
    grid
        Tiles, shards.
    projection
        Bytes and seconds this will take.
    seeds
        Noise seeds for each tile.
    """

    source: SlideSource
    spec: BundleSpec
    scale: Scale
    mask: TissueMask
    thumbnail_rgb: NDArray[np.uint8]
    grid: TileGrid
    projection: PlanProjection
    seeds: int = 1

    def facts(self) -> dict[str, Any]:
        """What a person wants to know before the work begins."""
        facts = plan_facts(self.source, self.spec, self.grid, self.projection)
        return facts if self.seeds == 1 else facts | {"seeds": f"{self.seeds}: {COST_OF_SEEDS}"}


def plan_slide(path: Path, config: RunConfig, listener: Listener = ignore) -> SlidePlan:
    """Open, find tissue, plan the tiles, refuse early. Seconds, no torch.

    Parameters
    ----------
    path
        H&E slide.
    config
        Settings.
    listener
        Hears the stages.

    Returns
    -------
    SlidePlan
        Its `source` is open; the caller closes it.

    Raises
    ------
    SlideError, MppUnknownError, NoTissueError, PlanError, BundleError
        Each with the next thing to do.
    """
    folder = find_bundle(config.bundle)
    spec = read_spec(folder)
    check_files(folder, spec)
    listener(Event("plan", "start"))
    slide = config.slide
    source = SlideSource.open(
        path, mpp=slide.mpp, cache_mb=slide.cache_mb, allow_missing=slide.allow_missing
    )
    try:
        plan = _plan(source, spec, config)
    except BaseException:
        source.close()
        raise
    listener(Event("plan", "finish", facts=plan.facts()))
    return plan


def _plan(source: SlideSource, spec: BundleSpec, config: RunConfig) -> SlidePlan:
    scale = choose_scale(source.size_l0, source.mpp_l0, spec.mpp, config.tiles.mpp_tolerance)
    thumbnail_rgb = source.thumbnail(config.tiles.mask_mpp)
    mask = find_tissue(
        thumbnail_rgb,
        mpp=config.tiles.mask_mpp,
        downsample=config.tiles.mask_mpp / source.mpp_l0,
    )
    grid = plan_tiles(
        scale,
        mask,
        tile_px=spec.tile_px,
        overlap_px=config.tiles.overlap_px,
        tissue_min_fraction=config.tiles.tissue_min_fraction,
        shard_tiles=config.tiles.shard_tiles or LARGEST_SHARD_TILES,
    )
    if not config.tiles.shard_tiles:
        grid = replace(grid, shard_tiles=shard_size(grid.n_tiles))
    projection = project_plan(grid, spec, config)
    return SlidePlan(
        source, spec, scale, mask, thumbnail_rgb, grid, projection, config.sample.seeds
    )


def shard_size(n_tiles: int) -> int:
    """Choose the tiles per shard: whole batches, and enough shards to keep several workers busy.

    Depends on the number of tiles alone, not on this machine, so that a run can move.
    """
    share = -(-n_tiles // FEWEST_SHARDS)
    return min(LARGEST_SHARD_TILES, max(4, -(-share // 4) * 4))


def project_plan(grid: TileGrid, spec: BundleSpec, config: RunConfig) -> PlanProjection:
    """Project memory, disk and time of a plan on this machine."""
    solver, guidance = resolve_sampling(spec, config.sample)
    n_devices = nvidia_devices(config.cluster)
    n_workers = config.cluster.workers or n_devices or available_cores()
    cost = (
        STEP_TILE_S["cuda" if n_devices else "cpu"]
        * (GUIDED_COST if guidance else 1.0)
        * (spec.tile_px / 256) ** 2
    )
    tile_s = config.sample.seeds * (cost * solver.steps if spec.net is not None else 0.01)
    lossless = config.write.lossless or config.write.format == "ome-zarr"
    speeds = Speeds(tile_s, n_workers, WORKER_BYTES)
    spread = config.sample.seeds > 1
    projection = project(grid, speeds, lossless=lossless, spread=spread)
    if not config.cluster.is_remote:
        return projection
    # Workers have memory of their own elsewhere; here are the fit and the writer.
    here = project(grid, replace(speeds, n_workers=1), lossless=lossless, spread=spread)
    return replace(projection, memory_bytes=here.memory_bytes)


def plan_facts(
    source: SlideSource, spec: BundleSpec, grid: TileGrid, projection: PlanProjection
) -> dict[str, Any]:
    """Name and value, for a person."""
    return {
        **slide_facts(source),
        "bundle": f"{spec.name} ({spec.marker}, {spec.mpp} um/px, {spec.use})",
        "output size": str(grid.scale.size_out),
        "output pixel size um": round(grid.scale.mpp_out, 5),
        "tiles": f"{grid.n_tiles} of {spec.tile_px} px in {grid.n_shards} shards",
        "scratch disk MB": round(projection.store_bytes / 1e6, 1),
        "output MB (about)": round(projection.output_bytes / 1e6, 1),
        "memory MB (about)": round(projection.memory_bytes / 1e6),
        "minutes (about)": round(projection.seconds / 60, 1),
    }


def slide_facts(source: SlideSource) -> dict[str, Any]:
    """Facts of a slide that identify no patient: no names, dates, labels or paths."""
    return {
        "format": source.format,
        "size": str(source.size_l0),
        "pixel size um": round(source.mpp_l0, 5),
        "pixel size from": source.mpp_origin,
        "digest": source.digest,
    }


def nvidia_devices(config: ClusterConfig) -> int:
    """Count the NVIDIA devices by their device files: good enough to project a time."""
    if config.device == "cpu":
        return 0
    if config.is_remote:  # not seen from here
        has_gpu = config.executor == "slurm" and config.slurm.gres
        return max(1, config.workers) if has_gpu or config.device == "cuda" else 0
    return len(nvidia_files())
