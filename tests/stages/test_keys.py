"""Keys of shards: whatever decides a tile's pixels or scores makes another key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from msgspec import structs

from wsi_stain.config import RunConfig, SampleConfig
from wsi_stain.planning import SlidePlan, plan_slide
from wsi_stain.stages import keys
from wsi_stain.stages.beside import fit_color
from wsi_stain.translate.fit import ColorFit
from wsi_stain.translate.task import Arithmetic

CONFIG = RunConfig()
HERE = Arithmetic("cpu", "torch.float32")


@pytest.fixture(scope="module")
def planned(
    tmp_path_factory: pytest.TempPathFactory,
    write_slide: Callable[..., Path],
    he_pixels: npt.NDArray[np.uint8],
) -> tuple[SlidePlan, ColorFit]:
    path = write_slide(
        tmp_path_factory.mktemp("slide") / "s.tiff", he_pixels[200:620, 150:700], 0.5
    )
    plan = plan_slide(path, CONFIG)
    with plan.source as source:
        return plan, fit_color(plan, source, CONFIG)


def test_color_is_fitted_on_tissue_where_glass_is_worked_on_too(
    tmp_path: Path, write_slide: Callable[..., Path], he_pixels: npt.NDArray[np.uint8]
) -> None:
    pixels = np.full((3200, 3200, 3), 243, np.uint8)
    pixels[2800:3000, 2800:3000] = he_pixels[380:580, 330:530]
    path = write_slide(tmp_path / "corner.tiff", pixels, 0.5)
    tiles = structs.replace(CONFIG.tiles, tissue_min_fraction=0.0)
    plan = plan_slide(path, structs.replace(CONFIG, tiles=tiles))
    with plan.source as source:
        assert plan.grid.n_tiles > 200
        assert fit_color(plan, source, CONFIG).stain.n_stained > 1000


def test_key_is_that_of_the_same_inputs(planned: tuple[SlidePlan, ColorFit]) -> None:
    plan, color = planned
    assert keys.ihc_key(plan, color, CONFIG, HERE) == keys.ihc_key(plan, color, CONFIG, HERE)
    elsewhere = structs.replace(CONFIG, cluster=structs.replace(CONFIG.cluster, workers=7))
    assert keys.ihc_key(plan, color, elsewhere, HERE) == keys.ihc_key(plan, color, CONFIG, HERE)


def test_key_differs_with_each_thing_that_decides_pixels(
    planned: tuple[SlidePlan, ColorFit], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, color = planned
    found = [
        keys.ihc_key(plan, color, CONFIG, HERE),
        keys.ihc_key(plan, color, CONFIG, HERE._replace(dtype="torch.bfloat16")),
        keys.ihc_key(plan, color, CONFIG, HERE._replace(device="cuda")),
        keys.ihc_key(plan, color, structs.replace(CONFIG, seed=1), HERE),
        keys.ihc_key(plan, color, structs.replace(CONFIG, bundle="ki67-open"), HERE),
        keys.ihc_key(plan, color, structs.replace(CONFIG, sample=SampleConfig(steps=9)), HERE),
        keys.ihc_key(plan, replace(color, white=(240.0, 240.0, 240.0)), CONFIG, HERE),
        keys.ihc_key(replace(plan, grid=replace(plan.grid, overlap_px=48)), color, CONFIG, HERE),
    ]
    for version in ("COLOR_VERSION", "SCORES_VERSION"):
        with monkeypatch.context() as patch:
            patch.setattr(keys, version, -1)
            found.append(keys.ihc_key(plan, color, CONFIG, HERE))
    assert len(set(found)) == len(found)
