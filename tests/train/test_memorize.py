"""Memorization: a copy is found wherever and however it lies, and new tissue is not one."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from wsi_stain.errors import ConfigError
from wsi_stain.train.data import ImageSet
from wsi_stain.train.memorize import Bank, Group, Match, compare, draw_pairs

PATCH_PX = 64
Image = NDArray[np.uint8]


@pytest.fixture(scope="module")
def images(tissue: ImageSet) -> list[Image]:
    """Pictures of the three drawn images."""
    return [image.rgb for image in tissue.images]


@pytest.fixture(scope="module")
def bank(images: list[Image]) -> Bank:
    """The first two images: the third is new tissue."""
    return Bank(images[:2], PATCH_PX)


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize("flip", [False, True])
def test_copy_is_found_however_it_is_turned(
    bank: Bank, images: list[Image], turn: int, flip: bool
) -> None:
    patch = images[1][24 : 24 + PATCH_PX, 40 : 40 + PATCH_PX]
    seen = np.rot90(patch[:, ::-1] if flip else patch, turn)
    match = bank.nearest(np.ascontiguousarray(seen))
    assert match.distance < 1e-3
    assert np.array_equal(match.patch, seen)


def test_copy_stays_one_when_brightness_and_contrast_change(
    bank: Bank, images: list[Image]
) -> None:
    patch = images[0][32 : 32 + PATCH_PX, 8 : 8 + PATCH_PX]
    paler = (0.7 * patch.astype(np.float64) + 60.0).round().astype(np.uint8)
    assert bank.nearest(paler).distance < 0.01


def test_new_tissue_is_no_copy(bank: Bank, images: list[Image]) -> None:
    patch = images[2][40 : 40 + PATCH_PX, 40 : 40 + PATCH_PX]
    assert bank.nearest(patch).distance > 0.2


def test_flat_patches_are_left_out_and_only_flat_ones_refused(
    bank: Bank, images: list[Image]
) -> None:
    flat = np.full((PATCH_PX, PATCH_PX, 3), 230, np.uint8)
    patch = images[2][:PATCH_PX, :PATCH_PX]
    group = bank.group(np.stack([flat, patch]))
    assert np.array_equal(group.patches, patch[None])
    with pytest.raises(ConfigError, match="flat"):
        bank.group(flat[None])


def test_images_smaller_than_a_patch_are_refused() -> None:
    with pytest.raises(ConfigError, match="as large as a patch of 64 px"):
        Bank([np.zeros((32, 80, 3), np.uint8)], PATCH_PX)


def _group(distances: list[float]) -> Group:
    patch = np.zeros((8, 8, 3), np.uint8)
    return Group(np.stack([patch] * len(distances)), tuple(Match(d, patch) for d in distances))


def test_figures_follow_their_definition() -> None:
    held_out = [0.30 + 0.01 * i for i in range(21)]  # median .40, 5th percentile .31
    found = compare(_group([0.1, 0.2, 0.5, 0.6]), _group(held_out), _group([0.05, 0.1, 0.15]))
    assert found.samples == pytest.approx(0.35)
    assert found.held_out == pytest.approx(0.40)
    assert found.training == pytest.approx(0.10)
    assert found.ratio == pytest.approx(0.875)
    assert found.copies_fraction == 0.5
    assert found.n == (4, 21, 3)


def test_picture_shows_the_nearest_pairs_first(bank: Bank, images: list[Image]) -> None:
    copy, new = images[0][:PATCH_PX, :PATCH_PX], images[2][:PATCH_PX, :PATCH_PX]
    picture = draw_pairs(bank.group(np.stack([new, copy])))
    assert np.array_equal(picture[:PATCH_PX, :PATCH_PX], copy)
    assert np.array_equal(picture[PATCH_PX + 6 : 2 * PATCH_PX + 6, :PATCH_PX], copy)
