"""Does a net repeat its training images? The nearest training patch of each sample.

In: patches, training images. Out: distances, a picture of pairs. Not here: sampling, files.

The distance of two patches is 1 - r, with r the correlation of their pixels (each channel's mean
taken off), at a quarter of the resolution: 0 is a copy, 1 unlike. The nearest is sought at every
place of every training image, in all eight orientations, but not in other scales. How near a copy
comes, and how far new tissue lies, is told by training crops as they are varied for training, and
by held-out crops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from wsi_stain.errors import ConfigError

__all__ = ["Bank", "Group", "Match", "Memorization", "compare", "draw_pairs"]

Image = NDArray[np.uint8]
Floats = NDArray[np.float32]

REDUCE = 4
FLAT_SD = 6.0  # grey levels at a quarter of the resolution: bare glass is like bare glass
SHOWN_PAIRS = 8
GAP_PX, TEXT_PX = 6, 18


@dataclass(frozen=True)
class Match:
    """The training patch nearest to a patch.

    Attributes
    ----------
    distance
        1 - r, 0..2.
    patch
        uint8 (p, p, 3), turned like the query.
    """

    distance: float
    patch: Image


@dataclass(frozen=True)
class Group:
    """Patches of one origin with their nearest training patches; flat ones are left out.

    Attributes
    ----------
    patches
        uint8 (n, p, p, 3).
    matches
        One each.
    """

    patches: Image
    matches: tuple[Match, ...]

    @property
    def distances(self) -> NDArray[np.float64]:
        """float64 (n,)."""
        return np.array([match.distance for match in self.matches])


@dataclass(frozen=True)
class Memorization:
    """How near samples lie to training images, against held-out and training crops.

    Attributes
    ----------
    samples, held_out, training
        Median distances; "training" are crops varied as in training, which a copy resembles.
    ratio
        samples / held_out: 1 is as new as new tissue.
    copies_fraction
        Share of samples nearer than all but 5 % of the held-out crops: 0.05 where nothing is
        memorized.
    n
        Patches of each group that were not flat.
    """

    samples: float
    held_out: float
    training: float
    ratio: float
    copies_fraction: float
    n: tuple[int, int, int]


class Bank:
    """Training images, reduced for the search.

    Parameters
    ----------
    images
        uint8 (h, w, 3) each.
    patch_px
        Side of the patches that are sought, a multiple of 4.

    Raises
    ------
    ConfigError
        No image is as large as a patch.
    """

    def __init__(self, images: Sequence[Image], patch_px: int) -> None:
        self.patch_px = patch_px
        self.images = [image for image in images if min(image.shape[:2]) >= patch_px]
        if not self.images:
            raise ConfigError(f"No training image is as large as a patch of {patch_px} px.")
        self._small = [_reduce(image) for image in self.images]
        self._textured = [_textured(small, patch_px // REDUCE) for small in self._small]

    def nearest(self, patch: Image) -> Match:
        """Find the nearest training patch of uint8 (p, p, 3)."""
        best, found = -2.0, (0, 0, 0, 0)
        for turn in range(8):
            query = _reduce(np.ascontiguousarray(_turn(patch, turn)))
            for i, small in enumerate(self._small):
                likeness = cv2.matchTemplate(small, query, cv2.TM_CCOEFF_NORMED)
                likeness = np.where(self._textured[i], likeness, -1.0)
                place = int(likeness.argmax())
                if likeness.flat[place] > best:
                    best = float(likeness.flat[place])
                    found = (turn, i, *divmod(place, likeness.shape[1]))
        turn, i, row, column = found
        y, x, side = row * REDUCE, column * REDUCE, self.patch_px
        return Match(1.0 - best, _turn_back(self.images[i][y : y + side, x : x + side], turn))

    def group(self, patches: Image) -> Group:
        """Find the nearest training patch of each patch that is not flat.

        Raises
        ------
        ConfigError
            All are flat.
        """
        kept = np.stack(
            [p for p in patches if _reduce(p).std(axis=(0, 1)).mean() > FLAT_SD]
            or [np.zeros((0, 0, 3), np.uint8)]
        )
        if kept.size == 0:
            raise ConfigError("All patches are flat: there is nothing to compare.")
        return Group(kept, tuple(self.nearest(patch) for patch in kept))


def compare(samples: Group, held_out: Group, training: Group) -> Memorization:
    """Set the distances of samples against those of held-out and of training crops."""
    medians = [float(np.median(g.distances)) for g in (samples, held_out, training)]
    near = np.quantile(held_out.distances, 0.05)
    return Memorization(
        samples=medians[0],
        held_out=medians[1],
        training=medians[2],
        ratio=medians[0] / max(medians[1], 1e-9),
        copies_fraction=float((samples.distances < near).mean()),
        n=(len(samples.matches), len(held_out.matches), len(training.matches)),
    )


def draw_pairs(group: Group) -> Image:
    """Draw the eight nearest pairs: patch above, nearest training patch below, distance under it.

    Returns
    -------
    ndarray
        uint8 (h, w, 3).
    """
    order = np.argsort(group.distances)[:SHOWN_PAIRS]
    columns = []
    for i in order:
        top, match = group.patches[i], group.matches[i]
        text = np.full((TEXT_PX, top.shape[1], 3), 255, np.uint8)
        place = (2, TEXT_PX - 5)
        font = cv2.FONT_HERSHEY_SIMPLEX
        cv2.putText(text, f"{match.distance:.2f}", place, font, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
        line = np.full((GAP_PX, top.shape[1], 3), 255, np.uint8)
        column = np.concatenate([top, line, match.patch, text], axis=0)
        columns.append(np.pad(column, ((0, 0), (0, GAP_PX), (0, 0)), constant_values=255))
    return np.concatenate(columns, axis=1)


def _reduce(image: Image) -> Floats:
    size = (image.shape[1] // REDUCE, image.shape[0] // REDUCE)
    whole = image[: size[1] * REDUCE, : size[0] * REDUCE]
    return np.asarray(cv2.resize(whole, size, interpolation=cv2.INTER_AREA), np.float32)


def _textured(small: Floats, side: int) -> NDArray[np.bool_]:
    """Tell where a window is not flat: correlation with flat windows is rounding noise."""
    mean = cv2.boxFilter(small, cv2.CV_32F, (side, side), anchor=(0, 0))
    square = cv2.boxFilter(small * small, cv2.CV_32F, (side, side), anchor=(0, 0))
    sd = np.sqrt(np.maximum(square - mean * mean, 0.0)).mean(axis=2)
    rows, columns = small.shape[0] - side + 1, small.shape[1] - side + 1
    return np.asarray(sd[:rows, :columns] > FLAT_SD)


def _turn(patch: Image, turn: int) -> Image:
    flipped = patch[:, ::-1] if turn >= 4 else patch
    return np.rot90(flipped, turn % 4)


def _turn_back(patch: Image, turn: int) -> Image:
    straight = np.rot90(patch, -(turn % 4))
    return np.ascontiguousarray(straight[:, ::-1] if turn >= 4 else straight)
