"""How large is a pixel? The first trustworthy answer among those a slide gives.

Room 1 of 4. In: candidates read from the file, the user's word. Out: one pixel size and where it
came from. Not here: files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from wsi_stain.errors import ConfigError, MppUnknownError

__all__ = ["SANE_MPP", "PixelSize", "from_power", "from_resolution", "settle"]

SANE_MPP = (0.05, 20.0)
LARGEST_ANISOTROPY = 0.05
_UM_PER_UNIT = {"centimeter": 1e4, "inch": 25400.0, "millimeter": 1e3, "micrometer": 1.0}


class PixelSize(NamedTuple):
    """A pixel's width and height, um/px, and the tag that said so."""

    origin: str
    x_um: float
    y_um: float

    @property
    def is_sane(self) -> bool:
        """Tell whether both lie where microscopes do, 0.05 to 20 um/px (72 dpi is 353)."""
        return all(SANE_MPP[0] <= side_um <= SANE_MPP[1] for side_um in (self.x_um, self.y_um))

    @property
    def mean_um(self) -> float:
        """Geometric mean of width and height."""
        return self.x_um if self.x_um == self.y_um else math.sqrt(self.x_um * self.y_um)


def from_resolution(
    origin: str, x_per_unit: float, y_per_unit: float, unit: str
) -> list[PixelSize]:
    """Turn a TIFF resolution (pixels per "centimeter", "inch" ...) into a candidate, or none."""
    um_per_unit = _UM_PER_UNIT.get(unit.lower())
    if um_per_unit is None or not (x_per_unit > 0 and y_per_unit > 0):
        return []
    return [PixelSize(origin, um_per_unit / x_per_unit, um_per_unit / y_per_unit)]


def from_power(power: float | None) -> list[PixelSize]:
    """Guess from the objective: a 20x scan has about 0.5 um/px."""
    return [PixelSize("objective-power", 10.0 / power, 10.0 / power)] if power else []


def settle(
    path: Path, candidates: Iterable[PixelSize], asked_mpp: float | None
) -> tuple[float, str, float | None]:
    """Settle the pixel size of a slide.

    Parameters
    ----------
    path
        For messages.
    candidates
        What the file says, most trusted first.
    asked_mpp
        What the user says, um/px; beats the file.

    Returns
    -------
    tuple
        Pixel size, um/px; its origin ("user" or a tag); what the file says, or `None`.

    Raises
    ------
    ConfigError
        `asked_mpp` outside of 0.05..20 um/px.
    MppUnknownError
        No candidate is sane, or the first sane one is not square within 5 %.
    """
    found = list(candidates)
    sane = next((size for size in found if size.is_sane), None)
    if asked_mpp is not None:
        if not SANE_MPP[0] <= asked_mpp <= SANE_MPP[1]:
            raise ConfigError(f"--mpp {asked_mpp:g} is outside of 0.05 to 20 um/px.")
        return asked_mpp, "user", sane.mean_um if sane else None
    if sane is None:
        raise MppUnknownError(
            f"Slide {path} has no trustworthy pixel size{_rejected(found)}.",
            hint="Give it in um/px: --mpp 0.25 for a 40x scan, --mpp 0.5 for 20x.",
        )
    if abs(sane.x_um / sane.y_um - 1.0) > LARGEST_ANISOTROPY:
        raise MppUnknownError(
            f"Slide {path} has pixels that are not square: {sane.x_um:.4g} x {sane.y_um:.4g} um "
            f"by {sane.origin}.",
            hint="If the file is wrong, give the true size: --mpp 0.5",
        )
    return sane.mean_um, sane.origin, sane.mean_um


def _rejected(found: list[PixelSize]) -> str:
    if not found:
        return ": no tag gives one"
    numbers = ", ".join(f"{size.x_um:.4g} um/px by {size.origin}" for size in found)
    return f": rejected {numbers} (sane is 0.05 to 20)"
