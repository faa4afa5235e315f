"""Optical density: grey levels to absorbed light and back, and its split into stains.

Room 2 of 4. In: uint8 RGB and the white of the glass. Out: natural-log optical density (OD),
stain densities, a soft glass mask. Not here: fits, references, files.

One convention holds everywhere, ``od = -ln(max(I, 1) / white)`` (Beer-Lambert). The one exception
is `dab_od`, which judges results in the log10 form that published tables use.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from wsi_stain.config import Rgb
from wsi_stain.stain.curve import rise

__all__ = [
    "GLASS_OD",
    "GLASS_REACH_PX",
    "HDX",
    "POSITIVE_OD",
    "as_rgb",
    "dab_od",
    "glass_alpha",
    "is_stained",
    "lay_glass",
    "od_to_rgb",
    "project_od",
    "render_od",
    "rgb_to_od",
    "unmix",
]

Floats = NDArray[np.float32]
Rgb8 = NDArray[np.uint8]

GLASS_OD = 0.15  # natural-log OD below which a channel counts as empty
# Where glass begins to fade into tissue. Half-way the fade meets `GLASS_OD`: begun at that OD, it
# took the palest tissue with it.
BARE_OD = 0.08
POSITIVE_OD = 0.15  # log10 DAB OD above which a pixel counts as positive
GLASS_SIGMA_PX = 1.5
GLASS_REACH_PX = math.ceil(3 * GLASS_SIGMA_PX)  # how far a pixel's glass mask looks
_H = (0.650, 0.704, 0.286)
_DAB = (0.268, 0.570, 0.776)
HDX = np.array([_H, _DAB, np.cross(_H, _DAB)])
"""Hematoxylin, DAB and their normal, as scikit-image's ``hdx`` (Ruifrok and Johnston 2001)."""
HDX.setflags(write=False)

# 3 float32 per pixel: the buffers of one chunk stay in the second-level cache.
_CHUNK_PX = 1 << 15
_LANES_PX = 64
# Rounding to integers overflows above exp(21); 16 is far brighter than any white.
_MAX_LOG_LEVEL = 16.0


def as_rgb(values: Any) -> Rgb:
    """Give three numbers as the plain tuple that settings and manifests hold."""
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def rgb_to_od(rgb: Rgb8, white: ArrayLike) -> Floats:
    """Turn grey levels into OD, ``-ln(max(I, 1) / white)``.

    Parameters
    ----------
    rgb
        uint8 (..., 3).
    white
        (3,) grey levels of the glass, positive.

    Returns
    -------
    ndarray
        float32 (..., 3), natural-log OD; negative where a pixel is brighter than the glass.
    """
    if rgb.size == 0:
        return np.zeros(rgb.shape, np.float32)
    od = cv2.LUT(np.ascontiguousarray(rgb).reshape(-1, 1, 3), _od_table(white))
    return np.asarray(od, dtype=np.float32).reshape(rgb.shape)


def od_to_rgb(od: NDArray[Any], white: ArrayLike) -> Rgb8:
    """Turn OD into grey levels, ``white * exp(-od)``, rounded to the nearest and clipped.

    Parameters
    ----------
    od
        float (..., 3), natural-log OD.
    white
        (3,) grey levels of the glass.

    Returns
    -------
    ndarray
        uint8, shape of `od`. Inverse of `rgb_to_od` for every level from 1 up.
    """
    levels = np.asarray(white, dtype=np.float64) * np.exp(-np.asarray(od, dtype=np.float64))
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)


def project_od(rgb: Rgb8, white: ArrayLike, rows: NDArray[Any]) -> Floats:
    """Apply a linear map to every pixel's OD, the fast path for densities.

    Parameters
    ----------
    rgb
        uint8 (..., 3).
    white
        (3,) grey levels of the glass.
    rows
        (k, 3), 1 <= k <= 4: each row gives one output channel.

    Returns
    -------
    ndarray
        float32 (..., k): ``rows @ od``.
    """
    shape = (*rgb.shape[:-1], len(rows))
    if rgb.size == 0:
        return np.zeros(shape, np.float32)
    n_out = len(rows)
    matrix = np.asarray(rows, dtype=np.float64)
    if n_out == 2:  # OpenCV is ten times faster with three
        matrix = np.vstack([matrix, np.zeros(3)])
    table = _od_table(white)
    line, n = _line(rgb)
    out = np.empty((n, n_out), np.float32)
    for start in range(0, n, _CHUNK_PX):
        od = cv2.LUT(line[start : start + _CHUNK_PX + _LANES_PX], table)
        place = out[start : start + _CHUNK_PX]
        found = cv2.transform(od, matrix).reshape(-1, len(matrix))
        for channel in range(n_out):
            place[:, channel] = found[: len(place), channel]
    return out.reshape(shape)


