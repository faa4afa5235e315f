"""What a user may set for a run.

In: nothing. Out: `RunConfig` and its parts, one per room. Not here: decoding.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from wsi_stain.config.bundle import BundleSpec, GuidanceSpec, SolverSpec, StudentSpec
from wsi_stain.config.values import (
    Fraction,
    Mpp,
    Seed,
    Settings,
    StartImage,
)
from wsi_stain.errors import BundleError, ConfigError


class SlideConfig(Settings, frozen=True, kw_only=True):
    """How to read the slide. `mpp` beats what the file says, and is recorded as the user's."""

    mpp: Mpp | None = None
    cache_mb: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 64


class TileConfig(Settings, frozen=True, kw_only=True):
    """How to cut the slide."""

    overlap_px: Annotated[int, msgspec.Meta(ge=16, le=512, multiple_of=2)] = 32
    tissue_min_fraction: Fraction = 0.02
    mpp_tolerance: Fraction = 0.1
    shard_tiles: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 0  # 0: 64, fewer on small slides
    mask_mpp: Mpp = 8.0


class StainConfig(Settings, frozen=True, kw_only=True):
    """How to fit the colour, once per slide."""

    method: Literal["macenko", "reinhard", "vahadane"] = "macenko"
    fit_pixels: Annotated[int, msgspec.Meta(ge=1000, le=10_000_000)] = 100_000


class SampleConfig(Settings, frozen=True, kw_only=True):
    """How to run the model. `None` means: as the bundle says.

    ``seeds=K`` runs every tile with K noise seeds, from the run's seed on: K times the cost, and
    the spread of the brown as a second pyramid. The picture is that of the first.
    """

    solver: Literal["solver", "teacher", "student"] = "solver"
    steps: Annotated[int, msgspec.Meta(ge=1, le=1000)] | None = None
    start_step: Annotated[int, msgspec.Meta(ge=1, le=1000)] | None = None
    start_image: StartImage | None = None
    guidance: GuidanceSpec | None = None
    guided: bool = True
    seeds: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    batch_tiles: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 4


class TrustConfig(Settings, frozen=True, kw_only=True):
    """Which tiles are flagged: those beyond a limit. DESIGN, D19 says where limits come from."""

    structure_min: Annotated[float, msgspec.Meta(ge=-1.0, le=1.0)] = 0.78
    sobel_ssim_min: Annotated[float, msgspec.Meta(ge=-1.0, le=1.0)] = 0.45
    white_error_max: Fraction = 0.25


class WriteConfig(Settings, frozen=True, kw_only=True):
    """How to write the pyramid. Keep `tile_px` a multiple of 16: JPEG and TIFF both need it.

    OME-Zarr keeps pixels exactly; quality, subsampling and lossless are for OME-TIFF.
    """

    format: Literal["ome-tiff", "ome-zarr"] = "ome-tiff"
    quality: Annotated[int, msgspec.Meta(ge=1, le=100)] = 90
    subsampling: Literal["4:2:0", "4:4:4"] = "4:2:0"
    lossless: bool = False
    tile_px: Annotated[int, msgspec.Meta(ge=64, le=4096, multiple_of=16)] = 512
    overwrite: bool = False


class ClusterConfig(Settings, frozen=True, kw_only=True):
    """Where the work runs. ``workers=0``: one per CUDA device, else one per CPU core."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    workers: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 0
    executor: Literal["dask", "serial"] = "dask"
    memory_limit_mb: Annotated[int, msgspec.Meta(ge=0)] = 0  # 0: three quarters of the machine's
    attempts: Annotated[int, msgspec.Meta(ge=1, le=10)] = 2


class RunConfig(Settings, frozen=True, kw_only=True):
    """Everything `translate` and `plan` may be told."""

    bundle: str = "ki67"
    seed: Seed = 0
    slide: SlideConfig = SlideConfig()
    tiles: TileConfig = TileConfig()
    stain: StainConfig = StainConfig()
    sample: SampleConfig = SampleConfig()
    trust: TrustConfig = TrustConfig()
    write: WriteConfig = WriteConfig()
    cluster: ClusterConfig = ClusterConfig()


def _student(spec: BundleSpec, config: SampleConfig) -> StudentSpec:
    if spec.student is None:
        raise BundleError(
            f"Bundle {spec.name} carries no student.",
            hint="Train one with wsi-stain distill, or leave out --solver student.",
        )
    asked = (config.steps, config.start_step, config.guidance)
    if asked != (None, None, None) or not config.guided:
        raise ConfigError(
            f"The student of bundle {spec.name} was trained for {spec.student.steps} step(s) from "
            f"level {spec.student.start_step} and for one guidance, and runs no other way.",
            hint="Leave out steps, start_step and guidance, or choose --solver solver.",
        )
    return spec.student


def resolve_sampling(
    spec: BundleSpec, config: SampleConfig
) -> tuple[SolverSpec, GuidanceSpec | None]:
    """Settle solver and guidance: what the user asks beats what the bundle says.

    Returns
    -------
    tuple
        Solver, and guidance or none where ``config.guided`` is false. For the student a
        `StudentSpec` and none: what the guidance does, it has learned.

    Raises
    ------
    BundleError
        The student is asked for, and the bundle has none.
    ConfigError
        The student is asked to run otherwise than it was trained.
    """
    if config.solver == "student":
        return _student(spec, config), None
    solver = spec.teacher if config.solver == "teacher" else spec.solver
    changes = {"steps": config.steps, "start_step": config.start_step}
    solver = msgspec.structs.replace(
        solver, **{name: value for name, value in changes.items() if value is not None}
    )
    return solver, (config.guidance or spec.guidance) if config.guided else None
