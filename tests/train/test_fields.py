"""Fields of slides and stores: from tissue, at the asked pixel size, split by where they lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from msgspec import structs
from numpy.typing import NDArray

from wsi_stain.config import DataConfig
from wsi_stain.errors import ConfigError
from wsi_stain.geometry import choose_scale
from wsi_stain.slides.fill import fill_shard
from wsi_stain.slides.image import SlideSource
from wsi_stain.slides.plan import plan_tiles
from wsi_stain.slides.store import PatchStore
from wsi_stain.slides.tissue import find_tissue
from wsi_stain.train.fields import read_fields
from wsi_stain.train.images import load_images

MASK_MPP = 8.0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, synthetic_slide: Path) -> Path:
    """Patch store of the synthetic slide, filled: tiles of 256 px at 0.5 um/px."""
    folder = tmp_path_factory.mktemp("stores") / "store"
    with SlideSource.open(synthetic_slide) as source:
        mask = find_tissue(source.thumbnail(MASK_MPP), mpp=MASK_MPP, downsample=MASK_MPP / 0.5)
        scale = choose_scale(source.size_l0, source.mpp_l0, 0.5, 0.15)
        grid = plan_tiles(
            scale, mask, tile_px=256, overlap_px=32, tissue_min_fraction=0.05, shard_tiles=8
        )
        made = PatchStore.create(folder, grid)
        for shard in range(made.grid.n_shards):
            fill_shard(source, made, shard, "key")
    return folder


def test_fields_are_tissue_at_the_asked_pixel_size(
    synthetic_slide: Path, he_pixels: NDArray[np.uint8]
) -> None:
    fields = read_fields(synthetic_slide, mpp=1.0, side_px=96, most=6)
    assert fields.tiles.shape[1:] == (96, 96, 3)
    assert 1 < len(fields.tiles) <= 6
    assert np.all(fields.spans[:, 1] - fields.spans[:, 0] == pytest.approx(2 * 96 / 1403, rel=0.01))
    for tile in fields.tiles:  # glass is 243 and gray; half of each field is tissue
        stained = np.ptp(tile.astype(int), axis=2) > 12
        assert stained.mean() > 0.3
    assert np.asarray(fields.white.rgb) == pytest.approx([243, 243, 244], abs=4)
    halved = read_fields(synthetic_slide, mpp=0.5, side_px=96, most=1000)
    assert len(halved.tiles) > 2 * len(fields.tiles)


def test_stated_pixel_size_beats_the_file(synthetic_slide: Path) -> None:
    """A slide said to be of half the pixel size gives fields of twice the pixels."""
    fields = read_fields(synthetic_slide, mpp=0.5, side_px=96, most=4, asked_mpp=0.25)
    assert np.all(fields.spans[:, 1] - fields.spans[:, 0] == pytest.approx(2 * 96 / 1403, rel=0.02))


def test_store_gives_its_tiles_at_its_own_pixel_size(store: Path) -> None:
    fields = read_fields(store, mpp=0.5, side_px=1, most=3)
    made = PatchStore.open(store)
    assert len(fields.tiles) == 3
    assert np.array_equal(fields.tiles[0], made.read_tile("he", 0))
    assert np.array_equal(fields.tiles[-1], made.read_tile("he", made.grid.n_tiles - 1))
    with pytest.raises(ConfigError, match=r"has 0\.5 um/px, and 0\.25 are asked for"):
        read_fields(store, mpp=0.25, side_px=1, most=3)


def test_empty_store_is_refused(tmp_path: Path, store: Path) -> None:
    empty = PatchStore.create(tmp_path / "store", PatchStore.open(store).grid)
    assert empty.pending("he", "key")
    with pytest.raises(Exception, match="store") as caught:
        read_fields(tmp_path / "store", mpp=0.5, side_px=1, most=3)
    assert type(caught.value).__module__ == "wsi_stain.errors"


def _config(slide: Path, **changes: object) -> DataConfig:
    config = DataConfig(root=str(slide.parent), slides=(slide.name,), crop_px=48)
    return structs.replace(config, **changes)


def test_strip_splits_a_slide_into_fields_that_do_not_touch(synthetic_slide: Path) -> None:
    config = _config(synthetic_slide, held_out_strip=0.4, fields_per_slide=500, balance=False)
    train, held_out = (load_images(config, split) for split in ("train", "val"))
    assert train
    assert held_out
    assert {image.source for image in train} == {synthetic_slide.name}
    seen = {image.rgb.tobytes() for image in train}
    assert seen.isdisjoint(image.rgb.tobytes() for image in held_out)
    everything = load_images(structs.replace(config, held_out_strip=0.0), "train")
    across = len(everything) - len(train) - len(held_out)
    assert 0 <= across < len(everything) / 3  # those on the edge belong to neither side


def test_glass_of_a_slide_goes_to_the_target_once_for_all_its_fields(synthetic_slide: Path) -> None:
    config = _config(synthetic_slide, white_target=(250.0, 240.0, 230.0), fields_per_slide=3)
    plain = load_images(structs.replace(config, balance=False), "train")
    balanced = load_images(config, "train")
    for before, after in zip(plain, balanced, strict=True):
        expected = before.rgb * (np.array([250.0, 240.0, 230.0]) / [243, 243, 244])
        inside = (after.rgb > 5) & (after.rgb < 250)
        assert np.abs(after.rgb - expected)[inside].max() < 4


def test_small_tiles_of_a_store_are_named(store: Path) -> None:
    config = DataConfig(root=str(store.parent), slides=(store.name,), crop_px=272)
    with pytest.raises(ConfigError, match="tiles of 256 px, smaller than a crop of 272 px"):
        load_images(config, "train")
