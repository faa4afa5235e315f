"""Colors of the training IHC, measured on planted pictures and on the real set."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from wsi_stain.errors import NoTissueError
from wsi_stain.stain.density import HDX, rgb_to_od
from wsi_stain.stain.reference import N_QUANTILES, TISSUE_OD, measure_reference
from wsi_stain.stain.separate import angle_deg

Rgb8 = npt.NDArray[np.uint8]
Plant = Callable[..., Rgb8]
WHITE = (243.0, 241.0, 244.0)
IHC = np.array([[0.62, 0.69, 0.37], [0.27, 0.54, 0.80]])


def test_planted_ihc_is_measured(plant_tissue: Plant) -> None:
    images = [plant_tissue(IHC, seed=seed).reshape(100, 200, 3) for seed in range(3)]
    found = measure_reference(images, WHITE)
    for vector, planted in zip(found.stain_od, IHC, strict=True):
        assert angle_deg(np.array(vector), planted) < 8.0
    assert len(found.mean_od_quantiles) == N_QUANTILES
    od = rgb_to_od(images[0].reshape(-1, 3), WHITE)
    expected = np.quantile(od[od.max(axis=1) > TISSUE_OD].mean(axis=1), [0.25, 0.5, 0.75])
    np.testing.assert_allclose(np.array(found.mean_od_quantiles)[[8, 16, 24]], expected, rtol=0.05)


def test_color_of_a_rank_is_that_of_the_stain_that_prevails() -> None:
    """Two stains that never meet: pale ranks are blue, dark ones brown, none is a mixture."""
    rng = np.random.default_rng(3)
    unit = IHC / np.linalg.norm(IHC, axis=1, keepdims=True)
    blue = rng.uniform(0.2, 0.9, (9_000, 1)) * unit[0]
    brown = rng.uniform(1.0, 2.0, (1_000, 1)) * unit[1]
    levels = np.array(WHITE) * np.exp(-np.concatenate([blue, brown]))
    found = measure_reference([np.rint(levels).astype(np.uint8).reshape(100, 100, 3)], WHITE)
    colors = np.array(found.ranked_od)
    np.testing.assert_allclose(colors.mean(axis=1), found.mean_od_quantiles, rtol=1e-6)
    for rank, color in enumerate(colors):
        assert angle_deg(color, unit[int(rank >= 29)]) < 4.0, rank


def test_the_two_stains_get_tables_of_their_own() -> None:
    """A tenth of the pixels is brown; each table holds its stain alone, from pale to dark."""
    rng = np.random.default_rng(3)
    unit = IHC / np.linalg.norm(IHC, axis=1, keepdims=True)
    blue = rng.uniform(0.2, 0.9, (9_000, 1)) * unit[0]
    brown = rng.uniform(0.6, 2.0, (1_000, 1)) * unit[1]
    levels = np.array(WHITE) * np.exp(-np.concatenate([blue, brown]))
    found = measure_reference([np.rint(levels).astype(np.uint8).reshape(100, 100, 3)], WHITE)
    assert found.positive_share == pytest.approx(0.1, abs=0.02)
    for table, stain, (low, high) in (
        (found.blue_od, unit[0], (0.2, 0.9)),
        (found.brown_od, unit[1], (0.6, 2.0)),
    ):
        colors = np.array(table)
        assert colors.shape == (N_QUANTILES, 3)
        lengths = np.linalg.norm(colors, axis=1)
        np.testing.assert_allclose(lengths, np.linspace(low, high, N_QUANTILES), atol=0.06)
        assert max(angle_deg(color, stain) for color in colors) < 4.0


def test_a_set_without_brown_has_no_brown_table() -> None:
    rng = np.random.default_rng(3)
    unit = IHC[0] / np.linalg.norm(IHC[0])
    levels = np.array(WHITE) * np.exp(-rng.uniform(0.2, 0.6, (10_000, 1)) * unit)
    found = measure_reference([np.rint(levels).astype(np.uint8).reshape(100, 100, 3)], WHITE)
    assert found.brown_od == ()
    assert len(found.blue_od) == N_QUANTILES


def test_one_black_laboratory_does_not_decide(plant_tissue: Plant) -> None:
    normal = [plant_tissue(IHC, seed=seed).reshape(100, 200, 3) for seed in range(4)]
    black = plant_tissue(IHC, strengths=(4.0, 4.0)).reshape(100, 200, 3)
    alone, joined = measure_reference(normal, WHITE), measure_reference([*normal, black], WHITE)
    np.testing.assert_allclose(joined.stain_c99, alone.stain_c99, rtol=0.1)
    np.testing.assert_allclose(
        joined.mean_od_quantiles[:-1], alone.mean_od_quantiles[:-1], rtol=0.1, atol=0.01
    )


def test_a_laboratory_of_many_fields_does_not_decide_the_counterstain() -> None:
    """Nine pale fields of one laboratory, one each of two deeper ones: the middle one's depth."""
    rng = np.random.default_rng(3)
    unit = IHC[0] / np.linalg.norm(IHC[0])

    def field(depth: float) -> Rgb8:
        levels = np.array(WHITE) * np.exp(-depth * rng.uniform(0.3, 0.9, (10_000, 1)) * unit)
        made: Rgb8 = np.rint(levels).astype(np.uint8).reshape(100, 100, 3)
        return made

    images = [*(field(1.0) for _ in range(9)), field(2.0), field(3.0)]
    names = [*["many"] * 9, "deep", "deeper"]
    found = measure_reference(images, WHITE, laboratories=names)
    middle = measure_reference(images[9:10], WHITE)
    np.testing.assert_allclose(found.blue_od, middle.blue_od, rtol=0.05)
    together = measure_reference(images, WHITE)
    assert np.mean(together.blue_od) < 0.6 * np.mean(found.blue_od)


def test_other_colors_keep_the_known_vectors() -> None:
    rng = np.random.default_rng(0)
    green = np.array([0.95, 0.10, 0.30]) / np.linalg.norm([0.95, 0.10, 0.30])
    levels = np.array(WHITE) * np.exp(-rng.gamma(2.0, 0.3, (10_000, 1)) * green)
    found = measure_reference([np.rint(levels).astype(np.uint8).reshape(100, 100, 3)], WHITE)
    assert angle_deg(np.array(found.stain_od[1]), HDX[1]) < 1e-6


def test_no_stain_is_refused() -> None:
    with pytest.raises(NoTissueError, match="None of 1 training images"):
        measure_reference([np.full((50, 50, 3), 242, np.uint8)], WHITE)
    with pytest.raises(NoTissueError, match="None of 0 training images"):
        measure_reference([])


@pytest.mark.slide
def test_real_ki67_has_hematoxylin_and_dab(shared_data: Path) -> None:
    with (shared_data / "manifest.csv").open(newline="", encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if r["path"].startswith("ihc/ki67_rouland")]
    pictures = [cv2.imread(str(shared_data / r["path"])) for r in rows[:40:4]]
    found = measure_reference([p[:, :, ::-1].astype(np.uint8) for p in pictures if p is not None])
    for vector, known in zip(found.stain_od, HDX, strict=False):
        assert angle_deg(np.array(vector), known) < 20.0
    assert (np.diff(found.mean_od_quantiles) >= 0.0).all()
