"""A changed setting, slide, bundle or seed voids exactly the shards that depend on it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from wsi_stain.config import BundleSpec, NetSpec, RunConfig, resolve_run_config
from wsi_stain.manifest import Event
from wsi_stain.pipeline import translate_slide
from wsi_stain.translate.bundle import save_nets
from wsi_stain.translate.networks import ScoreNet

Pixels = npt.NDArray[np.uint8]
Write = Callable[..., Path]
NET = NetSpec(channels=(16, 16), blocks=1)
KEPT, VOID = True, False
# What changes; what becomes of the shards read; of the shards translated.
CHANGES: dict[str, tuple[dict[str, Any], bool, bool]] = {
    "nothing": ({}, KEPT, KEPT),
    "quality": ({"write.quality": 50}, KEPT, KEPT),
    "format": ({"write.format": "ome-zarr"}, KEPT, KEPT),
    "cache, attempts": ({"slide.cache_mb": 32, "cluster.attempts": 3}, KEPT, KEPT),
    "holes allowed": ({"slide.allow_missing": True}, KEPT, KEPT),
    "seed": ({"seed": 1}, KEPT, VOID),
    "steps": ({"sample.steps": 3}, KEPT, VOID),
    "color fit": ({"stain.method": "reinhard"}, KEPT, VOID),
    "bundle": ({"bundle": "other"}, KEPT, VOID),
    "overlap": ({"tiles.overlap_px": 48}, VOID, VOID),
    "pixel size": ({"slide.mpp": 0.51}, VOID, VOID),
    "slide": ({}, VOID, VOID),
}


class Stop(Exception):
    """Ends a run in the middle."""


def save_bundle(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    spec = BundleSpec(name="tiny", marker="Test", tile_px=128, net=NET, start_image="stain")
    save_nets(folder, spec, {"score": ScoreNet(NET).state_dict()})
    return folder


def settings(bundle: Path, **flags: Any) -> RunConfig:
    base = {"cluster.executor": "serial", "tiles.shard_tiles": 2, "cluster.device": "cpu"}
    model = {"bundle": str(bundle), "sample.steps": 2, "sample.guided": False}
    return resolve_run_config(base | model | flags)[0]


@pytest.fixture(scope="module")
def pixels(he_pixels: Pixels) -> Pixels:
    """About 10 tiles of tissue."""
    return he_pixels[300:600, 250:650]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, write_slide: Write, pixels: Pixels) -> Path:
    """A folder with a slide, two bundles, and a run stopped with all its shards finished."""
    folder = tmp_path_factory.mktemp("stopped")
    write_slide(folder / "s.tiff", pixels, 0.5)
    save_bundle(folder / "other", 1)
    config = settings(save_bundle(folder / "tiny", 0))

    def stop(event: Event) -> None:
        if (event.stage, event.kind) == ("translate", "finish"):
            raise Stop

    with pytest.raises(Stop):
        translate_slide(folder / "s.tiff", folder / "out", config, listener=stop)
    return folder


@pytest.mark.parametrize("change", CHANGES)
def test_change_voids_exactly_what_depends_on_it(
    change: str, place: Path, tmp_path: Path, write_slide: Write, pixels: Pixels
) -> None:
    flags, read, translated = CHANGES[change]
    slide = place / "s.tiff"
    if change == "slide":
        other = pixels.copy()
        other[150, 200] ^= 1
        slide = write_slide(tmp_path / "s.tiff", other, 0.5)
    bundle = place / flags.get("bundle", "tiny")
    config = settings(bundle, **{**flags, "bundle": str(bundle)})
    shutil.copytree(place / "out", tmp_path / "out")
    begun: dict[str, tuple[int, int]] = {}

    def look(event: Event) -> None:
        if event.kind == "start":
            begun[event.stage] = (event.done, event.total)
        if event.stage == "translate":
            raise Stop

    with pytest.raises(Stop):
        translate_slide(slide, tmp_path / "out", config, listener=look)
    for stage, kept in (("fill", read), ("translate", translated)):
        done, total = begun[stage]
        assert done == (total if kept else 0), stage
