"""Settings: every value a user may set, written once, with its default and its bounds.

In: TOML files, JSON headers, flags. Out: frozen structs. Not here: decisions, images, devices.

`msgspec` decodes and checks; this module only words the errors. Recipes in `pipelines/` are a
`RunConfig` or a `TrainConfig` written out; an unknown key is an error that names the nearest
known one. `BundleSpec` lives here, not beside the nets, so that planning needs no torch.
"""

from __future__ import annotations

import difflib
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from wsi_stain.errors import BundleError, ConfigError, WsiStainError

__all__ = [
    "BundleSpec",
    "ClusterConfig",
    "ColorReference",
    "CriticSpec",
    "GuidanceSpec",
    "HeadsSpec",
    "NetSpec",
    "RunConfig",
    "SampleConfig",
    "SlideConfig",
    "SolverSpec",
    "StainConfig",
    "TileConfig",
    "TrainConfig",
    "WriteConfig",
    "decode_bundle_spec",
    "load_recipe",
    "resolve_run_config",
    "resolve_sampling",
]

Fraction = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Positive = Annotated[float, msgspec.Meta(gt=0.0)]
NonNegative = Annotated[float, msgspec.Meta(ge=0.0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Mpp = Annotated[float, msgspec.Meta(ge=0.05, le=20.0)]
Seed = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Rgb = tuple[float, float, float]
Level = Annotated[float, msgspec.Meta(gt=0.0, le=255.0)]
White = tuple[Level, Level, Level]
StartImage = Literal["haematoxylin", "stain", "grey", "palette", "source"]

BUNDLE_SCHEMA = 1


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all settings: immutable, keyword-only, strict about unknown keys."""


# ---- what a bundle says about itself ------------------------------------------------------


class SolverSpec(Settings, frozen=True, kw_only=True):
    """One way to run the reverse process (METHOD: one solver covers them all).

    ``order=1, eta=1, steps=300`` is the paper's ancestral sampler; ``order=2, eta=0`` is
    DPM-Solver++ 2M. `start_step` is S: the noise level at which the start image enters. Steps lie
    at ``S (1 - i/n) ** spacing``. `shift` says how the energy moves a step: "score" moves the
    clean estimate by ``sigma_t^2 / alpha_t``; "mean" is the paper's shift of the posterior mean.
    """

    steps: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 15
    order: Literal[1, 2] = 2
    eta: Fraction = 0.0
    spacing: Annotated[float, msgspec.Meta(ge=1.0, le=3.0)] = 1.0
    shift: Literal["score", "mean"] = "score"
    start_step: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 300


class GuidanceSpec(Settings, frozen=True, kw_only=True):
    """The energy M and the local contrast term; names follow the paper's symbols in comments."""

    gradient_map: Literal["sobel", "ngf", "dog", "smooth"] = "sobel"
    map_noise: Literal["independent", "shared"] = "independent"
    map_floor_step: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 20
    energy: Literal["critic", "dv"] = "critic"
    structure_sign: Literal["as_written", "clamped", "constant"] = "as_written"
    energy_sign: Literal["ascend", "descend"] = "ascend"
    weight: Literal["linear"] | Fraction = "linear"  # lam_t
    structure_scale: NonNegative = 1.0  # s_I, in units of 1/32 of the patch sum
    entropy: Literal["surprisal", "logdet", "histogram", "none"] = "surprisal"
    entropy_scale: NonNegative = 0.1  # s_H
    contrast: Literal["score", "l2", "none"] = "score"  # l_PCL
    contrast_scale: NonNegative = 1.0  # s_P
    contrast_below_step: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 40  # t'_0
    clip: Literal["pixel", "tile", "off"] = "pixel"
    clip_limit: Positive = 1.0  # c


class NetSpec(Settings, frozen=True, kw_only=True):
    """Shape of the score net: a UNet on pixel-unshuffled patches, preconditioned in VP form.

    ``predict="noise"`` leaves the preconditioning out (an ablation: it learns far slower).
    """

    channels: tuple[Count, ...] = (64, 128, 256)
    blocks: Count = 2
    unshuffle_px: Literal[1, 2, 4, 8] = 4
    norm: Literal["position", "group"] = "position"
    predict: Literal["clean", "noise"] = "clean"  # preconditioned, or eps itself
    data_mean: Rgb = (0.45, 0.45, 0.45)
    data_sd: Positive = 0.234


class CriticSpec(Settings, frozen=True, kw_only=True):
    """Shape and loss of the mutual-information critic: two towers, bounded score."""

    channels: tuple[Count, Count, Count] = (64, 96, 96)
    embed: Count = 64
    tau: Positive = 5.0
    loss: Literal["smile", "mine", "nce"] = "smile"
    negatives: Count = 64


class HeadsSpec(Settings, frozen=True, kw_only=True):
    """Shape of the patch-contrast heads on the score net's encoder features."""

    embed: Count = 256
    positions: Count = 256
    temperature: Positive = 0.07


class ColorReference(Settings, frozen=True, kw_only=True):
    """What the training stain looks like: all that colour fitting needs to know of it.

    Optical density (OD) is natural-log, ``-ln(I / white)``, everywhere in this package.
    """

    white: White = (255.0, 255.0, 255.0)  # glass of the training IHC, grey levels
    stain_od: tuple[Rgb, Rgb] = ((0.650, 0.704, 0.286), (0.268, 0.570, 0.776))  # H, DAB, unit
    stain_c99: tuple[Positive, Positive] = (1.0, 1.0)  # 99th percentile of each density, OD
    he_stain_od: tuple[Rgb, Rgb] = ((0.651, 0.701, 0.290), (0.216, 0.801, 0.558))  # H, E, unit
    he_stain_c99: tuple[Positive, Positive] = (2.0, 1.3)
    mean_od_quantiles: tuple[float, ...] = ()  # of the mean OD over tissue, equally spaced 0..1


class BundleSpec(Settings, frozen=True, kw_only=True):
    """`bundle.json`: what a bundle is, what it was trained on and how it is best run."""

    schema: int = BUNDLE_SCHEMA
    name: str
    marker: str
    mpp: Mpp = 0.5
    tile_px: Annotated[int, msgspec.Meta(ge=32, le=2048, multiple_of=16)] = 256
    timesteps: Count = 1000
    beta_first: Positive = 1e-4
    beta_last: Positive = 2e-2
    start_image: StartImage = "haematoxylin"
    net: NetSpec | None = None
    critic: CriticSpec | None = None
    heads: HeadsSpec | None = None
    solver: SolverSpec = SolverSpec()
    teacher: SolverSpec = SolverSpec(steps=300, order=1, eta=1.0, shift="mean")
    guidance: GuidanceSpec = GuidanceSpec()
    color: ColorReference = ColorReference()
    trained_samples: int = 0
    use: str = "research use only"
    data_statement: str = ""
    licences: tuple[str, ...] = ()
    created_by: str = ""
    files: dict[str, str] = {}  # file name -> SHA-256, hex


# ---- what a user may set for a run ---------------------------------------------------------


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
    """How to run the model. `None` means: as the bundle says."""

    solver: Literal["solver", "teacher"] = "solver"
    steps: Annotated[int, msgspec.Meta(ge=1, le=1000)] | None = None
    start_step: Annotated[int, msgspec.Meta(ge=1, le=1000)] | None = None
    start_image: StartImage | None = None
    guidance: GuidanceSpec | None = None
    guided: bool = True
    batch_tiles: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 4


class WriteConfig(Settings, frozen=True, kw_only=True):
    """How to write the pyramid. Keep `tile_px` a multiple of 16: JPEG and TIFF both need it."""

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
    write: WriteConfig = WriteConfig()
    cluster: ClusterConfig = ClusterConfig()


# ---- what a user may set for a training ----------------------------------------------------


class DataConfig(Settings, frozen=True, kw_only=True):
    """Where training images lie and how they are cut and varied.

    `manifest` is a CSV with at least the columns path, split and those named in `where`.
    """

    root: str
    manifest: str = "manifest.csv"
    where: dict[str, list[str]] = {}
    folders: tuple[str, ...] = ()
    mpp: Mpp = 0.5
    crop_px: Annotated[int, msgspec.Meta(ge=32, le=2048, multiple_of=16)] = 256
    scale_jitter: Fraction = 0.2
    stain_jitter: Fraction = 0.05
    weights: dict[str, Positive] = {}  # folder -> weight per pixel, default 1
    white_target: Rgb = (243.0, 243.0, 244.0)  # where the brightest 2 % of an image go
    whites: dict[str, Rgb] = {}  # folder -> another target, for fields that show no glass


class TrainConfig(Settings, frozen=True, kw_only=True):
    """One training stage."""

    stage: Literal["score", "mine", "refine"]
    bundle: str
    name: str = "ki67"
    marker: str = "Ki-67"
    data: DataConfig
    samples: Count = 160_000
    batch: Count = 4
    lr: Positive = 1e-4
    warmup_samples: NonNegative = 2_000
    ema_decay: Fraction = 0.9995
    weight_decay: NonNegative = 0.01
    grad_clip: Positive = 1.0
    focus_step: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 330
    last_step: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 600
    focus_fraction: Fraction = 0.85
    seed: Seed = 0
    threads: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0  # 0: all cores
    device: Literal["auto", "cuda", "cpu"] = "auto"
    checkpoint_every: Count = 2_000  # samples
    evaluate_every: Count = 8_000  # samples
    net: NetSpec = NetSpec()
    critic: CriticSpec = CriticSpec()
    heads: HeadsSpec = HeadsSpec()
    gradient_map: Literal["sobel", "ngf", "dog", "smooth"] = "sobel"
    map_floor_step: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 20


# ---- decoding ------------------------------------------------------------------------------

T = TypeVar("T", bound=Settings)


def load_recipe(path: Path, kind: type[T]) -> tuple[T, dict[str, Any]]:
    """Read a TOML recipe.

    Parameters
    ----------
    path
        TOML file.
    kind
        `RunConfig` or `TrainConfig`.

    Returns
    -------
    tuple
        The settings, and the raw nested mapping of what the file sets.

    Raises
    ------
    ConfigError
        Not readable, not TOML, unknown key (the nearest known one is named) or bad value.
    """
    try:
        raw = msgspec.toml.decode(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"Recipe {path} cannot be read: {error.strerror}.") from error
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise ConfigError(f"Recipe {path} is not valid TOML: {error}") from error
    return _convert(raw, kind, f"Recipe {path}", ConfigError), raw


def decode_bundle_spec(data: bytes, source: str) -> BundleSpec:
    """Decode `bundle.json`.

    Parameters
    ----------
    data
        UTF-8 JSON.
    source
        File name for error messages.

    Raises
    ------
    BundleError
        Not JSON, made by a later version, or a field is unknown or out of bounds.
    """
    try:
        raw = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise BundleError(f"{source} is not valid JSON: {error}") from error
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if isinstance(schema, int) and schema > BUNDLE_SCHEMA:
        raise BundleError(
            f"{source} has schema {schema}; this version reads up to {BUNDLE_SCHEMA}.",
            hint="Install a newer wsi-stain.",
        )
    return _convert(raw, BundleSpec, source, BundleError)


def resolve_run_config(
    flags: dict[str, Any], recipe: Path | None = None
) -> tuple[RunConfig, dict[str, str]]:
    """Settle a run's settings: flags beat the recipe, the recipe beats defaults.

    Parameters
    ----------
    flags
        Dotted names to values, for example ``{"write.quality": 85}``; `None` means not given.
    recipe
        TOML file, or none.

    Returns
    -------
    tuple
        The settings, and the origin ("flag" or "recipe") of every value that is not a default.

    Raises
    ------
    ConfigError
        Unknown key or bad value, with its origin named.
    """
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if recipe is not None:
        _, merged = load_recipe(recipe, RunConfig)
        origins = dict.fromkeys(_dotted(merged), "recipe")
    for name, value in flags.items():
        if value is None:
            continue
        *parents, leaf = name.split(".")
        node = merged
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
        origins[name] = "flag"
    return _convert(merged, RunConfig, "Settings", ConfigError), origins


def resolve_sampling(
    spec: BundleSpec, config: SampleConfig
) -> tuple[SolverSpec, GuidanceSpec | None]:
    """Settle solver and guidance: what the user asks beats what the bundle says.

    Returns
    -------
    tuple
        Solver, and guidance or none where ``config.guided`` is false.
    """
    solver = spec.teacher if config.solver == "teacher" else spec.solver
    changes = {"steps": config.steps, "start_step": config.start_step}
    solver = msgspec.structs.replace(
        solver, **{name: value for name, value in changes.items() if value is not None}
    )
    return solver, (config.guidance or spec.guidance) if config.guided else None


def _dotted(node: dict[str, Any], prefix: str = "") -> list[str]:
    names: list[str] = []
    for key, value in node.items():
        names += _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
    return names


def _convert(raw: Any, kind: type[T], source: str, error_class: type[WsiStainError]) -> T:
    try:
        if endless := _not_finite(raw):
            # Bounds let them through: no comparison with nan is ever true.
            raise error_class(f"{source}: {endless[0]} is not a finite number.")
        return msgspec.convert(raw, kind)
    except (msgspec.ValidationError, OverflowError, RecursionError) as error:
        raise error_class(f"{source}: {error}.", hint=_nearest(str(error), kind)) from error


def _not_finite(node: Any, name: str = "$") -> list[str]:
    """Name the values that are nan or infinite."""
    if isinstance(node, dict):
        return [found for key in node for found in _not_finite(node[key], f"{name}.{key}")]
    if isinstance(node, list | tuple):
        return [found for item in node for found in _not_finite(item, name)]
    return [name] if isinstance(node, float) and not math.isfinite(node) else []


def _nearest(text: str, kind: type[Settings]) -> str:
    """Name the known key that comes nearest to an unknown one."""
    match = re.search(r"unknown field `(.+?)`", text)
    if match is None:
        return ""
    close = difflib.get_close_matches(match.group(1), sorted(_field_names(kind)), n=1, cutoff=0.5)
    return f"Did you mean `{close[0]}`?" if close else ""


def _field_names(kind: type[Settings]) -> set[str]:
    names: set[str] = set()
    for field in msgspec.structs.fields(kind):
        names.add(field.name)
        for part in getattr(field.type, "__args__", (field.type,)):
            if isinstance(part, type) and issubclass(part, Settings):
                names |= _field_names(part)
    return names
