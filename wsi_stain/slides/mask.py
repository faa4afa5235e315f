"""TissueMask: where on the slide there is tissue.

Room 1 of 4. In: a thumbnail of uint8 (h, w, 3) sRGB at about 8 um/px. Out: a mask, and the share of
tissue under any rectangle. Not here: reading slides, tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from skimage import filters, measure, morphology

from wsi_stain.geometry import Region
from wsi_stain.slides.slide_facts import Pixels

__all__ = ["TissueMask", "find_tissue"]

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
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


@dataclass(frozen=True, eq=False)
class TissueMask:
    """A mask of tissue in the slide's bounds rectangle.

    Attributes
    ----------
    pixels
        bool (h, w), true where there is tissue.
    mpp
        Pixel size of the mask, um/px.
    downsample
        Level-0 px per mask px.
    """

    pixels: Bools
    mpp: float
    downsample: float
    _integral: npt.NDArray[np.uint32] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        integral = np.zeros((self.pixels.shape[0] + 1, self.pixels.shape[1] + 1), np.uint32)
        inner = integral[1:, 1:]
        np.cumsum(self.pixels, axis=0, dtype=np.uint32, out=inner)
        np.cumsum(inner, axis=1, out=inner)
        object.__setattr__(self, "_integral", integral)

    @property
    def tissue_fraction(self) -> float:
        """Share of the slide that is tissue, 0..1."""
        return float(self.pixels.mean()) if self.pixels.size else 0.0

    def fraction(self, region: Region, factor: float = 1.0) -> float:
        """Give the share of a rectangle that is tissue; what lies outside of the slide is not.

        Parameters
        ----------
        region
            In px of `factor` level-0 px: 1 for level 0, ``scale.factor`` for the out frame.
        factor
            Level-0 px per px of `region`.
        """
        corners = np.array([[region.x_px, region.y_px, region.right_px, region.bottom_px]])
        return float(self.fractions(corners, factor)[0])

    def fractions(self, boxes: npt.NDArray[np.integer], factor: float = 1.0) -> Floats:
        """Give the shares of many rectangles.

        Parameters
        ----------
        boxes
            Integers (N, 4): left, top, right, bottom, in px of `factor` level-0 px.
        factor
            Level-0 px per px of `boxes`.

        Returns
        -------
        ndarray
            float64 (N,), 0..1, exact also where edges cut mask pixels.
        """
        left, top, right, bottom = (boxes * (factor / self.downsample)).T
        inside = (
            self._area(right, bottom)
            - self._area(left, bottom)
            - self._area(right, top)
            + self._area(left, top)
        )
        return np.asarray(np.clip(inside / ((right - left) * (bottom - top)), 0.0, 1.0))

    def _area(self, x: Floats, y: Floats) -> Floats:
        """Integrate from the corner to (x, y): bilinear in between, as a pixel is constant."""
        height, width = self.pixels.shape
        x, y = np.clip(x, 0, width), np.clip(y, 0, height)
        column = np.minimum(x.astype(np.intp), width - 1)
        row = np.minimum(y.astype(np.intp), height - 1)
        dx, dy = x - column, y - row
        upper = self._integral[row, column] * (1 - dx) + self._integral[row, column + 1] * dx
        lower = (
            self._integral[row + 1, column] * (1 - dx) + self._integral[row + 1, column + 1] * dx
        )
        return np.asarray(upper * (1 - dy) + lower * dy)


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
