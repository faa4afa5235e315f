"""What a user may set for a training stage.

In: nothing. Out: `TrainConfig` and its parts. Not here: decoding.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from wsi_stain.config.bundle import (
    VEIL_OD,
    CriticSpec,
    GuidanceSpec,
    HeadsSpec,
    NetSpec,
    SolverSpec,
)
from wsi_stain.config.values import (
    Count,
    Fraction,
    Mpp,
    NonNegative,
    Positive,
    Rgb,
    Seed,
    Settings,
    StartImage,
)


class DataConfig(Settings, frozen=True, kw_only=True):
    """Where training images lie and how they are cut and varied.

    `manifest` is a CSV with at least the columns path, split and those named in `where`. Of
    `slides`, whole slides and the patch stores of runs, fields of tissue are read. Names are
    relative to `root`.
    """

    root: str
    manifest: str = "manifest.csv"
    where: dict[str, list[str]] = msgspec.field(default_factory=dict)
    folders: tuple[str, ...] = ()
    slides: tuple[str, ...] = ()
    slide_mpp: dict[str, Mpp] = msgspec.field(
        default_factory=dict
    )  # slide -> pixel size, um/px, where the file says none or a wrong one
    fields_per_slide: Count = 48  # of two crops' side each
    licences: dict[str, str] = msgspec.field(
        default_factory=dict
    )  # folder or slide -> licence, where no manifest says it
    held_out_strip: Annotated[float, msgspec.Meta(ge=0.0, le=0.5)] = 0.0  # of each width; 0: whole
    # images are held out
    mpp: Mpp = 0.5
    crop_px: Annotated[int, msgspec.Meta(ge=32, le=2048, multiple_of=16)] = 256
    scale_jitter: Fraction = 0.2
    stain_jitter: Fraction = 0.05
    weights: dict[str, Positive] = msgspec.field(
        default_factory=dict
    )  # folder -> weight per pixel, default 1
    balance: bool = True  # bring every image to one white; off: as the slide shows it
    white_target: Rgb = (243.0, 243.0, 244.0)  # where the brightest 2 % of an image go
    whites: dict[str, Rgb] = msgspec.field(
        default_factory=dict
    )  # folder -> another target, for fields that show no glass


class DistillConfig(Settings, frozen=True, kw_only=True):
    """How a student is taught (METHOD: fast samplers).

    "regress": toward the outputs of the bundle's own guided solver, which is deterministic, from
    the same start image and the same noise. "rdmd": toward the solver's distribution, by the
    difference of two scores (arXiv 2406.14762), from the bundle's student where it has one.
    `from_student` lets "regress" go on from it too, after start image or guidance were changed.
    `slides` are H&E slides and run folders' patch stores, beside the images of `data`.
    """

    loss: Literal["regress", "rdmd"] = "regress"
    evaluations: Annotated[int, msgspec.Meta(ge=1, le=4)] = 1
    from_student: bool = False
    pairs: Count = 600
    held_out_pairs: Count = 24
    crop_px: Annotated[int, msgspec.Meta(ge=32, le=2048, multiple_of=16)] = 192  # of a pair
    slides: tuple[str, ...] = ()
    teacher_steps: Annotated[int, msgspec.Meta(ge=1, le=1000)] | None = None  # as the bundle says
    od_weight: NonNegative = 0.5  # optical density against grey levels
    edge_weight: NonNegative = 1.0  # finite differences against grey levels
    grain_weight: NonNegative = 0.2  # local strength of detail, wherever exactly it lies
    edges_push: NonNegative = 0.0  # of the student's spec: closed-form structure when it runs
    regress_weight: NonNegative = 0.0  # of "regress" within "rdmd"
    fake_lr: Positive = 4e-4
    match_levels: tuple[Count, Count] = (20, 400)  # where the two scores are compared


class TrainConfig(Settings, frozen=True, kw_only=True):
    """One training stage."""

    stage: Literal["score", "mine", "refine", "distill"]
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
    paint: bool = True  # samples as pictures at every measure, where the stage can
    flat_gain: Fraction = 0.0  # end when `flat_measures` gain less than this together; 0: never
    flat_measures: Count = 3
    net: NetSpec = NetSpec()
    critic: CriticSpec = CriticSpec()
    heads: HeadsSpec = HeadsSpec()
    start_image: StartImage = "nuclei"  # how the bundle is best run, as measured
    veil_od: Rgb = VEIL_OD  # of start image "nuclei": deeper for a net that pales stroma
    solver: SolverSpec = SolverSpec()
    teacher: SolverSpec = SolverSpec(steps=150, order=1, eta=0.0, start_step=150)
    guidance: GuidanceSpec = GuidanceSpec()
    gradient_map: Literal["sobel", "ngf", "dog", "smooth"] = "sobel"
    map_floor_step: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 20
    distill: DistillConfig = DistillConfig()
