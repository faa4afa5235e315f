"""Stain normalization: one color map per slide, from its own stains to the reference's.

Room 2 of 4. In: tissue pixels of one slide, its white, a `ColorReference`. Out: a
`StainTransform` of plain numbers. Not here: start images, tiles, files.

Nothing is ever fitted per tile. With slide-level stain vectors Macenko and Vahadane are one linear
map of optical density (OD), ``H_ref diag(c_ref / c_src) pinv(H_src)``; Reinhard is a scale and a
shift in CIELAB. So all three are functions of the pixel alone: any tile, worker or order gives the
same color.
"""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from wsi_stain.config import ColorReference, Rgb, Settings
from wsi_stain.errors import NoTissueError
from wsi_stain.stain.density import (
    GLASS_OD,
    as_rgb,
    is_stained,
    od_to_rgb,
    project_od,
    render_od,
    rgb_to_od,
    unmix,
)
from wsi_stain.stain.separate import angle_deg, macenko_vectors, sparse_vectors

__all__ = ["LabShift", "Method", "StainTransform", "fit_stain"]

Method = Literal["macenko", "reinhard", "vahadane"]
Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]
Rgb8 = NDArray[np.uint8]

MIN_STAINED_PX = 200  # below, the 99th percentile of a density is two pixels
MIN_SPREAD_DEG = 6.0  # two stain vectors nearer than this are one stain
MAX_ODD_DEG = 30.0  # farther from the reference a stain is worth a remark
MAX_GAIN = 4.0  # a stain that is hardly there is not amplified beyond this
STRONG_PERCENTILE = 99.0


class LabShift(Settings, frozen=True, kw_only=True):
    """Scale and shift of each CIELAB channel: ``lab * scale + shift``."""

    scale: Rgb
    shift: Rgb


class StainTransform(Settings, frozen=True, kw_only=True):
    """The color map of one slide: a function of the pixel alone, as plain numbers.

    Attributes
    ----------
    method
        How it was fitted.
    white, target_white
        Grey levels of the glass, before and after.
    od_map
        3 x 3, rows: acts on the column vector of a pixel's natural-log OD. Identity for Reinhard.
    lab
        Set for Reinhard only.
    stain_od, stain_c99
        The slide's hematoxylin and eosin vectors (unit, OD) and the 99th percentile of their
        densities, as used; the reference's vectors for Reinhard.
    n_stained
        Pixels the fit saw that were not glass.
    notes
        What was regularized or looks odd, one line each: for the run's record.
    """

    method: Method
    white: Rgb
    od_map: tuple[Rgb, Rgb, Rgb]
    target_white: Rgb
    lab: LabShift | None = None
    stain_od: tuple[Rgb, Rgb]
    stain_c99: tuple[float, float]
    n_stained: int
    notes: tuple[str, ...] = ()

    def apply(self, rgb: Rgb8) -> Rgb8:
        """Normalize a picture.

        Parameters
        ----------
        rgb
            uint8 (..., 3).

        Returns
        -------
        ndarray
            uint8, same shape; within one grey level of the map in float64.
        """
        if self.lab is None:
            return render_od(rgb, self.white, np.array(self.od_map), self.target_white)
        return _shift_lab(rgb, self.white, self.lab, self.target_white)

    def project(self, rgb: Rgb8, rows: ArrayLike) -> Floats:
        """Apply a linear map to the normalized OD, without rounding to grey levels on the way.

        Parameters
        ----------
        rgb
            uint8 (..., 3).
        rows
            (k, 3), k <= 4.

        Returns
        -------
        ndarray
            float32 (..., k), ``rows @ od`` of the normalized picture against `target_white`.
        """
        matrix = np.asarray(rows, dtype=np.float64)
        if self.lab is None:
            return project_od(rgb, self.white, matrix @ np.array(self.od_map))
        return project_od(self.apply(rgb), self.target_white, matrix)


