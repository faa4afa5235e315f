"""Settings: every value a user may set, written once, with its default and its bounds.

In: TOML files, JSON headers, flags. Out: frozen structs. Not here: decisions, images, devices.

`msgspec` decodes and checks; this module only words the errors. Recipes in `pipelines/` are a
`RunConfig` or a `TrainConfig` written out; an unknown key is an error that names the nearest
known one. `BundleSpec` lives here, not beside the nets, so that planning needs no torch.
"""

from __future__ import annotations

from wsi_stain.config.archive import ArchiveConfig
from wsi_stain.config.bundle import (
    BUNDLE_SCHEMA,
    BundleSpec,
    ColorReference,
    CriticSpec,
    GuidanceSpec,
    HeadsSpec,
    NetSpec,
    SolverName,
    SolverSpec,
    StudentSpec,
)
from wsi_stain.config.decode import (
    decode_bundle_spec,
    load_recipe,
    resolve_run_config,
)
from wsi_stain.config.quantify import QuantifyConfig
from wsi_stain.config.run import (
    ClusterConfig,
    RunConfig,
    SampleConfig,
    SlideConfig,
    SlurmConfig,
    StainConfig,
    TileConfig,
    TrustConfig,
    WriteConfig,
    resolve_sampling,
    settle_solver,
)
from wsi_stain.config.train import (
    DataConfig,
    DistillConfig,
    TrainConfig,
)
from wsi_stain.config.values import (
    Count,
    Fraction,
    Level,
    Mpp,
    NonNegative,
    Positive,
    Rgb,
    Seed,
    Settings,
    StartImage,
    White,
)

__all__ = [
    "BUNDLE_SCHEMA",
    "ArchiveConfig",
    "BundleSpec",
    "ClusterConfig",
    "ColorReference",
    "Count",
    "CriticSpec",
    "DataConfig",
    "DistillConfig",
    "Fraction",
    "GuidanceSpec",
    "HeadsSpec",
    "Level",
    "Mpp",
    "NetSpec",
    "NonNegative",
    "Positive",
    "QuantifyConfig",
    "Rgb",
    "RunConfig",
    "SampleConfig",
    "Seed",
    "Settings",
    "SlideConfig",
    "SlurmConfig",
    "SolverName",
    "SolverSpec",
    "StainConfig",
    "StartImage",
    "StudentSpec",
    "TileConfig",
    "TrainConfig",
    "TrustConfig",
    "White",
    "WriteConfig",
    "decode_bundle_spec",
    "load_recipe",
    "resolve_run_config",
    "resolve_sampling",
    "settle_solver",
]
