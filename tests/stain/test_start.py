"""Start images: quantiles matched, neutral, white on glass, the same in every tile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import cv2
import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from wsi_stain.config import ColorReference, StartImage
from wsi_stain.errors import BundleError, ConfigError, NoTissueError
from wsi_stain.stain.density import is_stained, rgb_to_od
from wsi_stain.stain.normalize import Method, fit_stain
from wsi_stain.stain.separate import angle_deg
from wsi_stain.stain.start import FAINT_OD, StartTransform, fit_start

Rgb8 = npt.NDArray[np.uint8]
Plant = Callable[..., Rgb8]

WHITE = (243.0, 241.0, 244.0)
KINDS: tuple[StartImage, ...] = tuple(k for k in get_args(StartImage) if k != "nuclei")


def _fit(
    pixels: Rgb8, reference: ColorReference, kind: StartImage, method: Method = "macenko"
) -> StartTransform:
    transform = fit_stain(pixels, WHITE, reference, method)
    return fit_start(pixels, WHITE, transform, reference, kind)


@pytest.mark.parametrize("method", ["macenko", "vahadane", "reinhard"])
def test_all_kinds_run_and_differ(
    method: Method, plant_tissue: Plant, reference: ColorReference
) -> None:
    pixels = plant_tissue(strengths=(0.8, 1.3))
    images = [_fit(pixels, reference, kind, method).apply(pixels) for kind in KINDS]
    for i, first in enumerate(images):
        assert first.shape == pixels.shape
        assert first.dtype == np.uint8
        for second in images[i + 1 :]:
            assert np.abs(first.astype(int) - second).mean() > 2.0


def test_source_is_the_picture_itself(plant_tissue: Plant, reference: ColorReference) -> None:
    pixels = plant_tissue()
    np.testing.assert_array_equal(_fit(pixels, reference, "source").apply(pixels), pixels)


def test_stain_is_the_normalized_picture(plant_tissue: Plant, reference: ColorReference) -> None:
    pixels = plant_tissue()
    transform = fit_stain(pixels, WHITE, reference)
    start = fit_start(pixels, WHITE, transform, reference, "stain")
    np.testing.assert_array_equal(start.apply(pixels), transform.apply(pixels))


@pytest.mark.parametrize("kind", ["haematoxylin", "grey"])
def test_mean_od_quantiles_are_matched(
    kind: StartImage, plant_tissue: Plant, reference: ColorReference
) -> None:
    # Strong stain: no pixel lies in the glass ramp, so that matching alone is seen.
    pixels = plant_tissue(strengths=(3.0, 3.0))
    pixels = pixels[rgb_to_od(pixels, WHITE).max(axis=1) > 0.26]
    od = rgb_to_od(_fit(pixels, reference, kind).apply(pixels), reference.white).mean(axis=1)
    places = np.linspace(0, 1, len(reference.mean_od_quantiles))
    upper = places >= 0.625  # below, pixels without hematoxylin share one value
    np.testing.assert_allclose(
        np.quantile(od, places)[upper], np.array(reference.mean_od_quantiles)[upper], atol=0.02
    )
    assert od.mean() == pytest.approx(np.trapezoid(reference.mean_od_quantiles, places), rel=0.05)


@pytest.mark.parametrize("kind", ["haematoxylin", "grey"])
def test_start_is_neutral_relative_to_the_white(
    kind: StartImage, plant_tissue: Plant, reference: ColorReference
) -> None:
    pixels = plant_tissue()
    tinted = msgspec.structs.replace(reference, white=(240.0, 220.0, 200.0))
    share = _fit(pixels, tinted, kind).apply(pixels) / np.array(tinted.white)
    assert np.ptp(share, axis=1).max() <= 1.01 / 200.0


@pytest.mark.parametrize("kind", ["haematoxylin", "grey"])
def test_glass_and_lumen_are_exactly_white(
    kind: StartImage, plant_tissue: Plant, reference: ColorReference
) -> None:
    start = _fit(plant_tissue(), reference, kind)
    glass = np.array([[243, 241, 244], [235, 232, 236], [255, 255, 255]], np.uint8)
    assert start.apply(glass).tolist() == [[243, 243, 244]] * 3


def test_more_hematoxylin_is_never_lighter(plant_tissue: Plant, reference: ColorReference) -> None:
    start = _fit(plant_tissue(), reference, "haematoxylin")
    amount = np.linspace(0.3, 3.0, 200)
    h, e = (np.array(v) for v in start.stain.stain_od)
    pixels = np.rint(WHITE * np.exp(-(amount[:, None] * h + 0.5 * e))).astype(np.uint8)
    levels = start.apply(pixels)[:, 0].astype(int)
    assert (np.diff(levels) <= 1).all()
    assert levels[0] - levels[-1] > 80


def test_hematoxylin_start_is_blind_to_eosin(
    plant_tissue: Plant, reference: ColorReference
) -> None:
    start = _fit(plant_tissue(), reference, "haematoxylin")
    h, e = (np.array(v) for v in start.stain.stain_od)
    amount = np.linspace(0.3, 1.2, 50)[:, None]
    pixels = np.rint(WHITE * np.exp(-(0.8 * h + amount * e))).astype(np.uint8)
    assert np.ptp(start.apply(pixels)[:, 0].astype(int)) <= 6


def test_palette_paints_hematoxylin_and_faint_grey_blue(
    plant_tissue: Plant, reference: ColorReference
) -> None:
    start = _fit(plant_tissue(), reference, "palette")
    h, e = (np.array(v) for v in start.stain.stain_od)
    c99 = start.stain.stain_c99
    pixels = np.rint(WHITE * np.exp(-np.stack([c99[0] * h, c99[1] * e]))).astype(np.uint8)
    blue, faint = rgb_to_od(start.apply(pixels), reference.white)
    assert angle_deg(blue, np.array(reference.stain_od[0])) < 2.0
    assert np.linalg.norm(blue) == pytest.approx(reference.stain_c99[0], rel=0.05)
    assert angle_deg(faint, np.array(FAINT_OD)) < 6.0
    assert np.linalg.norm(faint) == pytest.approx(0.15, abs=0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["macenko", "reinhard"])
def test_tiles_equal_the_whole_and_json_keeps_it(
    kind: StartImage, method: Method, plant_tissue: Plant, reference: ColorReference
) -> None:
    pixels = plant_tissue()
    start = _fit(pixels, reference, kind, method)
    again = msgspec.json.decode(msgspec.json.encode(start), type=StartTransform)
    assert again == start
    picture = pixels[:1500].reshape(30, 50, 3)
    whole = start.apply(picture)
    np.testing.assert_array_equal(again.apply(picture[3:22, 11:48]), whole[3:22, 11:48])


@pytest.mark.parametrize("kind", ["haematoxylin", "grey"])
def test_bundle_without_quantiles_is_refused(
    kind: StartImage, plant_tissue: Plant, reference: ColorReference
) -> None:
    empty = msgspec.structs.replace(reference, mean_od_quantiles=())
    with pytest.raises(BundleError, match="has 0 OD quantiles"):
        _fit(plant_tissue(), empty, kind)


def test_other_white_is_refused(plant_tissue: Plant, reference: ColorReference) -> None:
    transform = fit_stain(plant_tissue(), WHITE, reference)
    with pytest.raises(ConfigError, match="is not that of the color map"):
        fit_start(plant_tissue(), (200.0,) * 3, transform, reference, "grey")


def test_too_few_stained_pixels_are_refused(plant_tissue: Plant, reference: ColorReference) -> None:
    transform = fit_stain(plant_tissue(), WHITE, reference)
    with pytest.raises(NoTissueError, match="Only 0 stained pixels"):
        fit_start(np.full((500, 3), 242, np.uint8), WHITE, transform, reference, "haematoxylin")


@pytest.mark.slide
def test_real_tissue_gets_the_reference_mean_od(
    shared_data: Path, reference: ColorReference
) -> None:
    bgr = [cv2.imread(str(f)) for f in sorted((shared_data / "he" / "ucsb_breast").glob("*.jpg"))]
    pixels = np.concatenate(
        [im[::5, ::5, ::-1].reshape(-1, 3) for im in bgr if im is not None]
    ).astype(np.uint8)
    white = (250.0, 249.0, 250.0)
    transform = fit_stain(pixels, white, reference)
    start = fit_start(pixels, white, transform, reference, "haematoxylin")
    od = rgb_to_od(start.apply(pixels[is_stained(pixels, white)]), reference.white).mean(axis=1)
    wanted = np.trapezoid(reference.mean_od_quantiles, dx=1 / 32)
    # Pixels in the glass ramp fade: the mean may fall a little, and never rises.
    assert 0.8 * wanted < float(od.mean()) < 1.05 * wanted


def test_ranked_gives_dark_nuclei_the_dark_color_and_stroma_a_breath(
    plant_tissue: Plant, reference: ColorReference
) -> None:
    pixels = plant_tissue()
    start = _fit(pixels, reference, "ranked")
    nuclei, eosin = start.stain.project(pixels, start.rows).T
    od = rgb_to_od(start.apply(pixels), start.target_white)
    stroma = od[(nuclei < 0.1) & (eosin > 0.3)].mean(axis=0)
    bare = od[(nuclei < 0.1) & (eosin < 0.1)].mean(axis=0)
    low, high = np.quantile(nuclei, [0.6, 0.98])
    pale = od[(nuclei > low) & (nuclei < 1.1 * low)].mean(axis=0)
    dark = od[nuclei > high].mean(axis=0)
    assert bare.mean() < stroma.mean() - 0.03
    assert stroma.mean() < dark.mean() / 2
    # The reference's colors go from red-absorbing (blue) to blue-absorbing (brown) with darkness.
    assert pale[0] > pale[2]
    assert dark[2] > dark[0]


def test_ranked_needs_a_color_for_each_quantile(
    plant_tissue: Plant, reference: ColorReference
) -> None:
    old = msgspec.structs.replace(reference, ranked_od=())
    with pytest.raises(BundleError, match="0 colors for 33"):
        _fit(plant_tissue(), old, "ranked")
