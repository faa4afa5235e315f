"""Tissue is found, and nothing else."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from wsi_stain.geometry import Region
from wsi_stain.slides.image import SlideSource
from wsi_stain.slides.mask import TissueMask
from wsi_stain.slides.tissue import find_tissue

Pixels = npt.NDArray[np.uint8]


def _glass(seed: int = 0) -> Pixels:
    noise = np.random.default_rng(seed).normal(240, 3, (300, 400, 3))
    pixels: Pixels = np.clip(noise, 0, 255).astype(np.uint8)
    return pixels


def _fraction(thumbnail: Pixels, mpp: float = 8.0) -> float:
    return find_tissue(thumbnail, mpp=mpp, downsample=16.0).tissue_fraction


def test_mask_covers_blobs_when_slide_is_synthetic(synthetic_slide: Path) -> None:
    with SlideSource.open(synthetic_slide) as source:
        mask = find_tissue(source.thumbnail(8.0), mpp=8.0, downsample=16.0)
    ys, xs = np.mgrid[0 : mask.pixels.shape[0], 0 : mask.pixels.shape[1]]
    x, y = (xs + 0.5) * 16 / 1403, (ys + 0.5) * 16 / 1101
    one = ((x - 0.29) / 0.21) ** 2 + ((y - 0.42) / 0.30) ** 2 < 1
    two = ((x - 0.72) / 0.19) ** 2 + ((y - 0.60) / 0.27) ** 2 < 1
    truth = one | two
    assert (mask.pixels & truth).sum() / truth.sum() > 0.97
    assert (mask.pixels & truth).sum() / mask.pixels.sum() > 0.9


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mask_is_empty_when_all_is_glass(seed: int) -> None:
    assert _fraction(_glass(seed)) == 0.0


def test_mask_is_empty_when_glass_is_shaded_dusty_or_tinted() -> None:
    shade = (_glass() * np.linspace(0.6, 1.0, 400)[None, :, None]).astype(np.uint8)
    assert _fraction(shade) == 0.0
    tinted = (_glass() * np.array([1.0, 0.98, 0.92])).astype(np.uint8)
    assert _fraction(tinted) == 0.0
    dusty = _glass()
    cv2.circle(dusty, (100, 100), 12, (90, 90, 92), -1)
    assert _fraction(dusty) == 0.0
    assert _fraction(np.zeros((50, 50, 3), np.uint8)) == 0.0
    assert _fraction(np.full((50, 50, 3), 255, np.uint8)) == 0.0


def test_mask_is_full_when_there_is_no_glass(shared_data: Path) -> None:
    for folder in ("he/ucsb_breast", "he/tcga_brain", "he/gbm40"):
        path = min((shared_data / folder).iterdir())
        thumbnail = np.asarray(Image.open(path).convert("RGB").reduce(8))
        assert _fraction(thumbnail, 4.0) > 0.95, path


def test_mask_finds_known_share_when_slide_is_real(shared_data: Path) -> None:
    with SlideSource.open(shared_data / "slides/CMU-1-Small-Region.svs") as source:
        fine = find_tissue(source.thumbnail(4.0), mpp=4.0, downsample=8.0).tissue_fraction
        coarse = find_tissue(source.thumbnail(8.0), mpp=8.0, downsample=16.0).tissue_fraction
    assert 0.36 < fine < 0.44  # counted by eye on the thumbnail: about 0.4
    assert abs(fine - coarse) < 0.02
    with SlideSource.open(shared_data / "slides/kidney.tif", mpp=0.5) as source:
        assert find_tissue(source.thumbnail(8.0), mpp=8.0, downsample=16.0).tissue_fraction < 0.01


@pytest.mark.parametrize(
    "ink",
    [(40, 60, 160), (90, 130, 205), (20, 120, 60), (25, 25, 30), (200, 30, 30)],
    ids=["blue", "pale blue", "green", "black", "red"],
)
def test_pen_goes_and_tissue_stays_when_slide_is_marked(
    synthetic_slide: Path, ink: tuple[int, int, int]
) -> None:
    with SlideSource.open(synthetic_slide) as source:
        clean = source.thumbnail(4.0)
    before = find_tissue(clean, mpp=4.0, downsample=8.0).pixels
    marked = clean.copy()
    cv2.line(marked, (100, 10), (165, 60), ink, 6, cv2.LINE_AA)  # on glass
    cv2.line(marked, (10, 130), (60, 10), ink, 5, cv2.LINE_AA)  # across tissue
    marked = np.asarray(cv2.GaussianBlur(marked, (0, 0), 0.7), np.uint8)
    after = find_tissue(marked, mpp=4.0, downsample=8.0).pixels
    stroke = np.zeros(before.shape, np.uint8)
    cv2.line(stroke, (100, 10), (165, 60), 1, 6)
    cv2.line(stroke, (10, 130), (60, 10), 1, 5)
    assert (after & (stroke > 0)).mean() < 0.002
    near = cv2.dilate(stroke, np.ones((19, 19), np.uint8)) > 0
    assert (before & ~near & ~after).sum() / before.sum() < 0.05
    assert (after & ~before).mean() < 0.01


def test_specks_go_and_holes_close_when_they_are_small() -> None:
    picture = np.full((200, 200, 3), 243, np.uint8)
    picture[40:160, 40:160] = (200, 120, 180)
    picture[90:105, 90:105] = 243  # 120 um wide
    picture[10:15, 10:15] = (200, 120, 180)  # 40 um wide
    mask = find_tissue(picture, mpp=8.0, downsample=16.0).pixels
    assert mask[95, 95]
    assert not mask[12, 12]
    assert 0.97 < mask.sum() / 120**2 < 1.06


@given(
    x=st.integers(-40, 200),
    y=st.integers(-40, 200),
    width=st.integers(1, 150),
    height=st.integers(1, 150),
    factor=st.sampled_from([1.0, 2.0, 1.7]),
)
def test_fraction_equals_direct_count_when_region_is_anywhere(
    x: int, y: int, width: int, height: int, factor: float
) -> None:
    pixels = np.random.default_rng(1).random((13, 17)) < 0.4
    mask = TissueMask(pixels, 8.0, 16.0)
    edges_x, edges_y = np.arange(18) * 16.0, np.arange(14) * 16.0
    left, right, top, bottom = (v * factor for v in (x, x + width, y, y + height))
    over_x = np.clip(np.minimum(edges_x[1:], right) - np.maximum(edges_x[:-1], left), 0, None)
    over_y = np.clip(np.minimum(edges_y[1:], bottom) - np.maximum(edges_y[:-1], top), 0, None)
    expected = (over_y[:, None] * over_x * pixels).sum() / ((right - left) * (bottom - top))
    assert mask.fraction(Region(x, y, width, height), factor) == pytest.approx(expected, abs=1e-9)
