"""The color map of a slide: planted stains, closed forms, little stain, JSON, real tiles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from skimage.color import lab2rgb, rgb2lab

from wsi_stain.config import ColorReference
from wsi_stain.errors import NoTissueError
from wsi_stain.stain.density import rgb_to_od
from wsi_stain.stain.normalize import MAX_GAIN, Method, StainTransform, fit_stain
from wsi_stain.stain.separate import angle_deg

Rgb8 = npt.NDArray[np.uint8]
Plant = Callable[..., Rgb8]

METHODS: tuple[Method, ...] = ("macenko", "vahadane", "reinhard")
WHITE = (243.0, 241.0, 244.0)
OTHER_STAINS = np.array([[0.56, 0.74, 0.37], [0.13, 0.90, 0.41]])


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    """Each method in turn."""
    chosen: Method = request.param
    return chosen


@pytest.mark.parametrize(("method_", "limit_deg"), [("macenko", 3.0), ("vahadane", 8.0)])
def test_fit_finds_the_planted_stains(
    method_: Method, limit_deg: float, plant_tissue: Plant, reference: ColorReference
) -> None:
    fitted = fit_stain(plant_tissue(OTHER_STAINS), WHITE, reference, method_)
    for found, planted in zip(fitted.stain_od, OTHER_STAINS, strict=True):
        assert angle_deg(np.array(found), planted) < limit_deg
    assert fitted.notes == ()


def test_map_is_reference_times_gain_times_inverse(
    plant_tissue: Plant, reference: ColorReference
) -> None:
    fitted = fit_stain(plant_tissue(OTHER_STAINS), WHITE, reference)
    source, target = np.array(fitted.stain_od).T, np.array(reference.he_stain_od).T
    gain = np.array(reference.he_stain_c99) / fitted.stain_c99
    for j in range(2):
        moved = np.array(fitted.od_map) @ source[:, j]
        np.testing.assert_allclose(moved, target[:, j] * gain[j], atol=1e-9)


@pytest.mark.parametrize("method_", ["macenko", "vahadane"])
def test_two_stainings_of_one_tissue_become_one(
    method_: Method, plant_tissue: Plant, reference: ColorReference
) -> None:
    a = plant_tissue()
    b = plant_tissue(OTHER_STAINS, strengths=(0.7, 1.2), white=(250.0, 250.0, 250.0))
    before = np.abs(a.astype(int) - b).mean()
    normal_a = fit_stain(a, WHITE, reference, method_).apply(a)
    normal_b = fit_stain(b, (250.0,) * 3, reference, method_).apply(b)
    after = np.abs(normal_a.astype(int) - normal_b).mean()
    assert after < 5.0 < before


def test_glass_goes_to_the_reference_white(plant_tissue: Plant, reference: ColorReference) -> None:
    fitted = fit_stain(plant_tissue(), WHITE, reference)
    assert fitted.apply(np.array(WHITE).astype(np.uint8)).tolist() == [243, 243, 244]


def test_apply_keeps_shape_and_is_a_function_of_the_pixel_alone(
    method: Method, plant_tissue: Plant, reference: ColorReference
) -> None:
    pixels = plant_tissue()
    fitted = fit_stain(pixels, WHITE, reference, method)
    picture = pixels[:1200].reshape(30, 40, 3)
    whole = fitted.apply(picture)
    assert whole.shape == picture.shape
    assert whole.dtype == np.uint8
    np.testing.assert_array_equal(fitted.apply(picture[7:20, 3:34]), whole[7:20, 3:34])
    np.testing.assert_array_equal(fitted.apply(picture[None])[0], whole)
    assert fitted.apply(pixels[:0]).shape == (0, 3)


def test_apply_is_within_one_level_of_float64(
    method: Method, plant_tissue: Plant, reference: ColorReference
) -> None:
    pixels = plant_tissue(OTHER_STAINS)
    fitted = fit_stain(pixels, WHITE, reference, method)
    exact = _apply_in_float64(fitted, pixels)
    assert np.abs(fitted.apply(pixels).astype(int) - exact).max() <= 1


def _apply_in_float64(fitted: StainTransform, pixels: Rgb8) -> npt.NDArray[Any]:
    white, target = np.array(fitted.white), np.array(fitted.target_white)
    if fitted.lab is None:
        od = -np.log(np.maximum(pixels, 1).astype(np.float64) / white)
        levels = target * np.exp(-od @ np.array(fitted.od_map).T)
    else:
        lab = rgb2lab(np.minimum(pixels / white, 1.0)) * fitted.lab.scale + fitted.lab.shift
        levels = target * lab2rgb(lab)
    exact: npt.NDArray[Any] = np.clip(np.rint(levels), 0, 255)
    return exact


def test_transform_survives_json(
    method: Method, plant_tissue: Plant, reference: ColorReference
) -> None:
    pixels = plant_tissue()
    fitted = fit_stain(pixels, WHITE, reference, method)
    again = msgspec.json.decode(msgspec.json.encode(fitted), type=StainTransform)
    assert again == fitted
    np.testing.assert_array_equal(again.apply(pixels), fitted.apply(pixels))


def test_fit_is_refused_when_hardly_anything_is_stained(
    method: Method, plant_tissue: Plant, reference: ColorReference
) -> None:
    pale = np.full((5000, 3), 240, np.uint8)
    pale[:150] = plant_tissue()[:150]
    with pytest.raises(NoTissueError, match="of 5000 sampled pixels are stained") as caught:
        fit_stain(pale, WHITE, reference, method)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("method_", ["macenko", "vahadane"])
def test_missing_stain_is_regularized_and_recorded(
    method_: Method, plant_tissue: Plant, reference: ColorReference
) -> None:
    eosin = plant_tissue(strengths=(0.0, 1.0))
    fitted = fit_stain(eosin, WHITE, reference, method_)
    assert any("stain" in note or "gain" in note for note in fitted.notes)
    assert np.isfinite(fitted.od_map).all()
    # Eosin must stay eosin: pale hematoxylin noise must not turn it blue.
    after = rgb_to_od(fitted.apply(eosin), fitted.target_white).mean(axis=0)
    assert angle_deg(after, np.array(reference.he_stain_od[1])) < 15.0


def test_flat_color_is_fitted_without_a_crash(method: Method, reference: ColorReference) -> None:
    flat = np.broadcast_to(np.array([190, 120, 160], np.uint8), (1000, 3)).copy()
    fitted = fit_stain(flat, WHITE, reference, method)
    assert fitted.notes
    assert np.isfinite(msgspec.to_builtins(fitted)["od_map"]).all()
    assert fitted.apply(flat).shape == flat.shape


def test_gain_is_cut_when_a_stain_is_faint(plant_tissue: Plant, reference: ColorReference) -> None:
    fitted = fit_stain(plant_tissue(strengths=(0.12, 1.0)), WHITE, reference, "vahadane")
    gains = np.array(reference.he_stain_c99) / fitted.stain_c99
    column = np.array(fitted.od_map) @ np.array(fitted.stain_od[0])
    assert np.linalg.norm(column) <= MAX_GAIN + 1e-6
    assert (gains[0] > MAX_GAIN) == any("hematoxylin" in note for note in fitted.notes)


def test_brown_slide_draws_a_remark(plant_tissue: Plant, reference: ColorReference) -> None:
    brown = plant_tissue(np.array([[0.650, 0.704, 0.286], [0.268, 0.570, 0.776]]))
    notes = fit_stain(brown, WHITE, reference, "macenko").notes
    blue = plant_tissue(np.array([[0.95, 0.30, 0.05], [0.3, 0.3, 0.9]]))
    assert all("H&E" in note for note in notes)
    assert any("H&E" in note for note in fit_stain(blue, WHITE, reference, "macenko").notes)


def test_reinhard_reaches_the_moments_of_the_reference(
    plant_tissue: Plant, reference: ColorReference
) -> None:
    a, b = plant_tissue(), plant_tissue(OTHER_STAINS, strengths=(0.8, 1.1))
    moments = []
    for pixels in (a, b):
        lab = rgb2lab(
            fit_stain(pixels, WHITE, reference, "reinhard").apply(pixels)
            / np.array(reference.white)
        )
        moments.append(np.concatenate([lab.mean(axis=0), lab.std(axis=0)]))
    # Clipping at black and white moves moments a little; before the map they differ by up to 9.
    np.testing.assert_allclose(moments[0], moments[1], atol=1.5)


def test_project_is_the_linear_map_before_rounding(
    plant_tissue: Plant, reference: ColorReference
) -> None:
    pixels = plant_tissue()
    fitted = fit_stain(pixels, WHITE, reference)
    rows = np.array([[0.2, 0.3, 0.5], [1.0, -1.0, 0.0]])
    od = rgb_to_od(pixels, WHITE).astype(np.float64)
    expected = od @ np.array(fitted.od_map).T @ rows.T
    np.testing.assert_allclose(fitted.project(pixels, rows), expected, atol=2e-5)


@pytest.mark.slide
@pytest.mark.parametrize("method_", METHODS)
def test_real_tiles_come_nearer_to_each_other(
    method_: Method, shared_data: Path, reference: ColorReference
) -> None:
    means_before, means_after = [], []
    for folder in ("cmu1", "ucsb_breast", "gastric_2", "histolab"):
        files = sorted((shared_data / "he" / folder).glob("*.jpg"))[:6]
        bgr = [cv2.imread(str(file)) for file in files]
        pixels = np.concatenate(
            [im[::3, ::3, ::-1].reshape(-1, 3) for im in bgr if im is not None]
        ).astype(np.uint8)
        fitted = fit_stain(pixels, (243.0,) * 3, reference, method_)
        stained = rgb_to_od(pixels, fitted.white).max(axis=1) > 0.15
        means_before.append(rgb_to_od(pixels[stained], fitted.white).mean(axis=0))
        after = rgb_to_od(fitted.apply(pixels[stained]), fitted.target_white)
        means_after.append(after.mean(axis=0))
    assert np.std(means_after, axis=0).sum() < 0.6 * np.std(means_before, axis=0).sum()
