"""What a user may set for a run.

In: nothing. Out: `RunConfig` and its parts, one per room. Not here: decoding.
"""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal

import msgspec

from wsi_stain.config.bundle import (
    BundleSpec,
    GuidanceSpec,
    SolverName,
    SolverSpec,
    StudentSpec,
)
from wsi_stain.config.values import (
    Fraction,
    MaskMpp,
    Mpp,
    Seed,
    Settings,
    StartImage,
)
from wsi_stain.errors import BundleError, ConfigError


class SlideConfig(Settings, frozen=True, kw_only=True):
    """How to read the slide. `mpp` beats what the file says, and is recorded as the user's.

    `allow_missing`: tiles that cannot be read are background and listed, not an error.
    """

    mpp: Mpp | None = None
    cache_mb: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 64
    allow_missing: bool = False


class TileConfig(Settings, frozen=True, kw_only=True):
    """How to cut the slide."""

    overlap_px: Annotated[int, msgspec.Meta(ge=16, le=512, multiple_of=2)] = 32
    tissue_min_fraction: Fraction = 0.02
    mpp_tolerance: Fraction = 0.1
    shard_tiles: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 0  # 0: 64, fewer on small slides
    mask_mpp: MaskMpp = 8.0


class StainConfig(Settings, frozen=True, kw_only=True):
    """How to fit the colour, once per slide."""

    method: Literal["macenko", "reinhard", "vahadane"] = "macenko"
    fit_pixels: Annotated[int, msgspec.Meta(ge=1000, le=10_000_000)] = 100_000


class SampleConfig(Settings, frozen=True, kw_only=True):
    """How to run the model. `None` means: as the bundle says.

    Who states steps, a start level or a guidance, or none, asks for the guided solver: a student
    runs in one way only.

    ``seeds=K`` runs every tile with K noise seeds, from the run's seed on: K times the cost, and
    the spread of the brown as a second pyramid. The picture is that of the first.
    """

    solver: SolverName | None = None
    steps: Annotated[int, msgspec.Meta(ge=1, le=1000)] | None = None
    start_step: Annotated[int, msgspec.Meta(ge=1, le=1000)] | None = None
    start_image: StartImage | None = None
    guidance: GuidanceSpec | None = None
    guided: bool = True
    seeds: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    batch_tiles: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0  # 0: as suits the device


class TrustConfig(Settings, frozen=True, kw_only=True):
    """Which tiles are flagged: those beyond a limit. DESIGN, D19 says where limits come from."""

    structure_min: Annotated[float, msgspec.Meta(ge=-1.0, le=1.0)] = 0.88
    sobel_ssim_min: Annotated[float, msgspec.Meta(ge=-1.0, le=1.0)] = 0.40
    white_error_max: Fraction = 0.10


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


class SlurmConfig(Settings, frozen=True, kw_only=True):
    """What one Slurm job asks for: it is one worker on one device, or on cores where no `gres`.

    `folder` must be seen under the same path by all hosts: it holds logs, and the run's TLS key
    while it lasts. `scratch` is a folder of the job's own host. `setup` lines begin each job.
    """

    queue: str = ""
    account: str = ""
    gres: str = "gpu:1"
    cores: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 4
    memory_mb: Annotated[int, msgspec.Meta(ge=500)] = 16_000
    walltime_min: Annotated[int, msgspec.Meta(ge=2, le=60 * 24 * 30)] = 240
    interface: str = ""
    folder: str = "wsi-stain-slurm"
    scratch: str = "/tmp"  # noqa: S108 - Dask makes a folder of its own in it
    directives: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()


