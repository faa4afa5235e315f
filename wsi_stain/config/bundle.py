"""What a bundle says about itself: nets, colors, solver, guidance, provenance.

In: nothing. Out: `BundleSpec` and its parts. Not here: weights, files.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from wsi_stain.config.values import (
    Count,
    Fraction,
    Mpp,
    NonNegative,
    Positive,
    Rgb,
    Settings,
    StartImage,
    White,
)

BUNDLE_SCHEMA = 1
SolverName = Literal["solver", "teacher", "student"]


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


class StudentSpec(SolverSpec, frozen=True, kw_only=True):
    """The student: a solver of one to four steps with a net of its own.

    It has learned the guidance, but regression blurs: `edges_push` bounds a pull of the closed-form
    structure term on each of its estimates, 0 for none. `start_step` is that of the solver it was
    taught by; `trained_by` and `trained_samples` say how.
    """

    steps: Annotated[int, msgspec.Meta(ge=1, le=4)] = 1
    order: Literal[1, 2] = 1
    start_step: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 200
    edges_push: NonNegative = 0.0
    trained_by: Literal["regress", "rdmd"] = "regress"
    trained_samples: int = 0


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
    edges: Literal["gaussian", "none"] = "none"  # structure in closed form: I of the edge maps
    edges_scale: NonNegative = 1000.0  # s_E
    edges_push: NonNegative = 0.2  # bound of its pull, in units of 1 / sigma_t
    edges_window_px: Annotated[float, msgspec.Meta(ge=0.5, le=16.0)] = 2.5  # sd
    color_pull: Fraction = 0.0  # how much of the start's color around each pixel is held; 0: none
    color_window_px: Annotated[float, msgspec.Meta(ge=0.5, le=16.0)] = 1.5  # sd
    clip: Literal["pixel", "tile", "off"] = "pixel"
    clip_limit: Positive = 1.0  # c

    @property
    def sees_map(self) -> bool:
        """Tell whether the gradient map is looked at: by the critic, and by nothing else."""
        return self.structure_scale > 0.0


class NetSpec(Settings, frozen=True, kw_only=True):
    """Shape of the score net: a UNet on pixel-unshuffled patches, preconditioned in VP form.

    ``predict="noise"`` leaves the preconditioning out (an ablation: it learns far slower).
    """

    channels: Annotated[tuple[Count, ...], msgspec.Meta(min_length=1, max_length=8)] = (
        64,
        128,
        256,
    )
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


# Real stroma is paler, but then it would count as glass, which has less than 0.15 in every channel.
# So one channel carries it, the blue, which the eye sees least: a cream, as chromogens leave on
# tissue.
VEIL_OD = (0.045, 0.115, 0.21)


class ColorReference(Settings, frozen=True, kw_only=True):
    """What the training stain looks like: all that colour fitting needs to know of it.

    Optical density (OD) is natural-log, ``-ln(I / white)``, everywhere in this package.
    """

    white: White = (255.0, 255.0, 255.0)  # glass of the training IHC, grey levels
    output_white: White = (255.0, 255.0, 255.0)  # glass of what is shown, to which that is scaled
    stain_od: tuple[Rgb, Rgb] = ((0.650, 0.704, 0.286), (0.268, 0.570, 0.776))  # H, DAB, unit
    stain_c99: tuple[Positive, Positive] = (1.0, 1.0)  # 99th percentile of each density, OD
    he_stain_od: tuple[Rgb, Rgb] = ((0.651, 0.701, 0.290), (0.216, 0.801, 0.558))  # H, E, unit
    he_stain_c99: tuple[Positive, Positive] = (2.0, 1.3)
    mean_od_quantiles: tuple[float, ...] = ()  # of the mean OD over tissue, equally spaced 0..1
    ranked_od: tuple[Rgb, ...] = ()  # at each of these quantiles: OD of the stain that prevails
    positive_share: Fraction = 0.0  # of a field's pixels: those with DAB
    blue_od: tuple[Rgb, ...] = ()  # OD of pixels without DAB, at quantiles of their own mean OD
    brown_od: tuple[Rgb, ...] = ()  # the same of pixels where DAB prevails
    veil_od: Rgb = VEIL_OD  # that tissue has at least in start image "nuclei"


class BundleSpec(Settings, frozen=True, kw_only=True):
    """`bundle.json`: what a bundle is, what it was trained on and how it is best run.

    `default_solver` is which of the three runs where nobody asks: the fastest that measures no
    worse than the teacher.
    """

    schema: int = BUNDLE_SCHEMA
    name: str
    marker: str
    mpp: Mpp = 0.5
    tile_px: Annotated[int, msgspec.Meta(ge=32, le=2048, multiple_of=16)] = 256
    timesteps: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 1000
    beta_first: Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)] = 1e-4
    beta_last: Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)] = 2e-2
    start_image: StartImage = "haematoxylin"
    net: NetSpec | None = None
    critic: CriticSpec | None = None
    heads: HeadsSpec | None = None
    solver: SolverSpec = SolverSpec()
    teacher: SolverSpec = SolverSpec(steps=300, order=1, eta=1.0, shift="mean")
    student: StudentSpec | None = None
    default_solver: SolverName = "solver"
    guidance: GuidanceSpec = GuidanceSpec()
    color: ColorReference = ColorReference()
    trained_samples: int = 0
    use: str = "research use only"
    data_statement: str = ""
    licences: tuple[str, ...] = ()
    created_by: str = ""
    files: dict[str, str] = msgspec.field(default_factory=dict)  # file name -> SHA-256, hex
