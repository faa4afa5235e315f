"""Training images: which are chosen, what is done to their colors, how crops vary."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch
from msgspec import structs

from wsi_stain.config import DataConfig
from wsi_stain.errors import ConfigError
from wsi_stain.train.data import ImageSet, measure_mean_sd
from wsi_stain.train.images import TrainImage, load_images
from wsi_stain.translate.pixels import to_rgb

Image = npt.NDArray[np.uint8]
COLUMNS = ("path", "stain", "marker", "licence", "split")
PLAIN = DataConfig(root=".", crop_px=32, scale_jitter=0.0, stain_jitter=0.0)


def _picture(seed: int, height: int = 48, width: int = 64) -> Image:
    rng = np.random.default_rng(seed)
    return rng.integers(20, 230, (height, width, 3)).astype(np.uint8)


def _write(path: Path, rgb: Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), rgb[:, :, ::-1])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Folder of seven images with a manifest."""
    rows = [
        ("ihc/a/1.png", "IHC", "Ki-67", "CC0", "train"),
        ("ihc/a/2.png", "IHC", "Ki-67", "CC0", "val"),
        ("ihc/b/sub/3.png", "IHC", "Ki-67", "by request, see page", "train"),
        ("ihc/b/4.png", "IHC", "HER2", "CC0", "train"),
        ("he/c/5.png", "H&E", "none", "CC0", "train"),
        ("ihc/a/0.png", "IHC", "Ki-67", "CC0", "train"),
        ("ihc/d/6.png", "IHC", "Ki-67", "CC0", "test"),
    ]
    for seed, row in enumerate(rows):
        _write(tmp_path / row[0], _picture(seed))
    with (tmp_path / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    return tmp_path


def _config(root: Path, **changes: object) -> DataConfig:
    where = {"stain": ["IHC"], "marker": ["Ki-67"]}
    config = DataConfig(root=str(root), where=where, crop_px=32)
    return structs.replace(config, **changes)


def test_images_are_chosen_when_the_manifest_matches(root: Path) -> None:
    images = load_images(_config(root), "train")
    assert [im.path.relative_to(root).as_posix() for im in images] == [
        "ihc/a/0.png",
        "ihc/a/1.png",
        "ihc/b/sub/3.png",
    ]
    assert [im.source for im in images] == ["ihc/a", "ihc/a", "ihc/b"]
    assert images[2].licence == "by request, see page"
    assert [im.path.name for im in load_images(_config(root), "val")] == ["2.png"]
    only = load_images(_config(root, folders=("ihc/b",)), "train")
    assert [im.path.name for im in only] == ["3.png"]
    wide = _config(root, where={"stain": ["IHC", "H&E"]})
    assert len(load_images(wide, "train")) == 5


def test_every_fifth_image_is_held_out_when_folders_are_plain(tmp_path: Path) -> None:
    for i in range(11):
        _write(tmp_path / "x" / "y" / f"{i:02d}.png", _picture(i))
    (tmp_path / "x" / "notes.txt").write_text("no image", encoding="utf-8")
    config = DataConfig(root=str(tmp_path), folders=("x",), crop_px=32)
    train, val = (load_images(config, split) for split in ("train", "val"))
    assert [im.path.name for im in val] == ["04.png", "09.png"]
    assert len(train) == 9
    assert {im.licence for im in train} == {"not stated"}


def test_channels_are_rgb_when_loaded(tmp_path: Path) -> None:
    rgb = np.zeros((40, 40, 3), np.uint8)
    rgb[:] = (200, 100, 50)
    _write(tmp_path / "f" / "a.png", rgb)
    config = DataConfig(
        root=str(tmp_path), folders=("f",), crop_px=32, white_target=(200.0, 100.0, 50.0)
    )
    assert load_images(config, "train")[0].rgb[0, 0].tolist() == [200, 100, 50]


def test_glass_goes_to_the_target_when_balanced(root: Path) -> None:
    config = _config(root, whites={"ihc/b": (230.0, 231.0, 235.0)})
    for image in load_images(config, "train"):
        target = config.whites.get(image.source, config.white_target)
        bright = np.percentile(image.rgb.reshape(-1, 3), 98.0, axis=0)
        np.testing.assert_allclose(bright, target, atol=1.0)
    raw = _picture(0).reshape(-1, 3)
    gain = np.asarray(config.white_target) / np.percentile(raw, 98.0, axis=0)
    expected = np.clip(np.rint(raw * gain), 0, 255).astype(np.uint8)
    first = {im.path.name: im for im in load_images(config, "train")}["1.png"]
    assert np.array_equal(first.rgb.reshape(-1, 3), expected)


def test_missing_manifest_is_named_when_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"manifest\.csv does not exist"):
        load_images(_config(tmp_path), "train")


