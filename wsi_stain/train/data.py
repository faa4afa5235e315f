"""Training crops: drawn from images with chance by area and weight, varied, or fixed to judge by.

In: `TrainImage`s, a random generator. Out: float32 batches. Not here: files, nets, losses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from wsi_stain.config import DataConfig
from wsi_stain.train.images import TrainImage
from wsi_stain.translate.pixels import to_model

__all__ = ["ImageSet", "measure_mean_sd"]

# H and DAB directions (Ruifrok and Johnston 2001) and their normal: the frame of the stain jitter.
_STAINS = np.array([[0.650, 0.704, 0.286], [0.268, 0.570, 0.776], [0.754, -0.598, 0.273]])

Image = NDArray[np.uint8]


class ImageSet:
    """Draws varied crops from a list of images; all randomness comes from the caller.

    Parameters
    ----------
    images
        Decoded images.
    config
        Crop size, jitter and weights.
    """

    def __init__(self, images: Sequence[TrainImage], config: DataConfig) -> None:
        self.images = list(images)
        self.config = config
        areas = [im.rgb.shape[0] * im.rgb.shape[1] for im in self.images]
        weights = [
            area * config.weights.get(im.source, 1.0)
            for im, area in zip(self.images, areas, strict=True)
        ]
        self._chance = np.asarray(weights) / np.sum(weights)

    def area_px(self) -> int:
        """Pixels in all."""
        return sum(image.rgb.shape[0] * image.rgb.shape[1] for image in self.images)

    def digest(self) -> str:
        """SHA-256 over the pixels, in order: which data a run has seen."""
        sha = hashlib.sha256()
        for image in self.images:
            sha.update(image.rgb.tobytes())
        return sha.hexdigest()

    def batch(
        self, n: int, rng: np.random.Generator, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Draw n crops.

        Returns
        -------
        torch.Tensor
            float32 (n, 3, crop_px, crop_px) in [-1, 1], on the device.
        """
        picks = rng.choice(len(self.images), size=n, p=self._chance)
        return to_model(np.stack([self._crop(self.images[i].rgb, rng) for i in picks]), device)

    def fixed(self, n: int, seed: int) -> torch.Tensor:
        """Draw n crops without variation, the same for a seed, spread over all images.

        Returns
        -------
        torch.Tensor
            float32 (n, 3, crop_px, crop_px) in [-1, 1]; n images at even distances in the list
            where there are more than n, else each in turn.
        """
        n_images = len(self.images)
        order = [i * n_images // n if n < n_images else i % n_images for i in range(n)]
        return self._pieces(order, seed)

    def first(self, n: int, seed: int) -> torch.Tensor:
        """Draw n crops without variation, one from each image in turn, from the first on."""
        return self._pieces([i % len(self.images) for i in range(n)], seed)

    def _pieces(self, order: Sequence[int], seed: int) -> torch.Tensor:
        rng = np.random.default_rng(seed)
        size = self.config.crop_px
        crops = []
        for i in order:
            rgb = self.images[i].rgb
            y = int(rng.integers(rgb.shape[0] - size + 1))
            x = int(rng.integers(rgb.shape[1] - size + 1))
            crops.append(rgb[y : y + size, x : x + size])
        return to_model(np.stack(crops))

    def _crop(self, rgb: Image, rng: np.random.Generator) -> Image:
        size, jitter = self.config.crop_px, self.config.scale_jitter
        scale = min(rng.uniform(1 - jitter, 1 + jitter), min(rgb.shape[:2]) / size)
        side = round(size * scale)
        y = int(rng.integers(rgb.shape[0] - side + 1))
        x = int(rng.integers(rgb.shape[1] - side + 1))
        crop = rgb[y : y + side, x : x + side]
        if side != size:
            how = cv2.INTER_AREA if side > size else cv2.INTER_CUBIC
            crop = np.asarray(cv2.resize(crop, (size, size), interpolation=how), np.uint8)
        crop = np.rot90(crop, int(rng.integers(4)))
        if rng.integers(2):
            crop = crop[:, ::-1]
        return _jitter_stain(crop, self.config.stain_jitter, rng)


def _jitter_stain(rgb: Image, spread: float, rng: np.random.Generator) -> Image:
    """Scale each stain's optical density by a few per cent: one 3x3 map in OD."""
    gains = 1.0 + spread * rng.standard_normal(3)
    od_map = np.linalg.inv(_STAINS) @ np.diag(gains) @ _STAINS
    od = -np.log(np.maximum(rgb, 1).astype(np.float32) / 255.0) @ od_map.astype(np.float32)
    jittered: Image = np.clip(np.rint(255.0 * np.exp(-od)), 0, 255).astype(np.uint8)
    return jittered


def measure_mean_sd(images: ImageSet, n: int = 64) -> tuple[tuple[float, ...], float]:
    """Measure channel means and the common spread of fixed crops, both in [-1, 1] units."""
    # A net keeps the numbers that it was trained with: whichever crops these are, they must stay.
    crops = images.first(n, seed=0)
    mean = crops.mean(dim=(0, 2, 3))
    spread = float((crops - mean.view(1, 3, 1, 1)).square().mean().sqrt())
    return tuple(round(float(m), 4) for m in mean), round(spread, 4)
