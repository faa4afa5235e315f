"""Tile scores: the same structure scores high, another's scores low, and nothing scores nothing."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from skimage.metrics import structural_similarity

from wsi_stain.config import ColorReference
from wsi_stain.stain.density import dab_od, od_to_rgb
from wsi_stain.stain.normalize import StainTransform
from wsi_stain.stain.tile_scores import TileJudge, sobel_ssim, strongest_mean

Rgb8 = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]
Paint = Callable[[Floats], Rgb8]

COLOR = ColorReference(white=(243.0, 243.0, 244.0))
EYE = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
STAIN = StainTransform(
    method="macenko",
    white=COLOR.white,
    target_white=COLOR.white,
    od_map=EYE,
    stain_od=COLOR.he_stain_od,
    stain_c99=(1.0, 1.0),
    n_stained=1,
)
JUDGE = TileJudge(STAIN, COLOR, 0.5)


def nuclei(seed: int, side_px: int = 256) -> Floats:
    """Draw disks of 5 um, density 0..1.2, float64 (h, w)."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((side_px, side_px))
    for x, y in rng.integers(8, side_px - 8, (70, 2)).tolist():
        cv2.circle(picture, (x, y), 5, 1.2, -1)
    return cv2.GaussianBlur(picture, (0, 0), 1.0).astype(np.float64)


def he_of(nuclear: Floats) -> Rgb8:
    """Stain nuclei in hematoxylin, the rest in eosin."""
    density = np.stack([nuclear, np.full_like(nuclear, 0.5)], axis=-1)
    return od_to_rgb(density @ np.array(COLOR.he_stain_od), COLOR.white)


def ihc_of(hematoxylin: Floats, dab: Floats) -> Rgb8:
    density = np.stack([hematoxylin + 0.4, dab], axis=-1)
    return od_to_rgb(density @ np.array(COLOR.stain_od), COLOR.white)


def test_structure_is_high_whichever_stain_a_nucleus_takes() -> None:
    here = nuclei(0)
    he = he_of(here)
    half = np.where(np.arange(256) < 128, here, 0.0)
    ihc = ihc_of(half, here - half)
    score = JUDGE.score(he, ihc, ihc)
    assert score.structure is not None
    assert score.structure > 0.97
    assert score.dab_sd is None
    elsewhere = JUDGE.score(he, ihc_of(nuclei(1), 0 * here), ihc_of(nuclei(1), 0 * here))
    assert elsewhere.structure is not None
    assert abs(elsewhere.structure) < 0.25
    assert score.sobel_ssim is not None
    assert elsewhere.sobel_ssim is not None
    assert elsewhere.sobel_ssim < score.sobel_ssim - 0.2


def test_structure_has_no_value_without_nuclei_or_tissue_and_is_zero_when_all_is_lost() -> None:
    none = np.zeros((256, 256))
    flat = he_of(none)
    assert JUDGE.score(flat, flat, flat).structure is None
    he = he_of(nuclei(0))
    glass = np.broadcast_to(np.rint(COLOR.white), he.shape).astype(np.uint8)
    rim = np.where(np.arange(256)[None, :, None] < 20, he, glass)
    assert JUDGE.score(rim, rim, rim)[:2] == (None, None)
    even = np.full_like(he, 150)
    assert JUDGE.score(he, even, even).structure == 0.0


def test_white_error_is_the_share_of_pixels_before_the_glass() -> None:
    he = he_of(nuclei(0))
    he[:64] = np.rint(COLOR.white)
    ihc = ihc_of(nuclei(0), 0 * nuclei(0))
    laid = ihc.copy()
    laid[:64] = np.rint(COLOR.white)
    assert JUDGE.score(he, ihc, laid).white_error == pytest.approx(0.25)
    assert JUDGE.score(he, laid, laid).white_error == 0.0
    ours = JUDGE.score(he, ihc, laid)
    assert ours.dab_p90 == pytest.approx(strongest_mean(dab_od(laid)), abs=1e-4)


def test_sd_is_averaged_over_tissue_alone() -> None:
    he = he_of(nuclei(0))
    he[:64] = np.rint(COLOR.white)
    sd = np.zeros((256, 256), np.float32)
    sd[:64], sd[64:] = 1.0, 0.03
    assert JUDGE.score(he, he, he, sd).dab_sd == pytest.approx(0.03, abs=1e-4)
    he[:] = np.rint(COLOR.white)
    assert JUDGE.score(he, he, he, sd).dab_sd is None


@pytest.mark.parametrize("side_px", [256, 300])
def test_sobel_ssim_equals_scikit_images(side_px: int) -> None:
    a, b = (he_of(nuclei(seed, side_px)) for seed in (2, 3))
    edges = []
    for rgb in (a, b):
        grey = rgb.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
        grey = cv2.resize(grey, (256, 256), interpolation=cv2.INTER_AREA).astype(np.float64)
        size = np.hypot(cv2.Sobel(grey, cv2.CV_64F, 1, 0), cv2.Sobel(grey, cv2.CV_64F, 0, 1))
        edges.append(size / size.max())
    theirs = structural_similarity(  # type: ignore[no-untyped-call]
        edges[0], edges[1], data_range=1.0
    )
    assert sobel_ssim(a, b) == pytest.approx(float(theirs), abs=1e-9)
    assert sobel_ssim(a, a) == pytest.approx(1.0)
    assert sobel_ssim(np.zeros_like(a), np.zeros_like(a)) == pytest.approx(1.0)


def test_strongest_mean_takes_a_tenth() -> None:
    values = np.random.default_rng(0).permutation(np.arange(100.0)).reshape(10, 10)
    assert strongest_mean(values) == pytest.approx(np.arange(90, 100).mean())
    assert strongest_mean(np.array([3.0])) == 3.0
    every_17th = np.zeros(17 * 1000, np.float32)
    every_17th[::17] = 1.0  # a sample would see nothing else
    ties = np.random.default_rng(1).integers(0, 9, (64, 64)).astype(np.float32)
    for odd in (every_17th, ties, np.full(50, 2.0)):
        tenth = np.sort(odd.ravel())[-round(0.1 * odd.size) :]
        assert strongest_mean(odd) == pytest.approx(float(tenth.mean(dtype=np.float64)))
