"""Which images a recipe chooses: strips, licences, and names that belong to nothing."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from msgspec import structs

from wsi_stain.config import DataConfig
from wsi_stain.errors import ConfigError
from wsi_stain.train.images import load_images


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """Two plain folders of one image each, 100 x 60 px; red is the column."""
    for name in ("ihc/near", "ihc/far"):
        (tmp_path / name).mkdir(parents=True)
        rgb = np.zeros((60, 100, 3), np.uint8)
        rgb[..., 0] = np.arange(100)
        assert cv2.imwrite(str(tmp_path / name / "0.png"), rgb[:, :, ::-1])
    return DataConfig(
        root=str(tmp_path), folders=("ihc/near", "ihc/far"), crop_px=32, balance=False
    )


def test_strip_holds_out_the_right_part_of_every_image(config: DataConfig) -> None:
    config = structs.replace(config, held_out_strip=0.4)
    for image in load_images(config, "train"):
        assert np.array_equal(image.rgb[0, :, 0], np.arange(60))
    held_out = load_images(config, "val")
    assert len(held_out) == 2
    for image in held_out:
        assert np.array_equal(image.rgb[0, :, 0], np.arange(60, 100))


def test_part_that_is_smaller_than_a_crop_is_named(config: DataConfig) -> None:
    with pytest.raises(ConfigError, match="val part is 20 x 60 px, smaller than a crop of 32 px"):
        load_images(structs.replace(config, held_out_strip=0.2), "val")


def test_few_images_without_a_strip_are_told_of_it(config: DataConfig) -> None:
    with pytest.raises(ConfigError, match="No val image") as caught:
        load_images(config, "val")
    assert "held_out_strip" in caught.value.hint


def test_licence_comes_from_the_recipe_where_no_manifest_says_it(config: DataConfig) -> None:
    config = structs.replace(config, licences={"ihc/near": "CC0"})
    found = {image.source: image.licence for image in load_images(config, "train")}
    assert found == {"ihc/near": "CC0", "ihc/far": "not stated"}


def test_image_of_two_folders_counts_once(config: DataConfig) -> None:
    twice = structs.replace(config, folders=("ihc", "ihc/near"), held_out_strip=0.4)
    assert len(load_images(twice, "train")) == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weights", {"ihc/naer": 2.0}),
        ("whites", {"ihc/naer": (230.0, 230.0, 230.0)}),
        ("licences", {"ihc/naer": "CC0"}),
    ],
)
def test_name_that_belongs_to_no_image_is_refused_with_the_nearest(
    config: DataConfig, field: str, value: object
) -> None:
    with pytest.raises(ConfigError, match=f"data.{field} names 'ihc/naer'") as caught:
        load_images(structs.replace(config, **{field: value}), "train")
    assert "Did you mean 'ihc/near'?" in caught.value.hint


def test_folder_and_slide_that_are_not_there_are_named(config: DataConfig) -> None:
    with pytest.raises(ConfigError, match="is no folder"):
        load_images(structs.replace(config, folders=("ihc/near", "ihc/gone")), "train")
    with pytest.raises(ConfigError, match=r"slide_mpp names \['a.svs'\]"):
        load_images(structs.replace(config, slide_mpp={"a.svs": 0.5}), "train")