def fit_stain(
    pixels: Rgb8, white: ArrayLike, reference: ColorReference, method: Method = "macenko"
) -> StainTransform:
    """Fit the color map of one slide.

    Where the slide shows one stain only, the reference's stain vectors stand in, and a gain above
    `MAX_GAIN` is cut to it; both are said in `StainTransform.notes`.

    Parameters
    ----------
    pixels
        uint8 (n, 3), sampled over the slide's tissue; 1e5 are plenty.
    white
        (3,) grey levels of the slide's glass.
    reference
        Stains and white to reach.
    method
        "macenko" (extreme angles), "vahadane" (sparse dictionary) or "reinhard" (CIELAB moments).

    Returns
    -------
    StainTransform
        Applies to any picture of this slide.

    Raises
    ------
    NoTissueError
        Fewer than `MIN_STAINED_PX` of the pixels are stained.

    References
    ----------
    Macenko et al., ISBI 2009; Vahadane et al., IEEE TMI 2016; Reinhard et al., "Color transfer
    between images", IEEE CG&A 2001.
    """
    source = as_rgb(white)
    stained = pixels.reshape(-1, 3)[is_stained(pixels.reshape(-1, 3), source)]
    if len(stained) < MIN_STAINED_PX:
        raise NoTissueError(
            f"Only {len(stained)} of {pixels.size // 3} sampled pixels are stained (optical "
            f"density above 0.15 against white {source}); a color fit needs {MIN_STAINED_PX}.",
            hint="Look at the slide: is there tissue, and is its white background right?",
        )
    if method == "reinhard":
        return _fit_reinhard(stained, source, reference)
    return _fit_vectors(stained, source, reference, method)


def _fit_vectors(
    stained: Rgb8, white: Rgb, reference: ColorReference, method: Method
) -> StainTransform:
    od = rgb_to_od(stained, white)
    target = np.array(reference.he_stain_od)
    found = _macenko(od) if method == "macenko" else sparse_vectors(od, target)
    vectors, notes = _settle_vectors(found, target)
    c99 = np.percentile(unmix(od, vectors), STRONG_PERCENTILE, axis=0).astype(np.float64)
    gain, gain_notes = _settle_gain(c99, np.array(reference.he_stain_c99))
    od_map = (target.T * gain) @ np.linalg.pinv(vectors.T)
    return StainTransform(
        method=method,
        white=white,
        od_map=(as_rgb(od_map[0]), as_rgb(od_map[1]), as_rgb(od_map[2])),
        target_white=reference.white,
        stain_od=(as_rgb(vectors[0]), as_rgb(vectors[1])),
        stain_c99=(float(c99[0]), float(c99[1])),
        n_stained=len(stained),
        notes=(*notes, *gain_notes),
    )


def _macenko(od: Floats) -> Doubles:
    # Where one channel is nearly empty its angle is noise: eosin then "absorbs" negative red. A
    # slide too pale for that rule is fitted on all its stained pixels.
    firm = od[od.min(axis=1) > GLASS_OD]
    return macenko_vectors(firm if len(firm) >= MIN_STAINED_PX else od)


def _settle_vectors(found: Doubles, target: Doubles) -> tuple[Doubles, list[str]]:
    """Take the reference's vectors where the slide shows one stain; remark on odd ones."""
    spread_deg = angle_deg(found[0], found[1])
    if spread_deg < MIN_SPREAD_DEG:
        return target, [
            f"one stain only (its directions span {spread_deg:.1f} degrees): the reference's stain "
            "vectors were used"
        ]
    names = ("hematoxylin", "eosin")
    odd = [angle_deg(a, b) for a, b in zip(found, target, strict=True)]
    return found, [
        f"the {name} found lies {angle:.0f} degrees from the reference's: is this slide H&E?"
        for name, angle in zip(names, odd, strict=True)
        if angle > MAX_ODD_DEG
    ]