def test_missing_column_is_named_when_filtered_by(root: Path) -> None:
    with pytest.raises(ConfigError, match="lacks the columns \\['organ'\\]"):
        load_images(_config(root, where={"organ": ["breast"]}), "train")


def test_recipe_is_refused_when_no_image_matches(root: Path) -> None:
    with pytest.raises(ConfigError, match="No train image under"):
        load_images(_config(root, where={"marker": ["Ki67"]}), "train")
    with pytest.raises(ConfigError, match="No val image under"):
        load_images(DataConfig(root=str(root)), "val")


def test_broken_image_is_named_when_decoded(root: Path) -> None:
    (root / "ihc/a/1.png").write_bytes(b"\x89PNG but not really")
    with pytest.raises(ConfigError, match=r"1\.png is missing or cannot be decoded"):
        load_images(_config(root), "train")
    (root / "ihc/a/1.png").unlink()
    with pytest.raises(ConfigError, match=r"1\.png is missing"):
        load_images(_config(root), "train")


def test_small_image_is_named_when_a_crop_does_not_fit(root: Path) -> None:
    with pytest.raises(ConfigError, match="64 x 48 px, smaller than a crop of 64 px"):
        load_images(_config(root, crop_px=64), "train")


def _set(*images: Image, config: DataConfig = PLAIN) -> ImageSet:
    named = [TrainImage(Path(f"{i}.png"), f"ihc/{i}", "CC0", rgb) for i, rgb in enumerate(images)]
    return ImageSet(named, config)


def _turns(crop: Image) -> list[Image]:
    rolled = [np.rot90(crop, k) for k in range(4)]
    return [*rolled, *(turn[:, ::-1] for turn in rolled)]


def test_crop_is_a_turned_piece_when_nothing_is_jittered() -> None:
    image = _picture(0)
    crops = to_rgb(_set(image).batch(40, np.random.default_rng(0)))
    pieces = {image[y : y + 32, x : x + 32].tobytes(): (y, x) for y in range(17) for x in range(33)}
    seen = set()
    turns = set()
    for crop in crops:
        found = [i for i, turn in enumerate(_turns(crop)) if turn.tobytes() in pieces]
        assert len(found) == 1
        turns.add(found[0])
        seen.add(pieces[_turns(crop)[found[0]].tobytes()])
    assert len(turns) == 8
    assert len(seen) > 25


@pytest.mark.parametrize("jitter", [0.0, 0.2, 0.9])
def test_crops_keep_shape_and_range_when_varied(jitter: float) -> None:
    config = structs.replace(PLAIN, scale_jitter=jitter, stain_jitter=jitter)
    batch = _set(_picture(0), _picture(1, 32, 32), config=config).batch(
        16, np.random.default_rng(1)
    )
    assert batch.shape == (16, 3, 32, 32)
    assert batch.dtype == torch.float32
    assert float(batch.min()) >= -1.0
    assert float(batch.max()) <= 1.0
    assert float(batch.std()) > 0.1


