"""Ways to paint an image: the model's is a slide's way, and null rows know no biology."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import tifffile
import torch

from wsi_stain.config import BundleSpec, ColorReference, NetSpec, resolve_run_config
from wsi_stain.errors import BundleError, NoTissueError
from wsi_stain.evaluate.metrics_null import null_blur
from wsi_stain.evaluate.paint import ModelPainter, NullPainter
from wsi_stain.evaluate.pairs import Subject, find_images, load_subject
from wsi_stain.evaluate.recipe import EvaluateConfig, NullRow, vary_spec
from wsi_stain.evaluate.sheet import read_picture
from wsi_stain.pipeline import translate_slide
from wsi_stain.stain.density import dab_od, is_stained, lay_glass, rgb_to_od
from wsi_stain.translate.bundle import ModelBundle, load_bundle, save_nets
from wsi_stain.translate.networks import ScoreNet

Rgb8 = npt.NDArray[np.uint8]
TILE_PX = 128
ROWS: tuple[NullRow, NullRow] = ("null-recolor", "null-blur")
BOX = (slice(250, 570), slice(150, 470))  # 320 px: three tiles of 128 px, 32 px shared


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundle with a small untrained net whose output depends on noise and start image."""
    torch.manual_seed(0)
    net = NetSpec(channels=(16, 16), blocks=1)
    weights = ScoreNet(net).state_dict()
    weights["tail.weight"] = 0.05 * torch.randn_like(weights["tail.weight"])
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    quantiles = tuple(np.linspace(0.1, 1.2, 9).tolist())
    spec = BundleSpec(
        name="tiny",
        marker="Test",
        tile_px=TILE_PX,
        net=net,
        start_image="source",
        color=ColorReference(white=(243.0, 243.0, 244.0), mean_od_quantiles=quantiles),
    )
    save_nets(folder, spec, {"score": weights})
    return folder


@pytest.fixture(scope="module")
def bundle(folder: Path) -> ModelBundle:
    return load_bundle(str(folder), torch.device("cpu"))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory, he_pixels: Rgb8) -> Path:
    """One H&E image, as PNG in a folder of its own."""
    path = tmp_path_factory.mktemp("images") / "he/a.png"
    path.parent.mkdir()
    assert cv2.imwrite(str(path), np.ascontiguousarray(he_pixels[BOX][:, :, ::-1]))
    return path


def settings(image: Path, variant: dict[str, Any] | None = None, **more: Any) -> EvaluateConfig:
    sample = {"guided": False, "steps": 2}
    raw = {
        "root": str(image.parents[1]),
        "nulls": ["source"],
        "crop_px": 0,
        "variants": [{"name": "v", "sample": sample} | (variant or {})],
        "images": [{"name": "g", "mpp": 0.5, "folder": "he"}],
    }
    return msgspec.convert(raw | more, EvaluateConfig)


def paint(config: EvaluateConfig, bundle: ModelBundle) -> Rgb8:
    subject = load_subject(find_images(config)[0], bundle.spec.mpp, config)
    return ModelPainter.of(config.variants[0], bundle, config).paint(subject).picture


def test_image_is_painted_as_a_slide_is_translated(
    tmp_path: Path,
    folder: Path,
    bundle: ModelBundle,
    image: Path,
    he_pixels: Rgb8,
    write_slide: Any,
) -> None:
    picture = read_picture(image)
    flags: dict[str, Any] = {
        "bundle": str(folder),
        "cluster.executor": "serial",
        "cluster.device": "cpu",
        "sample.guided": False,
        "sample.steps": 2,
        "tiles.tissue_min_fraction": 0.0,
        "write.lossless": True,
    }
    slide = write_slide(tmp_path / "a.tiff", picture, 0.5)
    result = translate_slide(slide, tmp_path, resolve_run_config(flags)[0])
    with tifffile.TiffFile(result.files.output) as tiff:
        expected = tiff.pages.first.asarray()
    made = paint(settings(image), bundle)
    # The two see their glass on different pixels; well inside the tissue it plays no part.
    inside = cv2.erode(is_stained(picture, (243.0,) * 3, 0.5).astype(np.uint8), np.ones((11, 11)))
    assert inside.mean() > 0.1
    np.testing.assert_array_equal(made[inside > 0], expected[inside > 0])


