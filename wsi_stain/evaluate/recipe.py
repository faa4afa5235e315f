"""What an evaluation is told: images, variants, null rows. TOML, checked key by key.

In: a recipe. Out: frozen settings; the bundle's spec as a variant changes it. Not here: pixels,
metrics, defaults of the model (a bundle states those).
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from wsi_stain.config import (
    BundleSpec,
    Count,
    Fraction,
    GuidanceSpec,
    Mpp,
    Positive,
    Rgb,
    SampleConfig,
    Seed,
    Settings,
    SolverName,
    SolverSpec,
    StainConfig,
    StudentSpec,
)

__all__ = ["EvaluateConfig", "ImageChoice", "ImageGroup", "NullRow", "Variant", "vary_spec"]

NullRow = Literal["source", "null-recolor", "null-blur", "null-mean"]
Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=60)]
S = TypeVar("S", bound=Settings)


class ImageChoice(Settings, frozen=True, kw_only=True):
    """Which images: all in a folder, or those of them that a manifest lists.

    `manifest` is a CSV with the column path (under the recipe's root) and those in `where`. Where
    `limit` is set, so many are taken, evenly spread over the sorted names. `white` is taken for
    the glass of an image that shows too little of it.
    """

    folder: str
    manifest: str = ""
    where: dict[str, list[str]] = msgspec.field(default_factory=dict)
    limit: Annotated[int, msgspec.Meta(ge=0)] = 0
    white: Rgb = (243.0, 243.0, 243.0)


class ImageGroup(ImageChoice, frozen=True, kw_only=True):
    """H&E images of one pixel size, with or without the IHC of the same stems.

    `group_pattern` finds the slide or patient in a stem (its first group): images of one are not
    independent. Without it the folder is the group. `aligned` says that the reference is the same
    section, or registered to a few px; where it is not, pixel metrics reward blur.
    """

    name: Name
    mpp: Mpp
    reference: str = ""
    reference_white: Rgb = (243.0, 243.0, 243.0)
    aligned: bool = False
    group_pattern: str = ""

    def __post_init__(self) -> None:
        try:
            pattern = re.compile(self.group_pattern)
        except re.error as error:
            raise ValueError(f"group_pattern {self.group_pattern!r}: {error}") from error
        if self.group_pattern and not pattern.groups:
            raise ValueError(f"group_pattern {self.group_pattern!r} has no (group)")


class Variant(Settings, frozen=True, kw_only=True):
    """One way to run the model: named changes to what the bundle says.

    `solver` and `guidance` hold single fields of `SolverSpec` (a student's: `StudentSpec`) and
    `GuidanceSpec`; those not named stay as the bundle has them.
    """

    name: Name
    seed: Seed | None = None
    sample: SampleConfig = SampleConfig()
    solver: dict[str, Any] = msgspec.field(default_factory=dict)
    guidance: dict[str, Any] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.sample.guidance is not None:
            raise ValueError("write guidance = {...} of the variant, not of its sample")
        # Where no solver is named the recipe may name the student, with settings of its own.
        shared = SolverSpec.__struct_fields__
        if self.sample.solver is not None or set(self.solver).issubset(shared):
            self.check()

    def check(self) -> None:
        """Check the changes against what is changed; for sure once the solver is settled.

        Raises
        ------
        ValueError
            No such setting, or one that changes nothing.
        """
        student = self.sample.solver == "student"
        if student and self.guidance:
            raise ValueError(
                f"{self.name}: the student has learned its guidance, none can be given to it; "
                'sample = { solver = "solver" } takes it'
            )
        _changed(StudentSpec() if student else SolverSpec(), self.solver)
        _changed(GuidanceSpec(), self.guidance)


class EvaluateConfig(Settings, frozen=True, kw_only=True):
    """Everything `evaluate` may be told.

    ``crop_px=0`` takes whole images; else the central square of that side, at the model's pixel
    size. The first variant is what the others are compared with; `solver` is that of the variants
    that name none. `palette` names training IHC,
    whose colors the null rows take; `real` names held-out IHC of the bundle's own stain, for the
    comparison of whole sets that needs no pairs.
    """

    bundle: str = "ki67"
    root: str = "."
    seed: Seed = 0
    device: Literal["auto", "cuda", "cpu"] = "auto"
    crop_px: Annotated[int, msgspec.Meta(ge=0, le=16384)] = 256
    overlap_px: Annotated[int, msgspec.Meta(ge=16, le=512, multiple_of=2)] = 32
    mpp_tolerance: Fraction = 0.1
    stain: StainConfig = StainConfig()
    images: Annotated[tuple[ImageGroup, ...], msgspec.Meta(min_length=1)]
    variants: Annotated[tuple[Variant, ...], msgspec.Meta(min_length=1)]
    solver: SolverName | None = None  # as the bundle says
    nulls: tuple[NullRow, ...] = ("source", "null-recolor", "null-blur")
    palette: ImageChoice | None = None
    real: tuple[ImageChoice, ...] = ()
    blur_px: Positive = 2.0
    positive_od: Positive = 0.15
    sheet_rows: Count = 16
    sheet_cell_px: Annotated[int, msgspec.Meta(ge=32, le=1024)] = 192

    def __post_init__(self) -> None:
        names = [*(variant.name for variant in self.variants), *self.nulls]
        for kind, listed in (("variants", names), ("images", [g.name for g in self.images])):
            if twice := sorted({name for name in listed if listed.count(name) > 1}):
                raise ValueError(f"two {kind} of one name: {', '.join(twice)}")
        if self.palette is None and set(self.nulls) - {"source"}:
            raise ValueError("null rows take the colors of training IHC: add [palette]")
        for variant in self.runs:
            variant.check()

    @property
    def runs(self) -> tuple[Variant, ...]:
        """The variants, each with its solver as far as the recipe names one."""
        replace = msgspec.structs.replace
        return tuple(
            replace(v, sample=replace(v.sample, solver=v.sample.solver or self.solver))
            for v in self.variants
        )


def vary_spec(spec: BundleSpec, variant: Variant) -> BundleSpec:
    """Give the bundle's spec as the variant changes it.

    Parameters
    ----------
    spec
        As the bundle states it.
    variant
        Its `solver` changes the solver that its `sample` asks for, the teacher included. Where it
        changes solver or guidance and asks for none, it is the guided solver's.
    """
    own = bool(variant.solver or variant.guidance)
    default: SolverName = "solver" if own else spec.default_solver
    which = variant.sample.solver or default
    changed: dict[str, Any] = {"guidance": _changed(spec.guidance, variant.guidance)}
    if (settings := getattr(spec, which)) is not None:  # none: a bundle without a student
        changed[which] = _changed(settings, variant.solver)
    return msgspec.structs.replace(spec, default_solver=default, **changed)


def _changed(settings: S, changes: dict[str, Any]) -> S:
    """Replace fields, checked as if they stood in a recipe."""
    known = msgspec.to_builtins(settings)
    for name in changes:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean `{close[0]}`?" if close else ""
            raise ValueError(f"{type(settings).__name__} has no `{name}`{hint}")
    try:
        return msgspec.convert(known | changes, type(settings))
    except msgspec.ValidationError as error:
        # As a ValueError it is worded anew with the place in the recipe.
        text = str(error).replace("`$.", f"`{type(settings).__name__}.")
        raise ValueError(text) from error
