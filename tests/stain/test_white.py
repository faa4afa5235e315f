"""The white of the glass, planted."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wsi_stain.stain.white import estimate_white

Rgb8 = npt.NDArray[np.uint8]


def _thumbnail(glass: tuple[int, int, int], glass_share: float, padding_share: float) -> Rgb8:
    rng = np.random.default_rng(0)
    n = 20_000
    tissue = rng.normal((205, 150, 190), (20, 35, 15), (n, 3))
    tissue[rng.random(n) < glass_share] = glass
    noisy = np.clip(np.rint(tissue + rng.normal(0, 1.2, (n, 3))), 0, 255)
    noisy[: round(padding_share * n)] = 255
    pixels: Rgb8 = noisy.astype(np.uint8).reshape(100, 200, 3)
    return pixels


def test_white_is_the_glass_when_there_is_some() -> None:
    found = estimate_white(_thumbnail((241, 239, 243), 0.3, 0.0), (255, 255, 255))
    assert found.origin == "glass"
    np.testing.assert_allclose(found.rgb, (241, 239, 243), atol=1.0)
    assert 0.25 < found.glass_fraction < 0.32


def test_white_is_the_glass_when_unscanned_areas_are_painted_white() -> None:
    found = estimate_white(_thumbnail((236, 233, 238), 0.2, 0.5), (255, 255, 255))
    np.testing.assert_allclose(found.rgb, (236, 233, 238), atol=1.0)


def test_white_is_the_background_and_says_so_when_no_glass_is_seen() -> None:
    found = estimate_white(_thumbnail((240, 240, 240), 0.0, 0.0), (250, 251, 252))
    assert found.origin == "background"
    assert found.rgb == (250.0, 251.0, 252.0)


def test_white_is_the_background_when_all_pixels_are_dark_or_missing() -> None:
    dark = np.full((5, 5, 3), 60, np.uint8)
    assert estimate_white(dark, (255, 255, 255)).origin == "background"
    assert estimate_white(np.empty((0, 3), np.uint8), (255, 255, 255)).glass_fraction == 0.0


def test_white_is_saturated_when_the_scanner_clips_its_glass() -> None:
    rng = np.random.default_rng(1)
    glass = np.clip(np.rint(rng.normal(257, 4, (5000, 3))), 0, 255).astype(np.uint8)
    assert min(estimate_white(glass, (255, 255, 255)).rgb) >= 250