def test_batch_is_equal_when_the_generator_is() -> None:
    config = structs.replace(PLAIN, scale_jitter=0.2, stain_jitter=0.05)
    images = _set(_picture(0), _picture(1), config=config)
    first, again, other = (images.batch(4, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_scale_jitter_changes_the_texture_when_on() -> None:
    rows = np.arange(128)[:, None, None] // 8 % 2 * 200
    image = np.broadcast_to(rows, (128, 128, 3)).astype(np.uint8)
    config = structs.replace(PLAIN, crop_px=64, scale_jitter=0.2)
    crops = to_rgb(_set(image, config=config).batch(30, np.random.default_rng(0)))
    edges = []
    for crop in crops:
        gray = crop[:, :, 0].astype(int)
        lines = gray if np.ptp(gray[:, 0]) > 0 else gray.T
        edges.append(int((np.abs(np.diff(lines[:, 0] > 100)) > 0).sum()))
    # Stripes of 8 px have 7 or 8 edges in any 64 px; only another scale shows a third number.
    assert max(edges) - min(edges) >= 2


def test_stain_jitter_is_a_map_of_od_when_on() -> None:
    # On a single stain the jitter can only scale the density, never turn the hue.
    hematoxylin = np.array([0.650, 0.704, 0.286])
    density = np.linspace(0.1, 1.6, 48 * 64).reshape(48, 64, 1)
    image = np.rint(255 * np.exp(-density * hematoxylin)).astype(np.uint8)
    config = structs.replace(PLAIN, stain_jitter=0.1)
    gains = []
    for seed in range(12):
        crop = to_rgb(_set(image, config=config).batch(1, np.random.default_rng(seed)))[0]
        plain = to_rgb(_set(image).batch(1, np.random.default_rng(seed)))[0]
        od, was = (-np.log(np.maximum(c, 1) / 255.0).reshape(-1, 3) for c in (crop, plain))
        gain = (od * was).sum() / (was * was).sum()
        np.testing.assert_allclose(od, gain * was, atol=0.05)
        gains.append(gain)
    assert 0.03 < np.std(gains) < 0.25


def test_chance_follows_area_and_weight_when_drawn() -> None:
    small, large = np.full((40, 40, 3), 50, np.uint8), np.full((80, 80, 3), 200, np.uint8)
    config = structs.replace(PLAIN, weights={"ihc/0": 2.0})
    batch = _set(small, large, config=config).batch(3000, np.random.default_rng(0))
    share = float((batch[:, 0, 0, 0] < 0).float().mean())
    # 2 x 1600 against 6400: one third.
    assert share == pytest.approx(1 / 3, abs=0.04)


def test_fixed_crops_are_plain_pieces_when_drawn() -> None:
    first, second = _picture(0), _picture(1)
    images = _set(first, second, config=structs.replace(PLAIN, stain_jitter=0.5))
    crops = to_rgb(images.fixed(4, seed=1))
    for crop, image in zip(crops, (first, second, first, second), strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(image, (32, 32, 3))[:, :, 0]
        assert bool((windows == crop).all(axis=(2, 3, 4)).any())
    assert torch.equal(images.fixed(4, seed=1), images.fixed(4, seed=1))
    assert not torch.equal(images.fixed(4, seed=1), images.fixed(4, seed=2))


def test_mean_and_spread_equal_the_truth_when_measured() -> None:
    rgb = np.empty((40, 40, 3), np.uint8)
    rgb[:, ::2] = (255, 128, 0)
    rgb[:, 1::2] = (205, 78, 50)
    mean, spread = measure_mean_sd(_set(rgb))
    middle = (np.array([230.0, 103.0, 25.0]) / 127.5) - 1.0
    np.testing.assert_allclose(mean, middle, atol=1e-3)
    assert spread == pytest.approx(25.0 / 127.5, abs=1e-3)


def test_digest_tells_the_pixels_when_asked() -> None:
    first = _set(_picture(0), _picture(1)).digest()
    assert first == _set(_picture(0), _picture(1)).digest()
    changed = _picture(1)
    changed[5, 5, 1] ^= 1
    assert first != _set(_picture(0), changed).digest()


@pytest.mark.slide
def test_real_images_are_found_when_the_data_is_there(shared_data: Path) -> None:
    config = DataConfig(
        root=str(shared_data),
        where={"stain": ["IHC"], "marker": ["Ki-67"]},
        folders=("ihc/shidc_ki67",),
        crop_px=192,
    )
    images = load_images(config, "val")
    assert images
    assert {im.source for im in images} == {"ihc/shidc_ki67"}
    assert all("research" in im.licence for im in images)
    mean, spread = measure_mean_sd(ImageSet(images, config))
    assert all(0.2 < m < 0.95 for m in mean)
    assert 0.1 < spread < 0.5
