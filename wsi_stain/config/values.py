"""Bounded values that settings are made of, and their common base.

In: nothing. Out: annotated types, `Settings`. Not here: any setting.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Fraction = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Positive = Annotated[float, msgspec.Meta(gt=0.0)]
NonNegative = Annotated[float, msgspec.Meta(ge=0.0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Mpp = Annotated[float, msgspec.Meta(ge=0.05, le=20.0)]
MaskMpp = Annotated[float, msgspec.Meta(ge=1.0, le=20.0)]  # a thumbnail: finer ones fill memory
Seed = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Rgb = tuple[float, float, float]
Level = Annotated[float, msgspec.Meta(gt=0.0, le=255.0)]
White = tuple[Level, Level, Level]
StartImage = Literal["nuclei", "ranked", "haematoxylin", "stain", "grey", "palette", "source"]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all settings: immutable, keyword-only, strict about unknown keys."""
