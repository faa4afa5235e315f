"""H&E for a student: images as they are, slides and patch stores through the grid of a run."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from msgspec import structs

from wsi_stain.config import RunConfig, TrainConfig
from wsi_stain.errors import OutputError, SlideError
from wsi_stain.planning import plan_slide
from wsi_stain.slides.fill import fill_shard
from wsi_stain.slides.store import PatchStore
from wsi_stain.train.he_fields import TILES_PER_SLIDE, load_fields


def _with_slides(config: TrainConfig, *paths: Path) -> TrainConfig:
    distill = structs.replace(config.distill, slides=tuple(str(path) for path in paths))
    return structs.replace(config, distill=distill)


def test_images_keep_their_pixels_when_loaded(distill_config: TrainConfig, he_root: Path) -> None:
    train, held_out = load_fields(distill_config, "train"), load_fields(distill_config, "val")
    assert [field.images[0].path.name for field in (*train, *held_out)] == [
        f"{i}.png" for i in range(5)
    ]
    for field in train:
        (image,) = field.images
        bgr = cv2.imread(str(image.path))
        assert bgr is not None
        assert np.array_equal(image.rgb, bgr[:, :, ::-1])
        assert field.pixels().shape == (1, 160, 160, 3)
        assert field.area_px() == 160 * 160


def test_slide_is_one_field_with_its_own_white_when_named(
    distill_config: TrainConfig, synthetic_slide: Path, he_pixels: npt.NDArray[np.uint8]
) -> None:
    config = _with_slides(distill_config, synthetic_slide)
    *_, field = load_fields(config, "train")
    assert len(field.images) == TILES_PER_SLIDE
    assert {image.rgb.shape for image in field.images} == {(96, 96, 3)}
    assert field.white.origin == "glass"
    corner = np.median(he_pixels[:60, :60].reshape(-1, 3), axis=0)
    np.testing.assert_allclose(field.white.rgb, corner, atol=2)
    assert len(load_fields(config, "val")) == 1  # slides are for training


def test_store_gives_its_tiles_when_named(
    tmp_path: Path, distill_config: TrainConfig, synthetic_slide: Path
) -> None:
    plan = plan_slide(synthetic_slide, RunConfig(bundle=distill_config.bundle))
    with plan.source as source:
        store = PatchStore.create(tmp_path / "store", plan.grid)
        config = _with_slides(distill_config, store.path)
        with pytest.raises(OutputError, match="never written"):
            load_fields(config, "train")
        for shard in range(plan.grid.n_shards):
            fill_shard(source, store, shard, "k")
    *_, field = load_fields(config, "train")
    known = {store.read_tile("he", i).tobytes() for i in range(plan.grid.n_tiles)}
    assert {image.rgb.tobytes() for image in field.images} <= known
    assert len(field.images) == min(TILES_PER_SLIDE, plan.grid.n_tiles)


def test_missing_slide_is_named(distill_config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(SlideError, match=r"absent\.svs"):
        load_fields(_with_slides(distill_config, tmp_path / "absent.svs"), "train")
