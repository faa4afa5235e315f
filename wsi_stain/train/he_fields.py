"""H&E to teach a student on: images, slides, the patch stores of runs.

In: a `TrainConfig`. Out: `HeField`s, each with one white, since color is fitted once per slide.
Not here: color fits, nets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsi_stain.config import RunConfig, TrainConfig
from wsi_stain.planning import plan_slide
from wsi_stain.slides.fill import read_tiles
from wsi_stain.slides.store import PatchStore
from wsi_stain.stain.white import WhitePoint, estimate_white
from wsi_stain.train.images import TrainImage, load_images

__all__ = ["HeField", "load_fields"]

TILES_PER_SLIDE = 48
_WHITE_PIXELS = 200_000
_UNSCANNED = (255.0, 255.0, 255.0)
GRID_FILE = "grid.json"

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class HeField:
    """H&E of one slide, or one image of which nothing else is known.

    Attributes
    ----------
    images
        Pictures of one size, uint8 (h, w, 3) each, as the scanner shows them.
    white
        The glass.
    """

    images: tuple[TrainImage, ...]
    white: WhitePoint

    def pixels(self) -> Pixels:
        """All pictures, uint8 (n, h, w, 3)."""
        return np.stack([image.rgb for image in self.images])

    def area_px(self) -> int:
        """Pixels in all."""
        return sum(image.rgb.shape[0] * image.rgb.shape[1] for image in self.images)


def load_fields(config: TrainConfig, split: str) -> list[HeField]:
    """Load the H&E of one split.

    Parameters
    ----------
    config
        `data` names images; `distill.slides` names slides and patch stores, relative to
        `data.root`, all of them for training; `bundle` tells the pixel size.
    split
        "train" or "val".

    Raises
    ------
    ConfigError
        No image matches, or one cannot be used.
    SlideError, NoTissueError
        A slide cannot be used.
    OutputError
        A patch store is not filled.
    """
    fields = [_image_field(image, config) for image in load_images(config.data, split)]
    if split == "train":
        root = Path(config.data.root).expanduser()
        fields += [_slide_field(root / name, config) for name in config.distill.slides]
    return fields


def _image_field(image: TrainImage, config: TrainConfig) -> HeField:
    return HeField((image,), _white(image.rgb, config.data.white_target))


def _white(pixels: Pixels, background: Sequence[float]) -> WhitePoint:
    flat = pixels.reshape(-1, 3)
    return estimate_white(flat[:: max(1, len(flat) // _WHITE_PIXELS)], background)


def _slide_field(path: Path, config: TrainConfig) -> HeField:
    if (path / GRID_FILE).is_file():
        store = PatchStore.open(path)
        tiles = np.stack([store.read_tile("he", i) for i in _spread(store.grid.n_tiles)])
        return HeField(tuple(_images(path, tiles)), _white(tiles, _UNSCANNED))
    plan = plan_slide(path, RunConfig(bundle=config.bundle))
    with plan.source as source:
        picks = _spread(plan.grid.n_tiles)
        tiles = np.concatenate([read_tiles(source, plan.grid, range(i, i + 1)) for i in picks])
        white = estimate_white(plan.thumbnail_rgb, source.background)
    return HeField(tuple(_images(path, tiles)), white)


def _images(path: Path, tiles: Pixels) -> Iterator[TrainImage]:
    for tile in tiles:
        yield TrainImage(path, path.name, "not stated", tile)


def _spread(n: int) -> list[int]:
    picks = np.linspace(0, n - 1, min(n, TILES_PER_SLIDE)).round().astype(int)
    return sorted({int(i) for i in picks})
