"""What a trained net is worth beyond its curve: memorization, information by noise level.

In: a recipe, and a run folder or a bundle. Out: pictures and tables in the run folder. Not here:
training.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from msgspec import structs
from numpy.typing import NDArray
from PIL import Image

from wsi_stain.bundles import find_bundle, read_spec
from wsi_stain.config import TrainConfig
from wsi_stain.errors import BundleError, ConfigError
from wsi_stain.files import make_folder
from wsi_stain.manifest import Event, Listener
from wsi_stain.train.checkpoint import load_average, load_into
from wsi_stain.train.data import ImageSet
from wsi_stain.train.images import load_images
from wsi_stain.train.information import draw_levels, measure_levels, to_csv
from wsi_stain.train.memorize import Bank, compare, draw_pairs
from wsi_stain.train.mine import MineStage
from wsi_stain.train.samples import sample
from wsi_stain.train.score import ScoreStage
from wsi_stain.translate.bundle import load_bundle, pick_device
from wsi_stain.translate.pixels import to_rgb

__all__ = ["measure_stage"]

PATCH_PX = 64
N_PATCHES = 48
BATCH = 8
HELD_OUT_CROPS = 54


def measure_stage(
    config: TrainConfig, folder: Path, bundle: str | None, listener: Listener
) -> dict[str, object]:
    """Measure a trained net.

    "score" writes `memorization.json` and `memorization.png`: samples from noise alone, each over
    its nearest training patch. "mine" writes `information.csv` and `information.png`: held-out
    I(g_t; y_t) against t.

    Parameters
    ----------
    config
        Recipe: the images it was trained on, and those held out.
    folder
        Run folder, for the files, and for the net where no bundle is named.
    bundle
        Folder or name of the bundle whose net is measured; none: the averaged weights of the run.
    listener
        Hears notes.

    Returns
    -------
    dict
        The figures.

    Raises
    ------
    ConfigError
        The stage has no measure, there is no checkpoint, or the images can't be used.
    BundleError
        The bundle lacks the net.
    """
    measures: dict[str, Callable[[TrainConfig, Path, str | None], dict[str, object]]] = {
        "score": _memorization,
        "mine": _information,
    }
    if config.stage not in measures:
        raise ConfigError(
            f"Stage {config.stage} has no measure beyond its curve.",
            hint="See curve.png and log.jsonl in the run folder.",
        )
    if config.threads > 0:
        torch.set_num_threads(config.threads)
    make_folder(folder)
    facts = measures[config.stage](config, folder, bundle)
    listener(Event("train", "note", text=json.dumps(facts)))
    return facts


def _sets(config: TrainConfig) -> tuple[ImageSet, ImageSet]:
    train, held_out = (
        ImageSet(load_images(config.data, split), config.data) for split in ("train", "val")
    )
    return train, held_out


def _memorization(config: TrainConfig, folder: Path, bundle: str | None) -> dict[str, object]:
    train, held_out = _sets(config)
    stage = ScoreStage(config, train, held_out, pick_device(config.device))
    if bundle is None:
        load_into(stage.net, load_average(folder, config.stage)[0])
    else:
        net = load_bundle(bundle, stage.device, torch.float32).score
        if net is None:
            raise BundleError(f"Bundle {bundle} has no score net to measure.")
        stage.net = net
    stage.net.eval()
    bank = Bank([image.rgb for image in train.images], PATCH_PX)
    groups = [
        bank.group(_middle(pictures))
        for pictures in (
            _drawn(stage),
            to_rgb(held_out.fixed(N_PATCHES, seed=3)),
            to_rgb(train.batch(N_PATCHES, np.random.default_rng(3))),
        )
    ]
    found = compare(*groups)
    facts = {"samples_seen": _seen(folder, config, bundle), **asdict(found)}
    text = json.dumps(facts, indent=2) + "\n"
    (folder / "memorization.json").write_text(text, encoding="utf-8")
    Image.fromarray(draw_pairs(groups[0])).save(folder / "memorization.png")
    return facts


def _drawn(stage: ScoreStage) -> NDArray[np.uint8]:
    # Two patches' side of context is as much as the net sees.
    side = 2 * PATCH_PX
    batches = [
        to_rgb(sample(stage.net, stage.schedule, (BATCH, 3, side, side), i, stage.config.last_step))
        for i in range(N_PATCHES // BATCH)
    ]
    return np.concatenate(batches)


def _middle(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    top = (pictures.shape[1] - PATCH_PX) // 2
    return pictures[:, top : top + PATCH_PX, top : top + PATCH_PX]


def _seen(folder: Path, config: TrainConfig, bundle: str | None) -> int:
    if bundle is None:
        return load_average(folder, config.stage)[1]
    return read_spec(find_bundle(bundle)).trained_samples


def _information(config: TrainConfig, folder: Path, bundle: str | None) -> dict[str, object]:
    train, held_out = _sets(config)
    device = pick_device(config.device)
    spec = None if bundle is None else read_spec(find_bundle(bundle))
    if spec is not None:
        # A critic knows only the kind of map, and its least noise, that it was trained with.
        config = structs.replace(
            config,
            critic=spec.critic or config.critic,
            gradient_map=spec.guidance.gradient_map,
            map_floor_step=spec.guidance.map_floor_step,
        )
    stage = MineStage(config, train, held_out, device)
    if bundle is None:
        load_into(stage.net, load_average(folder, config.stage)[0])
    else:
        critic = load_bundle(bundle, device, torch.float32).critic
        if critic is None:
            raise BundleError(f"Bundle {bundle} has no critic to measure.")
        stage.net = critic
    stage.held_out = held_out.fixed(HELD_OUT_CROPS, seed=1).to(device)
    levels = measure_levels(stage)
    (folder / "information.csv").write_text(to_csv(levels), encoding="utf-8")
    title = f"{config.marker}: held-out information of picture and gradient map"
    draw_levels(levels, title).save(folder / "information.png")
    return {str(level.step): round(level.nats, 3) for level in levels}
