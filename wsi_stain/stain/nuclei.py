"""Start colors by the nucleus: a nucleus is brown or blue as a whole.

Room 2 of 4. In: hematoxylin and eosin densities of a slide's pictures, a `ColorReference`. Out:
`NucleusColors`, plain numbers, and the light of any picture of that slide. Not here: which start
image is taken, nets.

Color by the rank of a single pixel gives nuclei a brown heart and a blue rim, and noise turns that
to mud. Here the density inside a nucleus decides the stain, for the whole nucleus, and the pixel's
own density the depth of it, by its rank among the pixels of that stain.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from wsi_stain.config import ColorReference, Rgb, Settings
from wsi_stain.errors import BundleError
from wsi_stain.stain.curve import as_deep, follow_curve, follow_curves, merge_equal, rise
from wsi_stain.stain.density import HDX, as_rgb

__all__ = ["NucleusColors", "fit_nuclei", "nucleus_light"]

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]

# The density is averaged over the inside of a nucleus, and what it decides reaches to the rim: as
# far as the pixel's own density is half of it, at most so far.
INSIDE_UM, OWN_UM, RIM_UM = 1.5, 0.5, 3.0
RIM_SHARE = 0.5
# No nucleus fills a square of this side. What is dense over more than that (keratin, pigment, a
# fold, dust) is pale counterstain: from, and up to, these shares of the density where brown begins.
WIDE_UM = 10.0
WIDE_SHARES = (0.4, 0.6)
WIDE_PALENESS = 0.5
# Share of the tissue over which brown goes over into blue.
SOFT_SHARE = 0.01
# OD that a unit of eosin adds.
STROMA_OD = (0.10, 0.12, 0.08)
# The net pales nuclei, and this makes it good.
BLUE_CONTRAST, BROWN_CONTRAST = 1.2, 1.3
_MAX_EOSIN = 1.2
_FIT_PIXELS = 400_000


class NucleusColors(Settings, frozen=True, kw_only=True):
    """Which density makes a nucleus brown, and the color of each density.

    Attributes
    ----------
    mpp
        Pixel size of the pictures, um.
    brown_from
        Hematoxylin density inside a nucleus where brown begins, and where it is complete.
    blue_in, blue_od
        Knots of the hematoxylin density outside of brown nuclei, and the mean OD there.
    blue_rgb
        OD per channel of a mean OD of 1 of the counterstain.
    brown_in, brown_od
        Knots inside of brown nuclei, and the OD there, per channel.
    stroma_rgb
        OD per channel of one unit of eosin.
    veil_rgb
        OD per channel that tissue has at least.
    """

    mpp: float
    brown_from: tuple[float, float]
    blue_in: tuple[float, ...]
    blue_od: tuple[float, ...]
    blue_rgb: Rgb
    brown_in: tuple[float, ...]
    brown_od: tuple[Rgb, ...]
    stroma_rgb: Rgb
    veil_rgb: Rgb


def fit_nuclei(
    densities: Floats, tissue: NDArray[np.bool_], reference: ColorReference, mpp: float
) -> NucleusColors:
    """Fit the colors of one slide.

    The share of brown, of all but what is too wide for a nucleus, is that of the training fields;
    hematoxylin says which nuclei are dense, not which divide.

    Parameters
    ----------
    densities
        float32 (n, h, w, 2), hematoxylin, and eosin in units of its 99th percentile.
    tissue
        bool (n, h, w).
    reference
        Colors of the training IHC.
    mpp
        Pixel size of the pictures, um.

    Returns
    -------
    NucleusColors
        For the whole slide.

    Raises
    ------
    BundleError
        The reference was measured without the colors of the two stains.
    """
    known = (reference.blue_od, reference.brown_od)
    if not (reference.positive_share and all(known)):
        raise BundleError(
            "The bundle's color reference has no colors of single stains; start image 'nuclei' "
            "needs them.",
            hint="Choose start image 'ranked', or train the bundle anew.",
        )
    step = max(1, int(tissue.sum()) // _FIT_PIXELS)
    inside, own, wide = (
        density[tissue][::step].astype(np.float64)
        for density in (
            _inside(densities[..., 0], mpp),
            np.maximum(densities[..., 0], 0.0),
            _wide(densities[..., 0], mpp),
        )
    )
    share = reference.positive_share
    shares = np.clip([1.0 - share - SOFT_SHARE, 1.0 - share, 1.0 - share + SOFT_SHARE], 0, 1)
    # What is too wide for a nucleus takes no nucleus' place among the dense.
    apart = wide < np.mean(WIDE_SHARES) * np.quantile(inside, shares[0])
    apart |= not apart.any()
    begin, cut, end = np.quantile(inside[apart], shares)
    is_brown = apart & (inside > cut)
    # Of the counterstain the depth alone: the mean of violet and of steel blue is slate, which no
    # laboratory has, so its color is the field's standard hematoxylin.
    blues = np.array(reference.blue_od).mean(axis=1, keepdims=True)
    blue_in, blue_od = _knots(own[~is_brown], _deepen(blues, BLUE_CONTRAST))
    browns = _deepen(np.array(reference.brown_od), BROWN_CONTRAST)
    brown_in, brown_od = _knots(own[is_brown], browns)
    return NucleusColors(
        mpp=mpp,
        brown_from=(float(begin), float(max(end, begin + 1e-6))),
        blue_in=blue_in,
        blue_od=tuple(blue_od[:, 0].tolist()),
        blue_rgb=as_rgb(HDX[0] / HDX[0].mean()),
        brown_in=brown_in,
        brown_od=tuple(map(as_rgb, brown_od)),
        stroma_rgb=STROMA_OD,
        veil_rgb=reference.veil_od,
    )


def nucleus_light(densities: Floats, tissue: Floats, colors: NucleusColors) -> list[Floats]:
    """Give the light that passes, per channel.

    Parameters
    ----------
    densities
        float32 (..., h, w, 2), as for `fit_nuclei`.
    tissue
        float32 (..., h, w), 0 on glass and 1 in tissue.
    colors
        The slide's.

    Returns
    -------
    list of ndarray
        Three float32 (..., h, w), 0..1.

    Notes
    -----
    Borders are mirrored, so the stain of a nucleus that a picture cuts may depend on the cut:
    where tiles meet they overlap by more than that.
    """
    own = np.ascontiguousarray(densities[..., 0])
    eosin = np.clip(densities[..., 1], 0.0, _MAX_EOSIN)
    begin, end = colors.brown_from
    inside = _inside(own, colors.mpp)
    wideness = rise(_wide(own, colors.mpp), *(share * begin for share in WIDE_SHARES))
    brownness = rise(inside, begin, end)
    brownness *= 1.0 - wideness
    blue = follow_curve(own, colors.blue_in, colors.blue_od)
    blue *= 1.0 - np.float32(WIDE_PALENESS) * wideness
    blue *= blue
    eosin *= eosin
    browns = follow_curves(own, colors.brown_in, tuple(zip(*colors.brown_od, strict=True)))
    clear = -tissue
    for blue_per, light, stroma, veil in zip(
        colors.blue_rgb, browns, colors.stroma_rgb, colors.veil_rgb, strict=True
    ):
        # Stroma lies beside the nuclei and not over them: the larger of both prevails.
        beside = np.float32(blue_per**2) * blue
        beside += np.float32(stroma**2) * eosin
        beside += np.float32(veil**2)
        np.sqrt(beside, out=beside)
        # In place from here on: a brown's OD becomes the light that passes.
        light -= beside
        light *= brownness
        light += beside
        light *= clear
        np.exp(light, out=light)
    return browns


def _wide(density: Floats, mpp: float) -> Floats:
    """Give each pixel the density of the widest matter it lies in: an opening, at half resolution.

    Of a square of `WIDE_UM` the least density; of all such squares around a pixel the largest.
    """
    side = 2 * max(1, round(WIDE_UM / mpp / 4)) + 1  # odd, of halved pixels
    square = cv2.getStructuringElement(cv2.MORPH_RECT, (side, side))
    height, width = density.shape[-2:]
    size = (max(1, width // 2), max(1, height // 2))
    found = []
    for picture in np.maximum(density, 0.0).reshape(-1, height, width):
        half = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        opened = cv2.morphologyEx(half, cv2.MORPH_OPEN, square)  # wide matter goes on at borders
        found.append(cv2.resize(opened, (width, height), interpolation=cv2.INTER_LINEAR))
    return np.asarray(found, dtype=np.float32).reshape(density.shape)


def _inside(density: Floats, mpp: float) -> Floats:
    """Give each pixel the density of its nucleus: the mean at the heart, handed on to the rim.

    A dilation that goes on only where a pixel's own density is `RIM_SHARE` of what reaches it.
    """
    reach_px = max(1, round(RIM_UM / mpp))
    shapes = (cv2.MORPH_RECT, cv2.MORPH_CROSS)  # in turn: nearly a disk
    steps = [cv2.getStructuringElement(shape, (3, 3)) for shape in shapes]
    hearts = []
    for picture in np.maximum(density, 0.0).reshape(-1, *density.shape[-2:]):
        heart, own = (
            cv2.GaussianBlur(picture, (0, 0), width_um / mpp, borderType=cv2.BORDER_REFLECT)
            for width_um in (INSIDE_UM, OWN_UM)
        )
        own /= np.float32(RIM_SHARE)
        for number in range(reach_px):
            near = cv2.dilate(heart, steps[number % 2])
            cv2.copyTo(near, cv2.compare(own, near, cv2.CMP_GE), heart)
        hearts.append(heart)
    return np.asarray(hearts, dtype=np.float32).reshape(density.shape)


def _deepen(table: Doubles, contrast: float) -> Doubles:
    """Move the darker half of the colors away from the middle one; their hue stays."""
    mean = table.mean(axis=1)
    middle = np.median(mean)
    return as_deep(table, np.where(mean > middle, middle + contrast * (mean - middle), mean))


def _knots(density: Doubles, table: Doubles) -> tuple[tuple[float, ...], Doubles]:
    """Give quantiles of the density, and the color at each."""
    if not len(density):
        return (0.0,), table[:1]
    return merge_equal(np.quantile(density, np.linspace(0.0, 1.0, len(table))), table)