def test_crop_lies_in_the_image_as_the_whole_does(bundle: ModelBundle, image: Path) -> None:
    """One tile at the center: noise by place and the pixels around it are the image's."""
    whole = paint(settings(image), bundle)
    crop = paint(settings(image, crop_px=TILE_PX), bundle)
    assert crop.shape == (TILE_PX, TILE_PX, 3)
    # The central tile of 3 x 3 begins at 96 = (320 - 128) / 2; its middle is its own.
    np.testing.assert_array_equal(crop[32:-32, 32:-32], whole[128:192, 128:192])


def test_small_crop_sees_its_surroundings(bundle: ModelBundle, image: Path) -> None:
    small = paint(settings(image, crop_px=64), bundle)
    assert small.shape == (64, 64, 3)


def test_seams_bare_picture_and_spread_come_with_the_picture(
    bundle: ModelBundle, image: Path
) -> None:
    sample = {"guided": False, "steps": 2, "seeds": 2}
    config = settings(image, {"sample": sample}, crop_px=TILE_PX + 96)
    subject = load_subject(find_images(config)[0], bundle.spec.mpp, config)
    made = ModelPainter.of(config.variants[0], bundle, config).paint(subject)
    assert [(lines.columns, lines.rows) for lines in made.seams] == [
        ((96,), (96,)),
        ((128,), (128,)),
    ]
    assert made.seams[0].stride_px == 96
    he = subject.cut(subject.he)
    laid = lay_glass(made.bare, he, subject.glass.rgb, bundle.spec.color.output_white)
    np.testing.assert_array_equal(laid[:80, :80], made.picture[:80, :80])
    single = paint(settings(image, crop_px=TILE_PX + 96), bundle)
    np.testing.assert_array_equal(single, made.picture)
    assert made.sd is not None
    other = paint(settings(image, {"seed": 1}, crop_px=TILE_PX + 96), bundle)
    direct = np.abs(dab_od(single) - dab_od(other)) / np.sqrt(2.0)
    np.testing.assert_allclose(made.sd[:90, :90], direct[:90, :90], atol=0.0026)
    alone = settings(image, crop_px=TILE_PX)
    subject = load_subject(find_images(alone)[0], bundle.spec.mpp, alone)
    made = ModelPainter.of(alone.variants[0], bundle, alone).paint(subject)
    assert (made.seams, made.sd) == ((), None)


def test_seed_and_start_image_change_the_picture(bundle: ModelBundle, image: Path) -> None:
    plain = paint(settings(image, crop_px=TILE_PX), bundle)
    again = paint(settings(image, crop_px=TILE_PX), bundle)
    np.testing.assert_array_equal(plain, again)
    seeded = paint(settings(image, {"seed": 1}, crop_px=TILE_PX), bundle)
    assert (seeded != plain).mean() > 0.2
    sample = {"guided": False, "steps": 2, "start_image": "haematoxylin"}
    started = paint(settings(image, {"sample": sample}, crop_px=TILE_PX), bundle)
    assert (started != plain).mean() > 0.2


def test_color_is_fitted_once_for_variants_that_need_the_same(
    bundle: ModelBundle, image: Path
) -> None:
    config = settings(image)
    subject = load_subject(find_images(config)[0], 0.5, config)
    first = ModelPainter.of(config.variants[0], bundle, config).fit(subject)
    other = settings(image, {"seed": 3}).variants[0]
    assert ModelPainter.of(other, bundle, config).fit(subject) is first
    assert first.map_scale is None  # nothing looks at the map
    scales = []
    for kind in ("sobel", "dog"):
        seeing = {"guidance": {"structure_scale": 1.0, "gradient_map": kind}, "sample": {}}
        variant = settings(image, seeing).variants[0]
        spec = vary_spec(bundle.spec, variant)
        # Not by `of`: this bundle has no critic, which a fit does not need.
        painter = ModelPainter(variant, replace(bundle, spec=spec), config)
        scales.append(painter.fit(subject).map_scale)
    assert None not in scales
    assert scales[0] != scales[1]


