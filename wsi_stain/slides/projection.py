"""PlanProjection: what a plan will cost, and refusal before any work starts.

Room 1 of 4. In: a grid, speeds. Out: bytes and seconds, or an error. Not here: measuring machines.
"""

from __future__ import annotations

from dataclasses import dataclass

from wsi_stain.errors import PlanError
from wsi_stain.slides.plan import TileGrid

__all__ = ["PlanLimits", "PlanProjection", "Speeds", "check", "project"]

# JPEG quality 90, 4:2:0, dense tissue, times 4/3 for the levels above (measured on real slides).
OUTPUT_BYTES_PER_PX = 0.42 * 4 / 3
# LZW and zstd on dense virtual IHC take 2.4 to 2.8 bytes, on H&E up to 3.9.
LOSSLESS_BYTES_PER_PX = 3.0 * 4 / 3
# LZW on the spread over seeds, grey as RGB.
SPREAD_BYTES_PER_PX = 1.0 * 4 / 3
# A blank 512 px tile has 1,820 bytes.
BLANK_BYTES_PER_PX = 0.007 * 4 / 3
WRITER_BYTES = 200 * 2**20


@dataclass(frozen=True)
class Speeds:
    """What a machine and a model give.

    Attributes
    ----------
    tile_s
        Seconds per tile in one worker, all in.
    n_workers
        Workers at once.
    worker_bytes
        Memory of a worker with the model, without patches.
    start_s
        Seconds that a run of a single tile takes.
    """

    tile_s: float
    n_workers: int
    worker_bytes: int
    start_s: float = 0.0


@dataclass(frozen=True)
class PlanLimits:
    """What may be used, in bytes."""

    memory_bytes: int
    disk_bytes: int


@dataclass(frozen=True)
class PlanProjection:
    """What a plan will take: counts, bytes on disk (store, output) and in memory, seconds."""

    tiles: int
    shards: int
    store_bytes: int
    output_bytes: int
    memory_bytes: int
    seconds: float


def project(
    grid: TileGrid,
    speeds: Speeds,
    *,
    n_arrays: int = 2,
    lossless: bool = False,
    spread: bool = False,
) -> PlanProjection:
    """Project the cost of a plan.

    Parameters
    ----------
    grid
        The tiles.
    speeds
        Machine and model.
    n_arrays
        Patch arrays in the store: `he` and `ihc`.
    lossless
        Whether the output keeps every pixel.
    spread
        Whether the spread over seeds is kept and written beside the output.

    Returns
    -------
    PlanProjection
        Memory is the larger of two stages: all workers with one shard in and two out each (bare
        and with glass), the spread as float32 beside them; or the writer with two row bands (RGB
        and two feathered strips).
    """
    tile_bytes = 3 * grid.tile_px**2
    band_bytes = 3 * grid.tile_px * grid.scale.size_out.width_px
    shard_bytes = min(grid.shard_tiles, grid.n_tiles) * tile_bytes
    worker_bytes = speeds.worker_bytes + (3 + 2 * spread) * shard_bytes
    tissue_px = min(grid.n_tiles * grid.stride_px**2, grid.scale.size_out.area_px)
    blank_px = grid.scale.size_out.area_px - tissue_px
    bytes_per_px = LOSSLESS_BYTES_PER_PX if lossless else OUTPUT_BYTES_PER_PX
    bytes_per_px += spread * SPREAD_BYTES_PER_PX
    return PlanProjection(
        tiles=grid.n_tiles,
        shards=grid.n_shards,
        store_bytes=n_arrays * grid.n_tiles * tile_bytes + spread * grid.n_tiles * tile_bytes // 3,
        output_bytes=int(tissue_px * bytes_per_px + blank_px * BLANK_BYTES_PER_PX),
        memory_bytes=max(speeds.n_workers * worker_bytes, WRITER_BYTES + 2 * band_bytes),
        seconds=speeds.start_s
        + grid.n_tiles * speeds.tile_s / max(1, min(speeds.n_workers, grid.n_shards)),
    )


def check(projection: PlanProjection, limits: PlanLimits) -> None:
    """Refuse a plan that does not fit.

    Raises
    ------
    PlanError
        Too little memory or disk, with both numbers.
    """
    if projection.memory_bytes > limits.memory_bytes:
        raise PlanError(
            f"The plan needs {_gb(projection.memory_bytes)} of memory, "
            f"{_gb(limits.memory_bytes)} are allowed.",
            hint="Use fewer workers or smaller shards: --workers 1 --shard-tiles 16",
        )
    disk_bytes = projection.store_bytes + projection.output_bytes
    if disk_bytes > limits.disk_bytes:
        raise PlanError(
            f"The plan needs {_gb(disk_bytes)} of disk ({_gb(projection.store_bytes)} for patches, "
            f"{_gb(projection.output_bytes)} for the output), {_gb(limits.disk_bytes)} are free.",
            hint="Free some, or put the work folder elsewhere.",
        )


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB"
