"""From a recipe to a trained net, and from a run folder to a bundle.

In: a `TrainConfig`. Out: the run folder's checkpoint and log; a bundle folder. Not here: losses,
the loop, the command line.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from msgspec import structs

from wsi_stain import __version__
from wsi_stain.bundles import read_spec
from wsi_stain.config import BundleSpec, TrainConfig, load_recipe
from wsi_stain.errors import BundleError, ConfigError
from wsi_stain.manifest import Event, Listener
from wsi_stain.stain.reference import measure_reference
from wsi_stain.train.checkpoint import load_average
from wsi_stain.train.data import ImageSet
from wsi_stain.train.images import TrainImage, load_images
from wsi_stain.train.loop import Stage, fit
from wsi_stain.train.mine import MineStage
from wsi_stain.train.ranks import ALONE, Ranks, join_ranks
from wsi_stain.train.refine import RefineStage
from wsi_stain.train.score import ScoreStage, settle_net
from wsi_stain.translate.bundle import (
    FILES,
    count_cuda_devices,
    load_bundle,
    pick_device,
    save_nets,
)

__all__ = ["describe", "export", "merge_statement", "read_recipe", "run_stage", "train_stage"]

FEW_CROPS = 2_000
PARTS = {"score": "score", "mine": "critic", "refine": "heads", "distill": "student"}


def train_stage(
    stage: str,
    recipe: Path,
    folder: Path,
    bundle: Path | None,
    listener: Listener,
    *,
    samples: int | None = None,
    threads: int | None = None,
) -> None:
    """Train one stage from a recipe; put its weights in a bundle when one is named.

    Parameters
    ----------
    stage
        "score", "mine" or "refine"; must be the recipe's own.
    recipe
        TOML file of a `TrainConfig`.
    folder
        Run folder; a checkpoint there is continued.
    bundle
        Bundle folder to write, and for "refine" to take the score net from; none: as the recipe
        says for reading, and nothing is written.
    listener
        Hears the events.
    samples, threads
        Beat the recipe where given.

    Raises
    ------
    ConfigError
        The recipe is of another stage, or cannot be used.
    BundleError
        The bundle lacks what the stage needs.
    DeviceError
        No such device, or a loss that is not finite.
    """
    config = read_recipe(stage, recipe)
    asked = {"samples": samples, "threads": threads, "bundle": bundle and str(bundle.resolve())}
    config = structs.replace(config, **{k: v for k, v in asked.items() if v is not None})
    if bundle is not None:
        _starting_spec(config, bundle)  # refuse before hours of work, not after
    with join_ranks(config.device) as ranks:
        run_stage(config, folder, listener, ranks=ranks)
    if bundle is not None and ranks.leads:
        export(config, folder, bundle, listener)


def read_recipe(stage: str, recipe: Path) -> TrainConfig:
    """Read the recipe of a stage.

    Raises
    ------
    ConfigError
        It is of another stage, or cannot be used.
    """
    config, _ = load_recipe(recipe, TrainConfig)
    if config.stage != stage:
        verb = "distill" if config.stage == "distill" else f"train {config.stage}"
        raise ConfigError(
            f"Recipe {recipe} trains stage {config.stage}, not {stage}.",
            hint=f"wsi-stain {verb} --recipe {shlex.quote(str(recipe))} --run RUN --bundle BUNDLE",
        )
    return config


def run_stage(
    config: TrainConfig,
    folder: Path,
    listener: Listener,
    should_stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
) -> None:
    """Load the images, build the stage and train it until its budget is spent.

    Parameters
    ----------
    config
        Recipe.
    folder
        Run folder; a checkpoint there is continued.
    listener
        Hears the events.
    should_stop
        Asked before every step; when true, a checkpoint is written and training ends.
    ranks
        Which process of how many this is; the batch is split over them.

    Raises
    ------
    ConfigError
        No images, or a checkpoint of another stage or net.
    BundleError
        Stage "refine": the bundle has no score net.
    DeviceError
        No such device, or a loss that is not finite.
    """
    if config.threads > 0:
        torch.set_num_threads(config.threads)
    train = ImageSet(load_images(config.data, "train"), config.data)
    held_out = ImageSet(load_images(config.data, "val"), config.data)
    device = ranks.device or pick_device(config.device)
    if ranks.leads:
        for text in _warnings(config, train, ranks):
            listener(Event("train", "note", text=text))
    share = structs.replace(config, batch=ranks.share(config.batch))
    stage = _build(share, train, held_out, device)
    fit(stage, config, folder, listener, should_stop, ranks)


def _warnings(config: TrainConfig, train: ImageSet, ranks: Ranks) -> Iterator[str]:
    """Tell what a person would want to know before hours of work."""
    n_crops = train.area_px() // config.data.crop_px**2
    if n_crops < FEW_CROPS:
        yield (
            f"The {len(train.images)} training images hold {n_crops} separate crops of "
            f"{config.data.crop_px} px, each seen {config.samples / max(1, n_crops):.0f} times: "
            "the net may memorize them. Look at samples-*.png, and measure: --measure"
        )
    n_devices = count_cuda_devices(config.device)
    if ranks.size == 1 and n_devices > 1:
        yield (
            f"{n_devices} CUDA devices, one is used. All: torchrun --nproc-per-node {n_devices} "
            f"-m wsi_stain train {config.stage} ..."
        )


def _build(config: TrainConfig, train: ImageSet, held_out: ImageSet, device: torch.device) -> Stage:
    if config.stage == "score":
        return ScoreStage(config, train, held_out, device)
    if config.stage == "mine":
        return MineStage(config, train, held_out, device)
    encoder = load_bundle(config.bundle, device, torch.float32).score
    if encoder is None:
        raise BundleError(
            f"Bundle {config.bundle} has no score net, whose features stage refine needs.",
            hint="Train stage score first: wsi-stain train score --recipe RECIPE --run RUN "
            f"--bundle {shlex.quote(config.bundle)}",
        )
    return RefineStage(config, encoder, train, held_out, device)


def export(config: TrainConfig, folder: Path, bundle: Path, listener: Listener) -> BundleSpec:
    """Write the averaged weights of a run into a bundle, with what they were trained on.

    Parameters
    ----------
    config
        The run's recipe. The images are read again: net statistics, colors and licences come
        from them, so they must be those of the training.
    folder
        Run folder with a checkpoint.
    bundle
        Bundle folder. Stage "score" makes it if absent; the others add to it.
    listener
        Hears one "note".

    Returns
    -------
    BundleSpec
        As written to `bundle.json`, without digests of the weights.

    Raises
    ------
    ConfigError
        No checkpoint, one of another stage, or no images.
    BundleError
        Stage "mine" or "refine" without a bundle to add to.
    """
    spec = _starting_spec(config, bundle)
    weights, samples = load_average(folder, config.stage)
    images = load_images(config.data, "train")
    changed = _stage_fields(config, spec, images, samples)
    statement = merge_statement(spec.data_statement, config.stage, describe(images, samples))
    spec = structs.replace(
        spec,
        **changed,
        data_statement=statement,
        licences=tuple(sorted({*spec.licences, *(image.licence for image in images)})),
        created_by=f"wsi-stain {__version__}",
    )
    if config.stage == "score":
        spec = _drop_followers(spec, bundle, listener)
    save_nets(bundle, spec, {PARTS[config.stage]: weights})
    listener(Event("train", "note", text=f"{bundle}: {config.stage} net of {samples} samples."))
    return spec


def _starting_spec(config: TrainConfig, bundle: Path) -> BundleSpec:
    if (bundle / "bundle.json").is_file():
        return read_spec(bundle)
    if config.stage == "score":
        return BundleSpec(name=config.name, marker=config.marker, mpp=config.data.mpp)
    raise BundleError(
        f"{bundle} is no bundle yet, and stage {config.stage} can only add to one.",
        hint=f"wsi-stain train score --recipe RECIPE --run RUN --bundle {shlex.quote(str(bundle))}",
    )


def _stage_fields(
    config: TrainConfig, spec: BundleSpec, images: list[TrainImage], samples: int
) -> dict[str, object]:
    """Give the fields of the spec that a stage decides."""
    if config.stage == "refine":
        return {"heads": config.heads}
    if config.stage == "mine":
        # The critic only knows the kind of map, and its least noise, that it was trained with.
        guidance = structs.replace(
            spec.guidance,
            gradient_map=config.gradient_map,
            map_floor_step=config.map_floor_step,
        )
        return {"critic": config.critic, "guidance": guidance}
    data = config.data
    # What a person has settled in an existing bundle stays.
    settled = ("start_image", "solver", "teacher", "guidance")
    fresh = spec.net is None
    best_run = {name: getattr(config, name) for name in settled} if fresh else {}
    color = measure_reference(
        (image.rgb for image in images),
        data.white_target,
        laboratories=[image.source for image in images],
    )
    veil_od = config.veil_od if fresh else spec.color.veil_od
    return best_run | {
        "name": config.name,
        "marker": config.marker,
        "mpp": data.mpp,
        "net": settle_net(config.net, ImageSet(images, data)),
        "color": structs.replace(color, veil_od=veil_od),
        "trained_samples": samples,
    }


def _drop_followers(spec: BundleSpec, bundle: Path, listener: Listener) -> BundleSpec:
    """Take out what was trained on another score net: heads on its features, a student on it."""
    for part, remedy in (("heads", "wsi-stain train refine"), ("student", "wsi-stain distill")):
        if getattr(spec, part) is None:
            continue
        (bundle / FILES[part]).unlink(missing_ok=True)
        files = {file: digest for file, digest in spec.files.items() if file != FILES[part]}
        # Without its student a bundle runs by its solver.
        default = {"default_solver": "solver"} if spec.default_solver == part else {}
        spec = structs.replace(spec, **{part: None, "files": files}, **default)
        text = f"The old score net's {part} removed; train anew: {remedy}"
        listener(Event("train", "note", text=text))
    return spec


def describe(images: list[TrainImage], samples: int) -> str:
    """Say in one line what was seen: sources with counts and licences."""
    counts = Counter((image.source, image.licence) for image in images)
    parts = [f"{n} of {source} ({licence})" for (source, licence), n in sorted(counts.items())]
    return f"{samples} crops of {len(images)} images: {'; '.join(parts)}."


def merge_statement(statement: str, stage: str, line: str) -> str:
    """Keep one line per stage, in the order of training."""
    lines = dict(part.split(": ", 1) for part in statement.splitlines() if ": " in part)
    lines[stage] = line
    return "\n".join(f"{name}: {lines[name]}" for name in PARTS if name in lines)
