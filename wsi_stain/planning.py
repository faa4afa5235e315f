"""Steps 1 to 4 of the road: open, find tissue, plan, project. Seconds, no torch, no GPU.

In: a slide's path, settings. Out: a `SlidePlan`. Not here: any work on pixels beyond a thumbnail.
"""

from __future__ import annotations

import math
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_stain.bundles import check_files, find_bundle, read_spec
from wsi_stain.cluster import count_workers
from wsi_stain.config import (
    BundleSpec,
    ClusterConfig,
    GuidanceSpec,
    NetSpec,
    RunConfig,
    SampleConfig,
    SolverSpec,
    resolve_sampling,
    settle_solver,
)
from wsi_stain.doctor import machine_bytes, nvidia_files, require_device
from wsi_stain.geometry import Scale, choose_scale
from wsi_stain.manifest import Event, Listener, ignore
from wsi_stain.slides.image import SlideSource
from wsi_stain.slides.mask import TissueMask
from wsi_stain.slides.plan import TileGrid, plan_tiles
from wsi_stain.slides.projection import PlanLimits, PlanProjection, Speeds, check, project
from wsi_stain.slides.tissue import find_tissue
from wsi_stain.stain.white import WhitePoint, estimate_white

__all__ = [
    "SlidePlan",
    "allowed_memory_bytes",
    "check_memory",
    "count_net_flop",
    "machine_bytes",
    "plan_by_spec",
    "plan_slide",
    "slide_facts",
    "some_tiles",
]

