"""Is this slide H&E at all, or that one an IHC? A doubt, told to the person; never a refusal.

Room 2 of 4. In: stained pixels of one slide. Out: remarks. Not here: fits, who hears of it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wsi_stain.stain.density import rgb_to_od

__all__ = ["doubt_he", "doubt_ihc"]

FIRM_OD = 0.3  # natural log; paler pixels have no sure hue
FEWEST_PX = 100
# Measured on 60 H&E and 40 IHC fields and slides of 18 sources: no H&E field has a brown pixel in
# a thousand, IHC has 0.4 to 87 %; H&E has 21 to 100 % pink and purple, IHC 0 to 25 %.
BROWN_MOST = 0.01
PINK_LEAST, PINK_SURE = 0.1, 0.2


def doubt_he(pixels: NDArray[np.uint8], white: ArrayLike) -> tuple[str, ...]:
    """Look for the brown of DAB, and for the pink and purple that H&E always has.

    DAB absorbs blue most; hematoxylin and eosin together absorb green most.

    Parameters
    ----------
    pixels
        uint8 (n, 3), stained pixels of one slide.
    white
        (3,) grey levels of its glass.

    Returns
    -------
    tuple of str
        Remarks, one line each; empty where the slide looks like H&E.
    """
    shares = _shares(pixels, white)
    if shares is None:
        return ()
    brown, pink = shares
    if brown > BROWN_MOST:
        return (f"Is this slide H&E? {brown:.0%} of its stained pixels are brown, as DAB of IHC.",)
    if pink < PINK_LEAST:
        return (f"Is this slide H&E? Only {pink:.0%} of its stained pixels are pink or purple.",)
    return ()


def doubt_ihc(pixels: NDArray[np.uint8], white: ArrayLike) -> tuple[str, ...]:
    """Look for an H&E where the stain of an IHC is to be measured; as `doubt_he`, turned round."""
    shares = _shares(pixels, white)
    if shares is None or shares[0] > BROWN_MOST or shares[1] < PINK_SURE:
        return ()
    pink = f"{shares[1]:.0%} of its stained pixels are pink or purple, next to none brown"
    return (f"Is this picture an IHC? {pink}, as of H&E: what is measured is not DAB.",)


def _shares(pixels: NDArray[np.uint8], white: ArrayLike) -> tuple[float, float] | None:
    """Give the shares of brown, and of pink and purple; none where too few pixels have a hue."""
    od = rgb_to_od(pixels.reshape(-1, 3), white)
    red, green, blue = od[od.max(axis=1) > FIRM_OD].T
    if red.size < FEWEST_PX:
        return None
    brown = float(np.mean((blue > 1.1 * green) & (green > red)))
    pink = float(np.mean((green > 1.25 * red) & (green > 1.1 * blue)))
    return brown, pink
