"""TissueMask: the share of tissue under any rectangle of a slide.

Room 1 of 4. In: a mask. Out: shares. Not here: how tissue is found (`tissue`), tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from wsi_stain.geometry import Region

__all__ = ["TissueMask"]

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


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