# What the net gets of a laptop core, and of an H100 by one process in batches of 64, all layers, in
# operations per second.
NET_FLOP_S = {"cpu": 5.8e10, "cuda": 2.4e13}
# Terms of the guidance, seconds per megapixel and step on a core: measured, see bench_model.
EDGES_S, CRITIC_S = 0.1, 0.38
CONTRAST_EVALUATIONS = 1.26  # of the net: two encodings and the way back
ROAD_S = 0.15  # per megapixel: reading, start image, glass, storing
START_S = 2.5  # until workers begin, then checks, outlines and report
WORKER_BYTES = 900 * 2**20
COST_OF_SEEDS = "each translates every tile, the time is that of all"
LARGEST_SHARD_TILES = 64
FEWEST_SHARDS = 32
MEMORY_SHARE = 0.75  # of the machine


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
    sample
        How the model will be run; its solver is settled.
    """

    source: SlideSource
    spec: BundleSpec
    scale: Scale
    mask: TissueMask
    thumbnail_rgb: NDArray[np.uint8]
    grid: TileGrid
    projection: PlanProjection
    sample: SampleConfig

    @cached_property
    def glass(self) -> WhitePoint:
        """The slide's white, measured on the thumbnail; once, for all who ask."""
        return estimate_white(self.thumbnail_rgb, self.source.background)

    @property
    def notes(self) -> tuple[str, ...]:
        """Doubts about the slide and its pixels that a person should hear."""
        if self.scale.factor >= 1.0:
            return self.source.notes
        enlarged = (
            f"The slide's pixels are {self.source.mpp_l0:.3g} um, coarser than the model's "
            f"{self.spec.mpp:g} um: they are enlarged, and what is finer the model draws alone."
        )
        return (*self.source.notes, enlarged)

    def facts(self) -> dict[str, Any]:
        """What a person wants to know before the work begins."""
        facts = plan_facts(self.source, self.spec, self.grid, self.projection)
        if self.spec.net is not None:
            solver, _ = resolve_sampling(self.spec, self.sample)
            facts |= {"solver": self.sample.solver, "evaluations a tile": solver.steps}
        if self.notes:
            facts["notes"] = list(self.notes)
        seeds = self.sample.seeds
        return facts if seeds == 1 else facts | {"seeds": f"{seeds}: {COST_OF_SEEDS}"}


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
    DeviceError, SlideError, MppUnknownError, NoTissueError, PlanError, BundleError
        Each with the next thing to do.
    """
    if not config.cluster.is_remote:
        require_device(config.cluster.device)
    folder = find_bundle(config.bundle)
    spec = read_spec(folder)
    check_files(folder, spec)
    listener(Event("plan", "start"))
    plan = plan_by_spec(path, spec, config)
    listener(Event("plan", "finish", facts=plan.facts()))
    return plan


def plan_by_spec(path: Path, spec: BundleSpec, config: RunConfig) -> SlidePlan:
    """Plan for a bundle that was found and checked before, as where many slides share one.

    Raises
    ------
    SlideError, MppUnknownError, NoTissueError
        As `plan_slide`.
    """
    slide = config.slide
    source = SlideSource.open(
        path, mpp=slide.mpp, cache_mb=slide.cache_mb, allow_missing=slide.allow_missing
    )
    with ExitStack() as on_error:
        on_error.callback(source.close)
        plan = _plan(source, spec, config)
        on_error.pop_all()
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
    sample = settle_solver(spec, config.sample)
    return SlidePlan(source, spec, scale, mask, thumbnail_rgb, grid, projection, sample)


def some_tiles(plan: SlidePlan, n_tiles: int) -> SlidePlan:
    """Keep `n_tiles` tiles from the middle of the tissue, and what is under them, for a trial."""
    grid, mask = plan.grid, plan.mask
    stained = np.flatnonzero(grid.tissue > 0)
    middle = int(stained[len(stained) // 2]) if len(stained) else grid.n_tiles // 2
    first = min(max(0, middle - n_tiles // 2), max(0, grid.n_tiles - n_tiles))
    kept = slice(first, first + n_tiles)
    rc, tissue = grid.rc[kept].copy(), grid.tissue[kept].copy()
    fewer = replace(grid, rc=rc, tissue=tissue, shard_tiles=shard_size(len(rc)))
    under = np.zeros_like(mask.pixels)
    per_px = grid.scale.factor / mask.downsample
    for index in range(fewer.n_tiles):
        box = fewer.region_out(index)
        # Whole pixels of the mask only: beyond the tiles nothing is translated.
        top, left = math.ceil(box.y_px * per_px), math.ceil(box.x_px * per_px)
        under[top : int(box.bottom_px * per_px), left : int(box.right_px * per_px)] = True
    return replace(plan, grid=fewer, mask=replace(mask, pixels=mask.pixels & under))


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
    n_workers = count_workers(config.cluster.workers, n_devices)
    net_s = _net_s(spec, solver, guidance, "cuda" if n_devices else "cpu")
    sharing = max(1.0, n_workers / n_devices) if n_devices else 1.0  # of one device
    road_s = ROAD_S * spec.tile_px**2 / 1e6
    tile_s = config.sample.seeds * (sharing * net_s + road_s)
    lossless = config.write.lossless or config.write.format == "ome-zarr"
    speeds = Speeds(tile_s, n_workers, WORKER_BYTES, START_S)
    spread = config.sample.seeds > 1
    projection = project(grid, speeds, lossless=lossless, spread=spread)
    if not config.cluster.is_remote:
        return projection
    # Workers have memory of their own elsewhere; here are the fit and the writer.
    here = project(grid, replace(speeds, n_workers=1), lossless=lossless, spread=spread)
    return replace(projection, memory_bytes=here.memory_bytes)


def _net_s(
    spec: BundleSpec, solver: SolverSpec, guidance: GuidanceSpec | None, device: str
) -> float:
    """Seconds of one tile on a core or GPU; guidance runs as much faster there as the net does."""
    if spec.net is None:
        return 0.0
    megapixels = spec.tile_px**2 / 1e6
    flop = count_net_flop(spec.net, spec.tile_px)
    seconds = solver.steps * flop / NET_FLOP_S["cpu"]
    if guidance is not None:
        critic = spec.critic is not None and guidance.sees_map
        terms_s = (guidance.edges != "none") * EDGES_S + critic * CRITIC_S
        seconds += solver.steps * terms_s * megapixels
        if spec.heads is not None and guidance.contrast != "none":
            below = min(1.0, guidance.contrast_below_step / solver.start_step)
            low = below ** (1.0 / solver.spacing)  # of the steps
            seconds += low * solver.steps * CONTRAST_EVALUATIONS * flop / NET_FLOP_S["cpu"]
    return seconds * NET_FLOP_S["cpu"] / NET_FLOP_S[device]


def count_net_flop(net: NetSpec, side_px: int) -> float:
    """Count the operations of one evaluation of a score net, from its shape alone.

    A multiplication and an addition are two. Convolutions only: the rest is below 1 %. Without
    torch, so that planning takes no second to start; `translate.cost` counts on the net itself.
    """
    packed, channels = 3 * net.unshuffle_px**2, net.channels
    first = channels[0]
    positions = (side_px // net.unshuffle_px) ** 2
    flop = 9.0 * packed * (first + first + first + packed) * positions  # head, tail, bypass
    for level, width in enumerate(channels):
        here = positions / float(4**level)
        flop += net.blocks * 18 * width**2 * here  # down
        flop += (27 + 2 + 18 * (net.blocks - 1)) * width**2 * here  # up: twice the channels, skip
        if level:
            flop += (9 + 1) * channels[level - 1] * width * here  # shrink, grow
    flop += 18 * channels[-1] ** 2 * here  # middle
    return 2.0 * flop


def allowed_memory_bytes(config: ClusterConfig) -> int:
    """Give the memory that a run may take: as asked for, or three quarters of the machine's."""
    return config.memory_limit_mb * 2**20 or int(MEMORY_SHARE * machine_bytes())


def check_memory(plan: SlidePlan, config: ClusterConfig) -> None:
    """Refuse a plan that this machine cannot hold, as `translate` would.

    Raises
    ------
    PlanError
        With both numbers.
    """
    check(plan.projection, PlanLimits(allowed_memory_bytes(config), sys.maxsize))


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
        "minutes (about)": round(projection.seconds / 60, 2),
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