def render_od(rgb: Rgb8, white: ArrayLike, od_map: NDArray[Any], target: ArrayLike) -> Rgb8:
    """Map OD linearly and render it, ``target * exp(-od_map @ od)``: the fast path for pictures.

    A table look-up, a 3 x 4 product and an exponential per pixel, in float32; within one grey
    level of the same arithmetic in float64.

    Parameters
    ----------
    rgb
        uint8 (..., 3).
    white, target
        (3,) grey levels of the glass, before and after.
    od_map
        (3, 3), acts on the column vector of one pixel's OD.

    Returns
    -------
    ndarray
        uint8, shape of `rgb`.
    """
    if rgb.size == 0:
        return rgb.copy()
    log_white = np.log(np.asarray(target, dtype=np.float64))
    log_map = np.column_stack([-np.asarray(od_map, dtype=np.float64), log_white])
    table = _od_table(white)
    reach = log_white + np.abs(log_map[:, :3]) @ np.abs(table).max(axis=(0, 1))
    may_overflow = bool(reach.max() > _MAX_LOG_LEVEL)
    line, n = _line(rgb)
    out = np.empty((n, 1, 3), np.uint8)
    for start in range(0, n, _CHUNK_PX):
        od = cv2.LUT(line[start : start + _CHUNK_PX + _LANES_PX], table)
        log_level = cv2.transform(od, log_map)
        if may_overflow:
            np.minimum(log_level, np.float32(_MAX_LOG_LEVEL), out=log_level)
        place = out[start : start + _CHUNK_PX]
        levels = cv2.convertScaleAbs(cv2.exp(log_level))
        place[:] = levels[: len(place)].reshape(place.shape)
    return out.reshape(rgb.shape)


def unmix(od: NDArray[Any], stains: ArrayLike) -> Floats:
    """Split OD into stain densities by least squares.

    Parameters
    ----------
    od
        float (..., 3).
    stains
        (k, 3) stain vectors, k <= 3, linearly independent.

    Returns
    -------
    ndarray
        float32 (..., k), not clipped: noise makes densities of absent stains slightly negative.
    """
    inverse = np.linalg.pinv(np.asarray(stains, dtype=np.float64))
    return (np.asarray(od) @ inverse.astype(np.float32)).astype(np.float32, copy=False)


def dab_od(rgb: Rgb8, clip: Literal["zero", "softplus"] = "zero") -> Floats:
    """Measure DAB as published tables do: log10(255 / I), unmixed by `HDX`, clipped at 0.

    scikit-image's ``rgb2hed`` family divides by ln(1e-6) instead and gives 6.0 times less.

    Parameters
    ----------
    rgb
        uint8 (..., 3).
    clip
        "softplus" (beta 5) instead of a hard 0, as facevoid/UNIStainNet; glass then reads 0.139.

    Returns
    -------
    ndarray
        float32 (...), log10 optical density, 0 and up.
    """
    row = np.linalg.inv(HDX)[:, 1] / math.log(10.0)
    dab = project_od(rgb, (255.0, 255.0, 255.0), row[None])[..., 0]
    if clip == "softplus":
        soft: Floats = np.logaddexp(np.float32(0.0), np.float32(5.0) * dab) / np.float32(5.0)
        return soft
    return np.maximum(dab, 0.0)


def is_stained(rgb: Rgb8, white: ArrayLike, od_limit: float = GLASS_OD) -> NDArray[np.bool_]:
    """Tell which pixels are not glass: OD above the limit in at least one channel.

    Parameters
    ----------
    rgb
        uint8 (..., 3).
    white
        (3,) grey levels of the glass.

    Returns
    -------
    ndarray
        bool (...).
    """
    if rgb.size == 0:
        return np.zeros(rgb.shape[:-1], np.bool_)
    # OD falls as levels rise: of each channel the first that is glass, exactly as the OD says.
    first_glass = np.count_nonzero(_od_table(white)[0] > od_limit, axis=0).astype(np.float64)
    line = np.ascontiguousarray(rgb).reshape(-1, 1, 3)
    glass = cv2.inRange(line, first_glass, np.full(3, 255.0))
    return np.asarray(glass == 0).reshape(rgb.shape[:-1])


