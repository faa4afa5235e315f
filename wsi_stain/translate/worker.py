"""Room 3 of 4: one process, one device. A shard of H&E patches in, a shard of IHC patches out.

In: shard numbers; everything else is in the frozen task (`task`). Out: tiles and their scores in
the store, a short report. Not here: scheduling, color fits, the grid's making, limits of scores.
"""

from __future__ import annotations

import functools
import time
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from wsi_stain.config import resolve_sampling
from wsi_stain.slides.store import PatchStore
from wsi_stain.stain.density import lay_glass
from wsi_stain.stain.spread import DabSpread, spread_levels
from wsi_stain.stain.tile_scores import TileJudge
from wsi_stain.translate.bundle import ModelBundle, load_bundle, pick_device
from wsi_stain.translate.headroom import Headroom
from wsi_stain.translate.noise import NoiseField
from wsi_stain.translate.pixels import to_model, to_rgb
from wsi_stain.translate.sampler import Noise, Sampler
from wsi_stain.translate.task import ShardReport, TranslateTask

__all__ = [
    "Translation",
    "choose_batch",
    "resolve_sampling",
    "translate_shard",
    "translate_tiles",
]

Tiles = NDArray[np.uint8]
# A processor only wants its caches full; a device idles between the kernels of a small batch.
BATCH_TILES = {"cpu": 4, "cuda": 64}
SEEDS = 2**31  # there are so many; after the last comes the first


def translate_shard(task: TranslateTask, shard: int) -> ShardReport:
    """Translate one shard of a slide and mark it done."""
    began = time.monotonic()
    bundle = _bundle(task.bundle, task.device, task.dtype)
    store = PatchStore.open(task.store)
    numbers = store.grid.shard(shard)
    places = np.array([store.grid.region_out(i)[:2] for i in numbers], dtype=np.int64)
    he = store.read("he", shard)
    asked = choose_batch(task.sample.batch_tiles, bundle.device, store.grid.shard_tiles)
    headroom = _headroom(task.bundle, task.device, asked)
    made = translate_tiles(bundle, task, he, places, headroom)
    judge = TileJudge(task.start.stain, bundle.spec.color, store.grid.scale.mpp_out)
    sds = [None] * len(he) if made.sd is None else made.sd
    scores = [judge.score(*tile) for tile in zip(he, made.bare, made.ihc, sds, strict=True)]
    # In this order: a shard of `ihc` that is done has its spread.
    if made.sd is not None:
        store.write("sd", shard, spread_levels(made.sd)[..., None], task.key)
    store.write("ihc", shard, made.ihc, task.key, facts=scores)
    seconds = time.monotonic() - began
    device, dtype = str(bundle.device), str(bundle.dtype)
    return ShardReport(len(he), seconds, device, dtype, asked, headroom.batch_tiles)


class Translation(NamedTuple):
    """What became of some tiles.

    Attributes
    ----------
    ihc
        uint8 (n, t, t, 3), glass composited with the output's white.
    bare
        The same as the model gave it, before the glass.
    sd
        float32 (n, t, t), sd of DAB OD over seeds; None for a single seed.
    """

    ihc: Tiles
    bare: Tiles
    sd: NDArray[np.float32] | None


def choose_batch(asked: int, device: torch.device, n_tiles: int) -> int:
    """Choose how many of `n_tiles` are translated at once; `asked` 0 leaves the choice here.

    Never fewer than a processor's batch, so that there a few tiles have the shape that many have.
    """
    return asked or min(BATCH_TILES[device.type], max(BATCH_TILES["cpu"], n_tiles))


@functools.lru_cache(maxsize=2)
def _bundle(name: str, device: str, dtype: str) -> ModelBundle:
    """Load once per process: building the nets takes longer than a small shard."""
    precision = getattr(torch, dtype.removeprefix("torch.")) if dtype else None
    return load_bundle(name, pick_device(device), precision)


@functools.lru_cache(maxsize=2)
def _headroom(name: str, device: str, batch_tiles: int) -> Headroom:
    """Learn once per process what fits."""
    return Headroom(batch_tiles)


def translate_tiles(
    bundle: ModelBundle,
    task: TranslateTask,
    he: Tiles,
    places_xy: NDArray[np.int64],
    headroom: Headroom | None = None,
) -> Translation:
    """Translate tiles in batches of one constant shape.

    Parameters
    ----------
    bundle
        Loaded model.
    task
        Settings and slide-level transforms.
    he
        H&E patches, uint8 (n, t, t, 3).
    places_xy
        Left and top of each patch in the out frame, int64 (n, 2).
    headroom
        Batches that fit; none: batches as asked for, and half of that where memory runs out.

    Returns
    -------
    Translation
        Tiles in the order of `he`; those of the first seed.

    Notes
    -----
    **Invariant**: the last batch is filled up by repeating its last tile, so that a tile's result
    never depends on how many tiles travel with it. Batches of another size, after memory ran out,
    may change it by 1 grey level.
    """
    solver, guidance = resolve_sampling(bundle.spec, task.sample)
    sampler = bundle.sampler(solver, guidance)
    if headroom is None:
        headroom = Headroom(choose_batch(task.sample.batch_tiles, bundle.device, len(he)))

    def translate(rows: NDArray[np.int64]) -> Translation:
        return _translate_batch(bundle, sampler, task, he[rows], places_xy[rows])

    parts = headroom.run(translate, len(he))
    ihc, bare = (np.concatenate(arrays)[: len(he)] for arrays in list(zip(*parts, strict=True))[:2])
    sds = [part.sd for part in parts if part.sd is not None]
    return Translation(ihc, bare, np.concatenate(sds)[: len(he)] if sds else None)


def _translate_batch(
    bundle: ModelBundle,
    sampler: Sampler | None,
    task: TranslateTask,
    he: Tiles,
    places_xy: NDArray[np.int64],
) -> Translation:
    """Translate one batch with every seed; only the first picture is kept."""
    # One by one: the planes of a tile fit a core's cache, those of a batch do not.
    start = np.stack([task.start.apply(tile) for tile in he])
    x_0, source = to_model(start, bundle.device), to_model(he, bundle.device)
    places = torch.from_numpy(places_xy).to(bundle.device)

    color = bundle.spec.color
    gain = [shown / own for shown, own in zip(color.output_white, color.white, strict=True)]

    def paint(seed: int) -> tuple[Tiles, Tiles]:
        if sampler is None:
            bare = to_rgb(x_0, gain)
        else:
            noise = _remembered(NoiseField(seed % SEEDS), places, he.shape[1])
            bare = to_rgb(sampler(x_0, noise, task.map_scale, source), gain)
        return lay_glass(bare, he, task.white, color.output_white), bare

    ihc, bare = paint(task.seed)
    if task.sample.seeds == 1:
        return Translation(ihc, bare, None)
    spread = DabSpread()
    spread.add(ihc)
    for seed in range(task.seed + 1, task.seed + task.sample.seeds):
        spread.add(paint(seed)[0])
    return Translation(ihc, bare, spread.sd())


def _remembered(field: NoiseField, places: torch.Tensor, size_px: int) -> Noise:
    """Draw each field once: the start's and the map's are asked for in every step."""

    @functools.lru_cache(maxsize=4)
    def noise(step: int) -> torch.Tensor:
        return field.at(places, step, size_px)

    return noise
