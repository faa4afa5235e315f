"""Measures of a trained net: files, figures, refusals; samples and their layout."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from msgspec import structs
from PIL import Image

from wsi_stain.config import CriticSpec, DataConfig, NetSpec, TrainConfig
from wsi_stain.errors import BundleError, ConfigError
from wsi_stain.manifest import Event
from wsi_stain.train import measure
from wsi_stain.train.data import ImageSet
from wsi_stain.train.loop import Stage, fit
from wsi_stain.train.measure import measure_stage
from wsi_stain.train.mine import MineStage
from wsi_stain.train.samples import lay_out, redraw, sample
from wsi_stain.train.score import ScoreStage
from wsi_stain.translate.networks import ScoreNet
from wsi_stain.translate.noise import Schedule

CPU = torch.device("cpu")
NET = NetSpec(channels=(16, 16), blocks=1)


@pytest.fixture
def config(tmp_path: Path, tissue: ImageSet) -> TrainConfig:
    """Two steps on drawn tissue, a strip of it held out."""
    (tmp_path / "ihc/drawn").mkdir(parents=True)
    for i, image in enumerate(tissue.images):
        larger = cv2.resize(image.rgb, None, fx=2.0, fy=2.0)[80:240, 80:240]
        wide = np.concatenate([image.rgb, larger], axis=1)[:, :, ::-1]
        assert cv2.imwrite(str(tmp_path / f"ihc/drawn/{i}.png"), wide)
    data = DataConfig(
        root=str(tmp_path), folders=("ihc/drawn",), crop_px=144, held_out_strip=0.5, balance=False
    )
    return TrainConfig(
        stage="score",
        bundle="none",
        data=data,
        samples=4,
        batch=2,
        net=NET,
        critic=CriticSpec(channels=(8, 8, 8), embed=4, negatives=4),
        threads=1,
    )


def _fit(config: TrainConfig, folder: Path, tissue_144: ImageSet) -> None:
    stage: Stage
    if config.stage == "score":
        stage = ScoreStage(config, tissue_144, tissue_144, CPU)
    else:
        stage = MineStage(config, tissue_144, tissue_144, CPU)
    fit(stage, config, folder, lambda _: None)


def test_memorization_is_written_with_its_picture(
    config: TrainConfig, tmp_path: Path, tissue_144: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "N_PATCHES", 8)
    _fit(config, tmp_path / "run", tissue_144)
    heard: list[Event] = []
    facts = measure_stage(config, tmp_path / "run", None, heard.append)
    assert json.loads((tmp_path / "run/memorization.json").read_text()) == {
        **facts,
        "n": list(facts["n"]),  # type: ignore[call-overload]
    }
    assert facts["samples_seen"] == 4
    # Training crops, turned and scaled, lie nearer to training images than held-out ones do.
    assert float(str(facts["training"])) < float(str(facts["held_out"]))
    assert json.loads(heard[-1].text)["ratio"] == facts["ratio"]
    with Image.open(tmp_path / "run/memorization.png") as picture:
        assert picture.height > 2 * measure.PATCH_PX


def test_information_is_written_with_its_picture(
    config: TrainConfig, tmp_path: Path, tissue_144: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "HELD_OUT_CROPS", 4)
    config = structs.replace(config, stage="mine", focus_step=20)
    _fit(config, tmp_path / "run", tissue_144)
    facts = measure_stage(config, tmp_path / "run", None, lambda _: None)
    assert list(facts) == ["1", "10", "20"]
    lines = (tmp_path / "run/information.csv").read_text().splitlines()
    assert len(lines) == 4
    assert (tmp_path / "run/information.png").is_file()


def test_measure_is_refused_where_there_is_none(
    config: TrainConfig, tmp_path: Path, teacher: Path
) -> None:
    with pytest.raises(ConfigError, match="Stage refine has no measure"):
        measure_stage(structs.replace(config, stage="refine"), tmp_path, None, lambda _: None)
    with pytest.raises(ConfigError, match="cannot be read"):
        measure_stage(config, tmp_path / "none", None, lambda _: None)
    mine = structs.replace(config, stage="mine")
    with pytest.raises(BundleError, match="has no critic to measure"):
        measure_stage(mine, tmp_path, str(teacher), lambda _: None)


def test_samples_repeat_with_their_seed_and_stay_in_range() -> None:
    torch.manual_seed(0)
    net, schedule = ScoreNet(NET), Schedule(1000, 1e-4, 0.02)
    first, again, other = (sample(net, schedule, (1, 3, 32, 32), seed, 600) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert float(first.abs().max()) <= 1.0


def test_redrawing_keeps_what_the_level_leaves() -> None:
    """The untrained, preconditioned net is a linear denoiser: the picture's layout stays."""
    torch.manual_seed(0)
    net, schedule = ScoreNet(NET), Schedule(1000, 1e-4, 0.02)
    y_0 = torch.zeros(1, 3, 64, 64)
    y_0[..., 32:] = 0.8
    made = redraw(net, schedule, y_0, seed=3)
    assert float(made[..., 40:].mean() - made[..., :24].mean()) > 0.2


def test_pictures_lie_side_by_side_with_white_between() -> None:
    dark, bright = torch.full((2, 3, 8, 8), -1.0), torch.full((2, 3, 8, 8), 0.5)
    picture = lay_out([dark, bright])
    assert picture.shape == (2 * 12, 2 * 12, 3)
    assert np.all(picture[:8, :8] == 0)
    assert np.all(picture[:8, 8:12] == 255)
    assert np.all(picture[12:20, 12:20] == round(0.75 * 255))