def test_variant_that_lacks_its_net_is_refused_before_work(
    bundle: ModelBundle, image: Path
) -> None:
    config = settings(image, {"sample": {"guided": True}})
    with pytest.raises(BundleError, match="no critic net"):
        ModelPainter.of(config.variants[0], bundle, config)


def test_image_without_stain_is_named(bundle: ModelBundle, tmp_path: Path) -> None:
    path = tmp_path / "he/blank.png"
    path.parent.mkdir()
    cv2.imwrite(str(path), np.full((200, 200, 3), 243, np.uint8))
    with pytest.raises(NoTissueError, match=r"blank\.png"):
        paint(settings(path), bundle)
    config = settings(path)
    subject = load_subject(find_images(config)[0], 0.5, config)
    with pytest.raises(NoTissueError, match=r"blank\.png"):
        null("null-recolor").paint(subject)


TARGET = (243.0, 243.0, 244.0)


def palette() -> Rgb8:
    rng = np.random.default_rng(0)
    od = rng.normal((0.6, 0.4), (0.1, 0.08), (5000, 2)) @ [[0.62, 0.69, 0.37], [0.27, 0.54, 0.8]]
    pixels: Rgb8 = np.clip(np.rint(243 * np.exp(-od)), 1, 255).astype(np.uint8)
    return pixels


def null(row: NullRow) -> NullPainter:
    return NullPainter(row, palette(), "digest", TARGET, 2.0)


@pytest.fixture(scope="module")
def subject(image: Path) -> Subject:
    config = settings(image)
    return load_subject(find_images(config)[0], 0.5, config)


def test_source_row_is_the_he_with_its_own_white(subject: Subject) -> None:
    painter = null("source")
    np.testing.assert_array_equal(painter.paint(subject).picture, subject.he)
    assert painter.white(subject) == subject.glass.rgb
    assert painter.facts() == {}, "neither palette nor blur decide it"


def test_recolor_row_takes_the_palettes_colors_and_keeps_glass(subject: Subject) -> None:
    made = null("null-recolor").paint(subject).picture
    tissue = is_stained(subject.he, subject.glass.rgb, 0.4)
    ours = rgb_to_od(made[tissue], TARGET).mean(axis=0)
    theirs = rgb_to_od(palette(), TARGET).mean(axis=0)
    assert np.abs(ours - theirs).max() < 0.15
    bare = cv2.erode((~is_stained(subject.he, subject.glass.rgb)).astype(np.uint8), np.ones((9, 9)))
    assert bare.any()
    assert np.abs(made[bare > 0].astype(int) - np.array(TARGET)).max() <= 1


def test_blur_row_is_the_recolored_one_with_less_detail(subject: Subject) -> None:
    sharp, soft = (null(row).paint(subject).picture for row in ROWS)
    # Glass is laid over after the blur, so they agree where no glass is within its reach.
    stained = is_stained(subject.he, subject.glass.rgb, 0.3).astype(np.uint8)
    inside = cv2.erode(stained, np.ones((25, 25))) > 0
    assert inside.mean() > 0.02
    np.testing.assert_array_equal(soft[inside], null_blur(sharp, 2.0)[inside])
    assert (soft != sharp)[inside].mean() > 0.5


def test_mean_row_is_flat_in_tissue(subject: Subject) -> None:
    made = null("null-mean").paint(subject).picture
    tissue = cv2.erode(
        is_stained(subject.he, subject.glass.rgb, 0.4).astype(np.uint8), np.ones((11, 11))
    )
    assert np.ptp(made[tissue > 0], axis=0).max() == 0