def glass_alpha(
    rgb: Rgb8,
    white: ArrayLike,
    od_limit: float = BARE_OD,
    soft: float = 0.10,
    sigma_px: float = GLASS_SIGMA_PX,
) -> Floats:
    """Tell softly which pixels are bare glass, so that a picture can fade into white there.

    The largest of the three ODs is smoothed over `sigma_px` (JPEG noise in pale stroma would
    punch single holes), then falls from 1 to 0 on a smoothstep, whose slope is 0 at both ends.

    Parameters
    ----------
    rgb
        uint8 (h, w, 3) or (n, h, w, 3); any (..., 3) where ``sigma_px=0``.
    white
        (3,) grey levels of the glass.
    od_limit
        Natural-log OD: 1 where all channels lie below.
    soft
        Width of the ramp in OD: 0 from ``od_limit + soft`` up.
    sigma_px
        Gaussian smoothing; a pixel's value depends on `GLASS_REACH_PX` around it, so tiles need
        at least that much overlap. 0 makes the mask a function of the pixel alone.

    Returns
    -------
    ndarray
        float32 (...), 0..1, 1 on glass.
    """
    if sigma_px == 0.0:
        return _pixel_alpha(rgb, white, od_limit, soft)
    depth = _largest(rgb_to_od(rgb, white))
    if depth.size:
        size_px = 2 * math.ceil(3 * sigma_px) + 1
        for plane in depth.reshape(-1, *depth.shape[-2:]):
            cv2.GaussianBlur(
                plane, (size_px, size_px), sigma_px, dst=plane, borderType=cv2.BORDER_REFLECT_101
            )
    return 1.0 - rise(depth, od_limit, od_limit + soft)


def _pixel_alpha(rgb: Rgb8, white: ArrayLike, od_limit: float, soft: float) -> Floats:
    """Mask each pixel alone: three byte tables, since the largest OD has the smallest alpha."""
    if rgb.size == 0:
        return np.zeros(rgb.shape[:-1], np.float32)
    alpha = 1.0 - rise(_od_table(white), od_limit, od_limit + soft)
    codes = np.rint(255.0 * alpha).astype(np.uint8)
    red, green, blue = cv2.split(cv2.LUT(rgb.reshape(1, -1, 3), codes))
    smallest = np.asarray(cv2.min(cv2.min(red, green), blue), dtype=np.float32)
    return (smallest / np.float32(255.0)).reshape(rgb.shape[:-1])


def lay_glass(picture: Rgb8, he: Rgb8, white: ArrayLike, target: ArrayLike) -> Rgb8:
    """Lay white over a picture where its H&E shows glass, softly: lumina stay open.

    Parameters
    ----------
    picture, he
        uint8 (h, w, 3) or (n, h, w, 3), the same place.
    white
        (3,) grey levels of the glass of `he`.
    target
        (3,) grey levels of the glass of `picture`.

    Returns
    -------
    ndarray
        uint8, shape of `picture`.
    """
    levels = np.asarray(target, np.float32)
    laid = picture.copy()
    shape = (-1, *picture.shape[-3:])
    # One by one and plane by plane: what is computed for one stays in a core's cache.
    for tile, seen in zip(laid.reshape(shape), he.reshape(shape), strict=True):
        alpha = glass_alpha(seen, white)
        if not alpha.any():
            continue
        for channel, level in enumerate(levels):
            plane = tile[..., channel].astype(np.float32)
            tile[..., channel] = np.rint(plane + alpha * (level - plane))
    return laid


def _largest(od: Floats) -> Floats:
    """Take the largest channel; six times faster than ``max(axis=-1)`` over an axis of three."""
    return np.maximum(np.maximum(od[..., 0], od[..., 1]), od[..., 2])


def _od_table(white: ArrayLike) -> Floats:
    """Tabulate the OD of all grey levels: float32 (1, 256, 3), the form that `cv2.LUT` wants."""
    levels = np.maximum(np.arange(256, dtype=np.float64), 1.0)
    table = -np.log(levels[None, :, None] / np.asarray(white, dtype=np.float64))
    return table.astype(np.float32)


def _line(rgb: Rgb8) -> tuple[Rgb8, int]:
    """Copy any (..., 3) into the (n + 64.., 1, 3) picture that OpenCV works on, and give its n.

    OpenCV rounds the last pixels of a call, those that fill no vector register, differently in the
    last bit. A pixel's color must not depend on where in a tile it lies, so each call gets more
    pixels than are kept.
    """
    n = rgb.size // 3
    line = np.zeros((n + _LANES_PX + -n % _LANES_PX, 1, 3), np.uint8)
    line[:n] = rgb.reshape(-1, 1, 3)
    return line, n
