"""Drawn tissue to train on: no files needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from wsi_stain.config import (
    BundleSpec,
    DataConfig,
    DistillConfig,
    GuidanceSpec,
    NetSpec,
    SolverSpec,
    TrainConfig,
)
from wsi_stain.train.data import ImageSet
from wsi_stain.train.images import TrainImage
from wsi_stain.translate.bundle import save_nets
from wsi_stain.translate.networks import ScoreNet


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


TAUGHT_NET = NetSpec(channels=(16, 16), blocks=1)
EDGES_ONLY = GuidanceSpec(edges="gaussian", structure_scale=0.0, entropy="none", contrast="none")


@pytest.fixture(scope="session")
def save_teacher() -> Callable[[Path], Path]:
    """Give the function that writes a bundle with a tiny guided score net, tiles of 96 px.

    The net is untrained but for noise in its last layer, so it is about the best linear denoiser.
    """

    def save(folder: Path) -> Path:
        torch.manual_seed(0)
        net = ScoreNet(TAUGHT_NET)
        torch.nn.init.normal_(net.tail.weight, std=0.02)
        spec = BundleSpec(
            name="teacher",
            marker="Ki-67",
            tile_px=96,
            start_image="stain",
            net=TAUGHT_NET,
            solver=SolverSpec(steps=4, start_step=150),
            guidance=EDGES_ONLY,
        )
        save_nets(folder, spec, {"score": dict(net.named_parameters())})
        return folder

    return save


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, save_teacher: Callable[[Path], Path]) -> Path:
    """Folder of the tiny guided teacher; not to be changed."""
    return save_teacher(tmp_path_factory.mktemp("teachers") / "teacher")


@pytest.fixture(scope="session")
def he_root(tmp_path_factory: pytest.TempPathFactory, he_pixels: NDArray[np.uint8]) -> Path:
    """Five H&E images of 160 px; the last, by name, is held out."""
    folder = tmp_path_factory.mktemp("he")
    (folder / "he/drawn").mkdir(parents=True)
    for i in range(5):
        y, x = 330 + 60 * (i % 2), 270 + 70 * i
        picture = he_pixels[y : y + 160, x : x + 160, ::-1]
        assert cv2.imwrite(str(folder / f"he/drawn/{i}.png"), np.ascontiguousarray(picture))
    return folder


@pytest.fixture(scope="session")
def distill_config(he_root: Path, teacher: Path) -> TrainConfig:
    """Eight pairs of 96 px, crops of 64 px, two at a time."""
    data = DataConfig(root=str(he_root), folders=("he/drawn",), crop_px=96, balance=False)
    return TrainConfig(
        stage="distill",
        bundle=str(teacher),
        data=data,
        samples=8,
        batch=2,
        warmup_samples=0,
        lr=1e-3,
        distill=DistillConfig(pairs=8, held_out_pairs=2, crop_px=64),
    )
