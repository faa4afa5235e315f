"""Fields of whole slides and of runs' patch stores, as they are trained on.

In: a slide or a store, a pixel size. Out: `SlideFields`. Not here: color, splits, crops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsi_stain.config import TileConfig
from wsi_stain.errors import ConfigError
from wsi_stain.geometry import choose_scale
from wsi_stain.slides.fill import read_tiles
from wsi_stain.slides.image import SlideSource
from wsi_stain.slides.plan import TileGrid, plan_tiles
from wsi_stain.slides.store import PatchStore
from wsi_stain.slides.tissue import find_tissue
from wsi_stain.stain.white import WhitePoint, estimate_white

__all__ = ["SlideFields", "read_fields"]

GRID_FILE = "grid.json"
UNSCANNED = (255.0, 255.0, 255.0)
WHITE_PIXELS = 200_000
TILES = TileConfig()
HALF_TISSUE = 0.5


@dataclass(frozen=True)
class SlideFields:
    """Fields of one slide.

    Attributes
    ----------
    tiles
        uint8 (n, t, t, 3), as the scanner shows them.
    spans
        float64 (n, 2): where each begins and ends along the slide's width, 0..1.
    white
        The slide's glass: one white for all fields.
    """

    tiles: NDArray[np.uint8]
    spans: NDArray[np.float64]
    white: WhitePoint


def read_fields(
    path: Path, *, mpp: float, side_px: int, most: int, asked_mpp: float | None = None
) -> SlideFields:
    """Read fields of tissue, spread evenly over a slide or a patch store.

    Parameters
    ----------
    path
        Slide that `SlideSource` opens, or the folder of a filled patch store, whose source pixels
        are taken.
    mpp
        Pixel size of the fields, um/px.
    side_px
        Side of a field, px; a store's tiles have their own.
    most
        Read at most so many fields.
    asked_mpp
        Pixel size of the slide, um/px, where its file says none or a wrong one.

    Raises
    ------
    SlideError, NoTissueError
        The slide cannot be used.
    PlanError, OutputError
        The store is damaged, or not filled.
    ConfigError
        The store's pixel size is not `mpp`.

    Notes
    -----
    Memory bound: the fields.
    """
    if (path / GRID_FILE).is_file():
        return _store_fields(path, mpp, most)
    with SlideSource.open(path, mpp=asked_mpp) as source:
        thumbnail = source.thumbnail(TILES.mask_mpp)
        downsample = TILES.mask_mpp / source.mpp_l0
        grid = plan_tiles(
            choose_scale(source.size_l0, source.mpp_l0, mpp, TILES.mpp_tolerance),
            find_tissue(thumbnail, mpp=TILES.mask_mpp, downsample=downsample),
            tile_px=side_px,
            overlap_px=0,
            tissue_min_fraction=HALF_TISSUE,
            shard_tiles=1,
        )
        picks = _spread(grid.n_tiles, most)
        tiles = np.concatenate([read_tiles(source, grid, range(i, i + 1)) for i in picks])
        white = estimate_white(thumbnail, source.background)
    return SlideFields(tiles, _spans(grid, picks), white)


def _store_fields(path: Path, mpp: float, most: int) -> SlideFields:
    store = PatchStore.open(path)
    found_mpp = store.grid.scale.mpp_out
    if abs(found_mpp / mpp - 1.0) > TILES.mpp_tolerance:
        raise ConfigError(
            f"Patch store {path} has {found_mpp:.4g} um/px, and {mpp:.4g} are asked for.",
            hint="Give the slide itself, or set data.mpp to the store's.",
        )
    picks = _spread(store.grid.n_tiles, most)
    tiles = np.stack([store.read_tile("he", i) for i in picks])
    flat = tiles.reshape(-1, 3)
    white = estimate_white(flat[:: max(1, len(flat) // WHITE_PIXELS)], UNSCANNED)
    return SlideFields(tiles, _spans(store.grid, picks), white)


def _spans(grid: TileGrid, picks: Sequence[int]) -> NDArray[np.float64]:
    regions = [grid.region_out(i) for i in picks]
    edges = [(region.x_px, region.right_px) for region in regions]
    return np.asarray(edges, np.float64) / grid.scale.size_out.width_px


def _spread(n: int, most: int) -> list[int]:
    picks = np.linspace(0, n - 1, min(n, most)).round().astype(int)
    return sorted({int(i) for i in picks})
