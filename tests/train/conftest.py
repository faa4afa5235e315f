"""Drawn tissue to train on: no files needed."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from wsi_stain.config import DataConfig
from wsi_stain.train.data import ImageSet, TrainImage


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _draw(seed: int, side_px: int = 160) -> TrainImage:
    """Draw brown and blue nuclei on a pale ground."""
    rng = np.random.default_rng(seed)
    rgb = np.full((side_px, side_px, 3), (228, 226, 230), np.uint8)
    for _ in range(60):
        center = (int(rng.integers(side_px)), int(rng.integers(side_px)))
        axes = (int(rng.integers(4, 9)), int(rng.integers(4, 7)))
        color = (110, 70, 45) if rng.random() < 0.3 else (95, 105, 160)
        cv2.ellipse(rgb, center, axes, float(rng.uniform(0, 180)), 0, 360, color, -1)
    rgb = np.clip(cv2.GaussianBlur(rgb, (0, 0), 0.8) + rng.normal(0, 3, rgb.shape), 0, 255)
    return TrainImage(Path(f"{seed}.png"), "ihc/drawn", "CC0", rgb.astype(np.uint8))


@pytest.fixture(scope="session")
def tissue() -> ImageSet:
    """Three drawn images of 160 px, crops of 96 px."""
    return ImageSet([_draw(seed) for seed in range(3)], DataConfig(root=".", crop_px=96))


@pytest.fixture(scope="session")
def tissue_144(tissue: ImageSet) -> ImageSet:
    """The same with crops of 144 px: the smallest in which the critic finds far places."""
    return ImageSet(tissue.images, DataConfig(root=".", crop_px=144))
