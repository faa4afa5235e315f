"""Training images: find them, bring their glass to one white, cut varied crops.

In: a `DataConfig` and a random generator. Out: float32 batches. Not here: nets, losses.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from wsi_stain.config import DataConfig
from wsi_stain.errors import ConfigError
from wsi_stain.translate.pixels import to_model

__all__ = ["ImageSet", "TrainImage", "load_images", "measure_mean_sd"]

WHITE_PERCENTILE = 98.0
# H and DAB directions (Ruifrok and Johnston 2001) and their normal: the frame of the stain jitter.
_STAINS = np.array([[0.650, 0.704, 0.286], [0.268, 0.570, 0.776], [0.754, -0.598, 0.273]])

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class TrainImage:
    """One decoded training image.

    Attributes
    ----------
    path
        File it came from.
    source
        First two folders of the path under the root: the unit of weights, whites and licences.
    licence
        As the manifest states it, or "not stated".
    rgb
        uint8 (h, w, 3), glass brought to the common white.
    """

    path: Path
    source: str
    licence: str
    rgb: Image


def load_images(config: DataConfig, split: str) -> list[TrainImage]:
    """Find and decode the images of one split.

    Parameters
    ----------
    config
        Root folder, manifest and filters, or plain folders of images (then every fifth image by
        sorted name is "val" and the rest "train").
    split
        "train" or "val".

    Returns
    -------
    list of TrainImage
        Sorted by path.

    Raises
    ------
    ConfigError
        No manifest and no folders, a file that cannot be decoded, an image smaller than a crop,
        or no image left.
    """
    root = Path(config.root).expanduser()
    find = _manifest_rows if config.where else _folder_rows
    rows = find(root, config, split)
    images = [_load(root, name, licence, config) for name, licence in sorted(rows)]
    if not images:
        raise ConfigError(
            f"No {split} image under {root} matches the recipe.",
            hint="Check data.root, data.where and data.folders.",
        )
    return images


def _manifest_rows(root: Path, config: DataConfig, split: str) -> list[tuple[str, str]]:
    path = root / config.manifest
    if not path.is_file():
        raise ConfigError(f"Training manifest {path} does not exist.", hint="Check data.root.")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    missing = {"path", "split", *config.where} - set(rows[0] if rows else {})
    if missing:
        raise ConfigError(f"Training manifest {path} lacks the columns {sorted(missing)}.")
    chosen = [
        row
        for row in rows
        if row["split"] == split
        and all(row[column] in values for column, values in config.where.items())
        and (not config.folders or _source(row["path"]) in config.folders)
    ]
    return [(row["path"], row.get("licence", "not stated")) for row in chosen]


def _folder_rows(root: Path, config: DataConfig, split: str) -> list[tuple[str, str]]:
    suffixes = {".jpg", ".jpeg", ".png", ".tif", ".tiff"}
    names = sorted(
        str(path.relative_to(root))
        for folder in config.folders
        for path in (root / folder).rglob("*")
        if path.suffix.lower() in suffixes
    )
    return [
        (name, "not stated") for i, name in enumerate(names) if (i % 5 == 4) == (split == "val")
    ]


def _source(name: str) -> str:
    return "/".join(Path(name).parts[:-1][:2])


def _load(root: Path, name: str, licence: str, config: DataConfig) -> TrainImage:
    path = root / name
    encoded = np.fromfile(path, dtype=np.uint8) if path.is_file() else np.empty(0, np.uint8)
    decoded = cv2.imdecode(encoded, cv2.IMREAD_COLOR) if encoded.size else None
    if decoded is None:
        raise ConfigError(f"Training image {path} is missing or cannot be decoded.")
    bgr = np.asarray(decoded, np.uint8)
    if min(bgr.shape[:2]) < config.crop_px:
        raise ConfigError(
            f"Training image {path} is {bgr.shape[1]} x {bgr.shape[0]} px, smaller than a crop "
            f"of {config.crop_px} px.",
            hint="Lower data.crop_px or leave the image out.",
        )
    source = _source(name)
    white = config.whites.get(source, config.white_target)
    return TrainImage(path, source, licence, _balance(bgr[:, :, ::-1], white))


def _balance(rgb: NDArray[np.uint8], white: Sequence[float]) -> Image:
    """Scale each channel so that its brightest 2 % lie at `white`: one glass for all sources."""
    bright = np.percentile(rgb.reshape(-1, 3), WHITE_PERCENTILE, axis=0)
    gain = np.asarray(white) / np.maximum(bright, 1.0)
    balanced: Image = np.clip(np.rint(rgb * gain), 0, 255).astype(np.uint8)
    return balanced


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

    def digest(self) -> str:
        """SHA-256 over the pixels, in order: which data a run has seen."""
        sha = hashlib.sha256()
        for image in self.images:
            sha.update(image.rgb.tobytes())
        return sha.hexdigest()

    def batch(self, n: int, rng: np.random.Generator) -> torch.Tensor:
        """Draw n crops.

        Returns
        -------
        torch.Tensor
            float32 (n, 3, crop_px, crop_px) in [-1, 1].
        """
        picks = rng.choice(len(self.images), size=n, p=self._chance)
        return to_model(np.stack([self._crop(self.images[i].rgb, rng) for i in picks]))

    def fixed(self, n: int, seed: int) -> torch.Tensor:
        """Draw n crops without variation, the same for a seed: the held-out batch."""
        rng = np.random.default_rng(seed)
        size = self.config.crop_px
        crops = []
        for i in range(n):
            rgb = self.images[i % len(self.images)].rgb
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
    crops = images.fixed(n, seed=0)
    mean = crops.mean(dim=(0, 2, 3))
    spread = float((crops - mean.view(1, 3, 1, 1)).square().mean().sqrt())
    return tuple(round(float(m), 4) for m in mean), round(spread, 4)
