"""Images to judge on: which files, at which pixel size, which part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from wsi_stain.config import ColorReference, load_recipe
from wsi_stain.errors import ConfigError
from wsi_stain.evaluate.pairs import find_images, load_subject, palette_pixels, real_pictures
from wsi_stain.evaluate.recipe import EvaluateConfig, ImageChoice

Rgb8 = npt.NDArray[np.uint8]
MANIFEST = "path,split,licence\nhe/s1-a.png,val,CC0\nhe/s1-b.png,train,CC0\nhe/s2-a.png,val,\n"


def save(path: Path, rgb: Rgb8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), rgb[:, :, ::-1])


def settings(root: Path, **group: Any) -> EvaluateConfig:
    raw = {
        "root": str(root),
        "crop_px": group.pop("crop_px", 0),
        "nulls": ["source"],
        "variants": [{"name": "v"}],
        "images": [{"name": "g", "mpp": 0.5, "folder": "he"} | group],
    }
    return msgspec.convert(raw, EvaluateConfig)


@pytest.fixture
def root(tmp_path: Path, coordinates: Callable[[int, int, int, int], Rgb8]) -> Path:
    """Three H&E images that tell their places, two with references, and a manifest."""
    for name in ("s1-a", "s1-b", "s2-a"):
        save(tmp_path / f"he/{name}.png", coordinates(0, 0, 90, 70))
    for name in ("s1-a", "s1-b"):
        save(tmp_path / f"ihc/{name}.png", coordinates(100, 0, 90, 70))
    (tmp_path / "manifest.csv").write_text(MANIFEST)
    return tmp_path


def test_folder_gives_all_images_by_name_and_is_the_slide(root: Path) -> None:
    files = find_images(settings(root))
    assert [file.name for file in files] == ["g/s1-a", "g/s1-b", "g/s2-a"]
    assert {file.slide for file in files} == {"he"}


def test_folder_outside_of_the_root_is_a_slide_of_its_own(root: Path) -> None:
    inner = root / "inner"
    inner.mkdir()
    files = find_images(settings(inner, folder=str(root / "he")))
    assert {file.slide for file in files} == {"../he"}


def test_manifest_chooses_and_tells_the_licence(root: Path) -> None:
    files = find_images(settings(root, manifest="manifest.csv", where={"split": ["val"]}))
    assert [(f.path.name, f.licence) for f in files] == [
        ("s1-a.png", "CC0"),
        ("s2-a.png", "not stated"),
    ]


def test_limit_spreads_over_the_names(root: Path) -> None:
    assert [f.name for f in find_images(settings(root, limit=2))] == ["g/s1-a", "g/s2-a"]


def test_pattern_finds_the_slide(root: Path) -> None:
    files = find_images(settings(root, group_pattern=r"^(s\d)-"))
    assert [f.slide for f in files] == ["he/s1", "he/s1", "he/s2"]


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ({"folder": "none"}, "no folder"),
        ({"manifest": "none.csv"}, "cannot be read"),
        ({"manifest": "manifest.csv", "where": {"stain": ["HE"]}}, "columns .'stain'."),
        ({"manifest": "manifest.csv", "where": {"split": ["test"]}}, "No image"),
        ({"reference": "ihc"}, "s2-a.png has no reference"),
        ({"group_pattern": "^(x)"}, "does not match s1-a"),
    ],
)
def test_images_that_cannot_be_found_are_named(
    root: Path, group: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        find_images(settings(root, **group))


def test_one_stem_twice_is_refused(root: Path) -> None:
    save(root / "he/deeper/s1-a.png", np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(ConfigError, match="one stem"):
        find_images(settings(root))


def test_crop_is_the_center_of_both_pictures(
    root: Path, coordinates: Callable[[int, int, int, int], Rgb8]
) -> None:
    config = settings(root, reference="ihc", limit=1, crop_px=32)
    (file,) = find_images(config)
    subject = load_subject(file, 0.5, config)
    assert subject.reference is not None
    np.testing.assert_array_equal(subject.cut(subject.he), coordinates(29, 19, 32, 32))
    np.testing.assert_array_equal(subject.cut(subject.reference), coordinates(129, 19, 32, 32))
    assert len(set(subject.digests)) == 2


def test_crop_larger_than_the_image_takes_all_of_it(root: Path) -> None:
    config = settings(root, limit=1, crop_px=80)
    subject = load_subject(find_images(config)[0], 0.5, config)
    assert tuple(subject.crop) == (5, 0, 80, 70)


def test_finer_image_is_averaged_to_the_models_pixel_size(root: Path) -> None:
    rng = np.random.default_rng(0)
    fine = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
    save(root / "fine/a.png", fine)
    config = settings(root, folder="fine", mpp=0.25)
    subject = load_subject(find_images(config)[0], 0.5, config)
    means = fine.reshape(30, 2, 40, 2, 3).mean(axis=(1, 3))
    assert np.abs(subject.he - means).max() <= 0.5
    assert subject.scale.mpp_out == 0.5


def test_coarser_image_is_enlarged_and_near_ones_stay(root: Path) -> None:
    config = settings(root, mpp=1.0, limit=1)
    assert load_subject(find_images(config)[0], 0.5, config).he.shape == (140, 180, 3)
    config = settings(root, mpp=0.46, limit=1)
    subject = load_subject(find_images(config)[0], 0.5, config)
    assert (subject.he.shape, subject.scale.mpp_out) == ((70, 90, 3), 0.46)


def test_unequal_pair_and_damaged_image_are_refused(root: Path) -> None:
    save(root / "ihc/s1-a.png", np.zeros((70, 91, 3), np.uint8))
    config = settings(root, reference="ihc", limit=1)
    with pytest.raises(ConfigError, match=r"91 x 70 px.*90 x 70 px"):
        load_subject(find_images(config)[0], 0.5, config)
    (root / "he/s1-a.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match="cannot be decoded"):
        load_subject(find_images(config)[0], 0.5, config)


def test_white_is_measured_where_glass_is_seen_and_else_taken_over(root: Path) -> None:
    picture = np.full((60, 60, 3), (180, 90, 140), np.uint8)
    save(root / "glass/full.png", picture)
    picture[:, :20] = (236, 238, 237)
    save(root / "glass/half.png", picture)
    config = settings(root, folder="glass", white=[250.0, 250.0, 250.0])
    full, half = (load_subject(file, 0.5, config) for file in find_images(config))
    assert (full.glass.origin, full.glass.rgb) == ("background", (250.0, 250.0, 250.0))
    assert (half.glass.origin, half.glass.rgb) == ("glass", (236.0, 238.0, 237.0))


def test_palette_brings_every_image_to_one_white(root: Path) -> None:
    brown = np.array([120.0, 80.0, 60.0])
    for name, light in (("a", 1.0), ("b", 0.9)):
        picture = np.empty((80, 80, 3), np.uint8)
        picture[:] = np.rint(light * brown)
        picture[:, :30] = np.rint(light * np.array([250, 250, 250]))
        save(root / f"train/{name}.png", picture)
    color = ColorReference(output_white=(250.0, 250.0, 250.0))
    palette = palette_pixels(ImageChoice(folder="train"), root, color)
    assert np.abs(palette - brown).max() <= 1.0
    real = real_pictures((ImageChoice(folder="train"),), root, color, 60)
    assert [picture.shape for picture in real] == [(60, 60, 3)] * 2
    for picture in real:
        assert np.abs(picture[:, 30:] - brown).max() <= 1.0
        assert np.abs(picture[:, :10] - 250.0).max() <= 1.0
    save(root / "blank/a.png", np.full((50, 50, 3), 250, np.uint8))
    with pytest.raises(ConfigError, match="0 stained"):
        palette_pixels(ImageChoice(folder="blank"), root, color)


@pytest.mark.slide
def test_shipped_recipes_find_their_images(shared_data: Path) -> None:
    for name, n_slides in (("quick", 8), ("ablations", 10)):
        recipe = Path(__file__).resolve().parents[2] / f"pipelines/evaluate/{name}.toml"
        config, _ = load_recipe(recipe, EvaluateConfig)
        files = find_images(msgspec.structs.replace(config, root=str(shared_data)))
        assert len({file.slide for file in files}) == n_slides
        assert len({file.name for file in files}) == len(files)