def _settle_gain(c99: Doubles, target_c99: Doubles) -> tuple[Doubles, list[str]]:
    gain = target_c99 / np.maximum(c99, 1e-6)
    notes = [
        f"{name} is hardly there (99th percentile {strong:.3f} OD): its gain was cut to {MAX_GAIN}"
        for name, strong, value in zip(("hematoxylin", "eosin"), c99, gain, strict=True)
        if value > MAX_GAIN
    ]
    return np.minimum(gain, MAX_GAIN), notes


def _fit_reinhard(stained: Rgb8, white: Rgb, reference: ColorReference) -> StainTransform:
    lab = _to_lab(stained, white).reshape(-1, 3).astype(np.float64)
    mean, sd = lab.mean(axis=0), lab.std(axis=0)
    target_mean, target_sd = _reference_lab(reference)
    scale = target_sd / np.maximum(sd, 1e-6)
    notes = tuple(
        f"CIELAB {name} hardly varies (sd {value:.2f}): its gain was cut to {MAX_GAIN}"
        for name, value, gain in zip("Lab", sd, scale, strict=True)
        if gain > MAX_GAIN
    )
    scale = np.minimum(scale, MAX_GAIN)
    vectors = np.array(reference.he_stain_od)
    c99 = np.percentile(unmix(rgb_to_od(stained, white), vectors), STRONG_PERCENTILE, axis=0)
    return StainTransform(
        method="reinhard",
        white=white,
        od_map=((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
        target_white=reference.white,
        lab=LabShift(scale=as_rgb(scale), shift=as_rgb(target_mean - mean * scale)),
        stain_od=reference.he_stain_od,
        stain_c99=(float(c99[0]), float(c99[1])),
        n_stained=len(stained),
        notes=notes,
    )


def _reference_lab(reference: ColorReference) -> tuple[Doubles, Doubles]:
    """Derive the reference's CIELAB moments from its stains.

    A `ColorReference` holds vectors and strengths, no picture. So a model tissue is rendered: both
    densities independent and gamma distributed (shape 2), scaled to their 99th percentiles.
    """
    x = np.linspace(0.0, 12.0, 4096)
    cumulative = 1.0 - (1.0 + x) * np.exp(-x)
    at = (np.arange(48) + 0.5) / 48
    unit = np.interp(at, cumulative, x) / np.interp(STRONG_PERCENTILE / 100, cumulative, x)
    c99 = reference.he_stain_c99
    density = np.stack(np.meshgrid(unit * c99[0], unit * c99[1]), axis=-1).reshape(-1, 2)
    rgb = od_to_rgb(density @ np.array(reference.he_stain_od), reference.white)
    stained = rgb[is_stained(rgb, reference.white)]
    lab = _to_lab(stained, reference.white).reshape(-1, 3).astype(np.float64)
    return lab.mean(axis=0), lab.std(axis=0)


def _to_lab(rgb: Rgb8, white: Rgb) -> Floats:
    """Convert to CIELAB with the glass as white: float32 (n, 1, 3), L 0..100."""
    line = np.ascontiguousarray(rgb).reshape(-1, 1, 3)
    levels = np.arange(256, dtype=np.float64)[None, :, None]
    table = np.minimum(levels / np.array(white), 1.0).astype(np.float32)
    return np.asarray(cv2.cvtColor(cv2.LUT(line, table), cv2.COLOR_RGB2Lab), dtype=np.float32)


def _shift_lab(rgb: Rgb8, white: Rgb, lab: LabShift, target: Rgb) -> Rgb8:
    if rgb.size == 0:
        return rgb.copy()
    matrix = np.column_stack([np.diag(lab.scale), np.array(lab.shift)])
    moved = cv2.transform(_to_lab(rgb, white), matrix)
    levels = cv2.transform(cv2.cvtColor(moved, cv2.COLOR_Lab2RGB), np.diag(target))
    return np.asarray(cv2.convertScaleAbs(np.maximum(levels, 0.0)), np.uint8).reshape(rgb.shape)
