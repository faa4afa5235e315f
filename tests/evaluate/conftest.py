"""A finished run, made without a model: the H&E's two stains in H-DAB colors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from wsi_stain.config import RunConfig, WriteConfig
from wsi_stain.geometry import choose_scale
from wsi_stain.layout import OUTPUT_SUFFIX, RUN_SUFFIX
from wsi_stain.manifest import RunManifest
from wsi_stain.slides.image import SlideSource
from wsi_stain.slides.tissue import find_tissue
from wsi_stain.stain.density import HDX, od_to_rgb, rgb_to_od, unmix
from wsi_stain.write.overview import keep_he
from wsi_stain.write.tiff import write_pyramid

MakeRun = Callable[..., Path]

HE_WHITE = (243.0, 243.0, 244.0)
HE_OD = ((0.651, 0.701, 0.290), (0.216, 0.801, 0.558))
SETTINGS = {
    "bundle": "/home/jane doe/models/mine",
    "seed": 7,
    "write": {"quality": 77},
    "sample": {"solver": "student"},
}


@pytest.fixture(scope="session")
def make_run(synthetic_slide: Path) -> MakeRun:
    """Give the function (folder, name, marker, note, ...) -> the run folder.

    `blank` (left, top, width, height, px) is what the translation lost."""

    def make(
        folder: Path,
        name: str = "S-1_ki67",
        *,
        marker: str = "Ki-67",
        note: str = "",
        keeps_he: bool = True,
        slide_mpp: float = 0.5,
        blank: tuple[int, int, int, int] = (0, 0, 0, 0),
    ) -> Path:
        output, run = folder / (name + OUTPUT_SUFFIX), folder / (name + RUN_SUFFIX)
        run.mkdir(parents=True)
        with SlideSource.open(synthetic_slide) as source:
            scale = choose_scale(source.size_l0, source.mpp_l0, 0.5, 0.1)
            mask = find_tissue(source.thumbnail(8.0), mpp=8.0, downsample=8.0 / source.mpp_l0)
            if keeps_he:
                keep_he(source, scale, mask, run / "he", marker=marker)
            pixels = recolor(source.thumbnail(source.mpp_l0))
            x_px, y_px, width_px, height_px = blank
            pixels[y_px : y_px + height_px, x_px : x_px + width_px] = HE_WHITE
            slide: dict[str, Any] = {"digest": source.digest, "size": str(source.size_l0)}
            slide |= {"pixel size um": slide_mpp}
        write_pyramid(output, scale.size_out, [pixels], scale.mpp_out, WriteConfig(), name=name)
        manifest = RunManifest.begin(
            run / "manifest.json",
            settings=msgspec.to_builtins(msgspec.convert(SETTINGS, RunConfig)),
            origins={"bundle": "flag", "seed": "flag", "write.quality": "recipe"},
            slide=slide,
            grid_digest="9" * 64,
            bundle={"name": "ki67", "digest": "8" * 64},
            seed=7,
            versions={"python": "3.11", "wsi-stain": "0.1"},
        )
        manifest.record(stain=stain_numbers())
        if note:
            manifest.note(note)
        manifest.stage_started("translate", total=3)
        manifest.stage_finished("translate", done=3, seconds=12.5)
        manifest.finish([output])
        return run

    return make


def recolor(he: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Turn hematoxylin into DAB, on the left quarter only, and eosin into a little of itself."""
    densities = np.maximum(unmix(rgb_to_od(he, HE_WHITE), HE_OD), 0.0)
    nuclei = np.where(np.arange(he.shape[1])[:, None] < he.shape[1] // 4, HDX[1], HDX[0])
    od = densities[..., :1] * nuclei + 0.7 * densities[..., 1:] * HDX[0]
    return od_to_rgb(od, HE_WHITE)


def stain_numbers() -> dict[str, Any]:
    return {
        "white": list(HE_WHITE),
        "stain": {
            "method": "macenko",
            "stain_od": [list(row) for row in HE_OD],
            "stain_c99": [1.5, 1.25],
            "n_stained": 4321,
            "notes": [],
        },
        "start": {"kind": "haematoxylin", "target_white": list(HE_WHITE)},
        "map_scale": 0.5,
    }