class ClusterConfig(Settings, frozen=True, kw_only=True):
    """Where the work runs. ``workers=0``: as suits it.

    `executor`: workers of this machine ("dask"), this process ("serial"), Slurm jobs ("slurm"), or
    the workers of a scheduler that runs already ("address").
    """

    device: Literal["auto", "cuda", "cpu"] = "auto"
    workers: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 0
    readers: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 0  # beside workers with devices
    executor: Literal["dask", "serial", "slurm", "address"] = "dask"
    memory_limit_mb: Annotated[int, msgspec.Meta(ge=0)] = 0  # 0: three quarters of the machine's
    attempts: Annotated[int, msgspec.Meta(ge=1, le=10)] = 2
    wait_s: Annotated[int, msgspec.Meta(ge=1, le=30 * 86_400)] = 60  # for a worker, where none is
    scheduler: str = ""
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    insecure_tcp: bool = False
    dashboard: bool = False  # Dask's pages, on the loopback address of this host
    slurm: SlurmConfig = SlurmConfig()

    def __post_init__(self) -> None:
        """Refuse settings that do not go together."""
        if self.executor == "slurm" and not self.workers:
            raise ValueError('executor = "slurm" needs `workers`: how many jobs')
        if self.executor in ("serial", "address") and self.dashboard:
            raise ValueError(
                f'`dashboard` is for schedulers of ours, not for executor = "{self.executor}": a '
                "scheduler that runs already has one or has none, and it is shown"
            )
        if self.executor != "address" and self.scheduler:
            raise ValueError('`scheduler` is for executor = "address"')
        if self.executor == "address":
            self._check_address()

    def _check_address(self) -> None:
        protocol, separator, place = self.scheduler.partition("://")
        host = place.rpartition(":")[0].strip("[]")
        if not separator or not host or protocol not in ("tcp", "tls"):
            raise ValueError(
                f"the scheduler's address is {self.scheduler!r}, not tls://host:port (--scheduler)"
            )
        if protocol == "tls" and not (self.tls_ca and self.tls_cert and self.tls_key):
            raise ValueError("tls:// needs tls_ca, tls_cert and tls_key (--tls-ca ...)")
        if protocol == "tcp" and not (self.insecure_tcp or _is_loopback(host)):
            raise ValueError(
                f"plain TCP to {host} lets everyone on the way read, and run code on all workers: "
                "use tls://, or say insecure_tcp = true (--insecure-tcp)"
            )

    @property
    def is_remote(self) -> bool:
        """Whether the workers may be on other hosts."""
        return self.executor in ("slurm", "address")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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


def settle_solver(spec: BundleSpec, config: SampleConfig) -> SampleConfig:
    """Name the solver: as asked, else as the bundle says.

    Returns
    -------
    SampleConfig
        Its `solver` is set, all else as it was: what keys and records are made of.
    """
    if config.solver is not None:
        return config
    name: SolverName = spec.default_solver
    if name == "student" and _asks_for_solver(config):
        name = "solver"
    return msgspec.structs.replace(config, solver=name)


def _asks_for_solver(config: SampleConfig) -> bool:
    """Tell whether anything is stated that only a guided solver has."""
    stated = (config.steps, config.start_step, config.guidance)
    return stated != (None, None, None) or not config.guided


def _student(spec: BundleSpec, config: SampleConfig) -> StudentSpec:
    if spec.student is None:
        raise BundleError(
            f"Bundle {spec.name} carries no student.",
            hint="Train one with wsi-stain distill, or leave out --solver student.",
        )
    if _asks_for_solver(config):
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
        `StudentSpec` and none: what the guidance does, it has learned,
        but for the pull on edges that its spec names.

    Raises
    ------
    BundleError
        The student is asked for, and the bundle has none.
    ConfigError
        The student is asked to run otherwise than it was trained.
    """
    config = settle_solver(spec, config)
    if config.solver == "student":
        return _student(spec, config), None
    solver = spec.teacher if config.solver == "teacher" else spec.solver
    changes = {"steps": config.steps, "start_step": config.start_step}
    solver = msgspec.structs.replace(
        solver, **{name: value for name, value in changes.items() if value is not None}
    )
    return solver, (config.guidance or spec.guidance) if config.guided else None
