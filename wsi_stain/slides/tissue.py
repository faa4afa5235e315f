"""Where on the slide there is tissue.

Room 1 of 4. In: a thumbnail of uint8 (h, w, 3) sRGB at about 8 um/px. Out: a mask. Not here:
reading slides, tiles. Nor is it in `mask`: those who only look a mask up need no scikit-image,
which takes a quarter of a second to import.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from skimage import filters, measure, morphology

from wsi_stain.slides.mask import TissueMask
from wsi_stain.slides.slide_facts import Pixels

__all__ = ["find_tissue"]

Bools = npt.NDArray[np.bool_]
Densities = npt.NDArray[np.float32]

# Given types here, since skimage gives them none.
_gaussian: Callable[..., Densities] = filters.gaussian
_otsu: Callable[[Densities], float] = filters.threshold_otsu
_label: Callable[[Bools], npt.NDArray[np.intp]] = measure.label
_disk: Callable[[int], npt.NDArray[np.uint8]] = morphology.disk

# Chroma: difference of the largest and smallest channel's optical density. Glass, dust, bubbles
# and shadows are grey, whatever their darkness; eosin has 0.6 per unit density, hematoxylin 0.4.
LEAST_CHROMA_OD = 0.045
MOST_CHROMA_OD = 0.12
SMALLEST_PIECE_UM2 = 1e4
SMALLEST_HOLE_UM2 = 4e4
INK_RIM_UM = 16.0
MOSTLY_INK = 0.6
USUAL_GLASS = 243.0
BAND_PX = 256


def find_tissue(thumbnail: Pixels, *, mpp: float, downsample: float) -> TissueMask:
    """Find stained tissue; leave glass, dust, shadows and pen marks.

    Otsu's threshold on smoothed chroma (largest minus smallest optical density over the channels),
    held between bounds: on a slide of glass alone it would split noise, on one without glass it
    would split nuclei from stroma. Then specks go, holes close, and ink goes.

    Parameters
    ----------
    thumbnail
        uint8 (h, w, 3), sRGB.
    mpp
        Its pixel size, um/px.
    downsample
        Level-0 px per thumbnail px.

    Returns
    -------
    TissueMask
        Empty (all false) where nothing is stained.
    """
    chroma, ink = _chroma_and_ink(thumbnail)
    chroma = _gaussian(chroma, sigma=8.0 / mpp, preserve_range=True)
    if chroma.max() <= LEAST_CHROMA_OD:
        return TissueMask(np.zeros(chroma.shape, np.bool_), mpp, downsample)
    threshold = np.clip(_otsu(chroma), LEAST_CHROMA_OD, MOST_CHROMA_OD)
    smallest_px = int(SMALLEST_PIECE_UM2 / (mpp * mpp))
    tissue = morphology.remove_small_objects(chroma > threshold, max_size=smallest_px)
    tissue = morphology.remove_small_holes(tissue, max_size=int(SMALLEST_HOLE_UM2 / (mpp * mpp)))
    tissue = _without_ink(tissue, ink, INK_RIM_UM / mpp)
    # Smaller now: what a pen cuts off a piece of tissue is tissue still.
    tissue = morphology.remove_small_objects(tissue, max_size=smallest_px // 4)
    return TissueMask(tissue, mpp, downsample)


def _chroma_and_ink(thumbnail: Pixels) -> tuple[Densities, Bools]:
    """Give the chroma and the pen marks of each pixel, band by band.

    A whole slide has tens of megapixels here, and what is computed for one takes 30 bytes.
    """
    glass = _glass(thumbnail)
    chroma = np.empty(thumbnail.shape[:2], np.float32)
    ink = np.empty(thumbnail.shape[:2], np.bool_)
    for top in range(0, len(thumbnail), BAND_PX):
        band = slice(top, top + BAND_PX)
        density = _density(thumbnail[band], glass)
        chroma[band] = density.max(axis=-1) - density.min(axis=-1)
        ink[band] = _ink(density)
    return chroma, ink


def _density(pixels: Pixels, glass: tuple[float, ...]) -> Densities:
    """Compute ``-ln(I / glass)``, float32 (h, w, 3), not below 0."""
    table = -np.log(np.maximum(np.arange(256.0), 1.0))
    density = np.empty(pixels.shape, np.float32)
    for channel, level in enumerate(glass):
        lookup = np.maximum(table + np.log(level), 0.0).astype(np.float32)
        density[..., channel] = lookup[pixels[..., channel]]
    return density


def _glass(thumbnail: Pixels) -> tuple[float, ...]:
    """Estimate the glass: the palest 1 %, if pale and neutral; else there is none in view."""
    pixels = thumbnail.reshape(-1, 3)
    palest = pixels.min(axis=1)
    color = np.median(pixels[palest >= np.percentile(palest, 99)], axis=0)
    neutral = color.min() >= 185 and color.max() - color.min() <= 30
    return tuple(color.tolist()) if neutral else (USUAL_GLASS,) * 3


def _ink(density: Densities) -> Bools:
    """Tell pen marks by hue: H&E absorbs green most, so ink that does not is no stain."""
    red, green, blue = np.moveaxis(density, -1, 0)
    spread = density.max(axis=-1) - density.min(axis=-1)
    blue_pen = (red > 0.7) & (red > 1.2 * green)
    green_pen = (red > 0.5) & (green < 0.9 * np.minimum(red, blue))
    red_pen = (green > 0.8) & (blue > 0.97 * green) & (red < 0.35 * green)
    black_pen = (density.min(axis=-1) > 1.2) & (spread < 0.25 * density.mean(axis=-1))
    return np.asarray(blue_pen | green_pen | red_pen | black_pen)


def _without_ink(tissue: Bools, ink: Bools, rim_px: float) -> Bools:
    """Take ink and its blurred rim away, and pieces that are mostly ink."""
    ink = morphology.remove_small_objects(ink, max_size=8)
    if not ink.any():
        return tissue
    pieces = _label(tissue | ink)
    n_px = np.bincount(pieces.ravel())
    n_ink_px = np.bincount(pieces.ravel(), weights=ink.ravel())
    stays = n_ink_px < MOSTLY_INK * n_px
    rim = morphology.dilation(ink, _disk(max(1, round(rim_px))))
    return np.asarray(tissue & stays[pieces] & ~rim)
