"""From a bundle to its student: pairs of the teacher, training, export.

In: a recipe, a bundle with a score net. Out: the bundle, with a student. Not here: losses, the
loop, the command line.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import torch
from msgspec import structs

from wsi_stain import __version__
from wsi_stain.bundles import read_spec
from wsi_stain.config import BundleSpec, StudentSpec, TrainConfig, load_recipe
from wsi_stain.errors import BundleError, ConfigError
from wsi_stain.manifest import Event, Listener
from wsi_stain.train.checkpoint import load_average
from wsi_stain.train.he_fields import load_fields
from wsi_stain.train.loop import fit
from wsi_stain.train.rdmd import MatchStage
from wsi_stain.train.regress import RegressStage
from wsi_stain.train.run import describe, merge_statement
from wsi_stain.train.teacher_pairs import make_pairs, teacher_of
from wsi_stain.translate.bundle import ModelBundle, load_bundle, pick_device, save_nets
from wsi_stain.translate.networks import ScoreNet
from wsi_stain.translate.noise import Schedule
from wsi_stain.translate.student import student_net, widen

__all__ = ["distill_bundle", "export_student", "train_student"]


def distill_bundle(
    recipe: Path,
    folder: Path,
    bundle: Path,
    listener: Listener,
    *,
    samples: int | None = None,
    threads: int | None = None,
) -> None:
    """Train a student from a recipe and put it in the bundle that taught it.

    Parameters
    ----------
    recipe
        TOML file of a `TrainConfig` with ``stage = "distill"``.
    folder
        Run folder: teacher pairs, checkpoint, log; what is there is gone on with.
    bundle
        Bundle folder, read and then written.
    listener
        Hears the events.
    samples, threads
        Beat the recipe where given.

    Raises
    ------
    ConfigError
        The recipe is of another stage, or its data cannot be used.
    BundleError
        No bundle there, or it lacks a net that its guidance needs.
    NoTissueError
        An H&E image shows too little stain.
    DeviceError
        No such device, or a loss that is not finite.
    """
    config, _ = load_recipe(recipe, TrainConfig)
    if config.stage != "distill":
        raise ConfigError(
            f"Recipe {recipe} trains stage {config.stage}, not distill.",
            hint=f"wsi-stain train {config.stage} --recipe {shlex.quote(str(recipe))} --run RUN "
            "--bundle BUNDLE",
        )
    asked = {"samples": samples, "threads": threads, "bundle": str(bundle.resolve())}
    config = structs.replace(config, **{k: v for k, v in asked.items() if v is not None})
    read_spec(bundle)  # a folder, not a shipped bundle of that name: it will be written
    train_student(config, folder, listener)
    export_student(config, folder, bundle, listener)


def train_student(
    config: TrainConfig,
    folder: Path,
    listener: Listener,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Make the teacher's pairs and train until the budget is spent; see `distill_bundle`."""
    if config.threads > 0:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    bundle = load_bundle(config.bundle, device)
    teacher_of(bundle, config)  # refuse before images are read
    if config.distill.crop_px > config.data.crop_px:
        raise ConfigError(
            f"distill.crop_px {config.distill.crop_px} is larger than a pair, data.crop_px "
            f"{config.data.crop_px}.",
            hint="Lower distill.crop_px.",
        )
    fit(_build(bundle, config, folder, listener), config, folder, listener, should_stop)


def _build(
    bundle: ModelBundle, config: TrainConfig, folder: Path, listener: Listener
) -> RegressStage:
    train, held_out = (
        make_pairs(bundle, config, load_fields(config, split), split, folder, listener)
        for split in ("train", "val")
    )
    # Trained weights are float32 masters, whatever the precision of the teacher.
    masters = load_bundle(config.bundle, bundle.device, torch.float32)
    net, schedule = _starting_net(masters, config), Schedule.of(bundle.spec)
    if config.distill.loss == "regress":
        start_step = bundle.spec.solver.start_step
        return RegressStage(config, net, schedule, start_step, train, held_out, bundle.device)
    teacher, fake = teacher_of(bundle, config), _score(masters)
    return MatchStage(config, net, fake, teacher, train, held_out, bundle.device)


def _starting_net(masters: ModelBundle, config: TrainConfig) -> ScoreNet:
    """Start from the score net, or from the bundle's student where that is asked for.

    Distribution matching takes the student if there is one.

    Raises
    ------
    BundleError
        The bundle's student has other steps or another start than is asked for.
    """
    score, spec = _score(masters), masters.spec
    if config.distill.from_student and masters.student is None:
        raise BundleError(
            f"Bundle {spec.name} carries no student to go on from.",
            hint="Leave distill.from_student out.",
        )
    wanted = config.distill.from_student or config.distill.loss == "rdmd"
    if wanted and masters.student is not None and spec.student is not None:
        levels = (spec.student.steps, spec.student.start_step)
        if levels != (config.distill.evaluations, spec.solver.start_step):
            raise BundleError(
                f"The student of bundle {spec.name} takes {levels[0]} step(s) from level "
                f"{levels[1]}; asked are {config.distill.evaluations} from "
                f"{spec.solver.start_step}.",
                hint='Train it anew: loss = "regress", from_student = false.',
            )
        return masters.student
    net = student_net(score.spec).to(masters.device)
    widen(net, score.state_dict())
    return net


def _score(bundle: ModelBundle) -> ScoreNet:
    if bundle.score is None:
        raise BundleError(f"Bundle {bundle.spec.name} has no score net to start a student from.")
    return bundle.score


def export_student(
    config: TrainConfig, folder: Path, bundle: Path, listener: Listener
) -> BundleSpec:
    """Write the averaged student into its bundle, with what it was trained on.

    Returns
    -------
    BundleSpec
        As written, without the digest of the new weights.

    Raises
    ------
    ConfigError
        No checkpoint, or one of another stage.
    """
    spec = read_spec(bundle)
    weights, samples = load_average(folder, "distill")
    images = [image for field in load_fields(config, "train") for image in field.images]
    distill = config.distill
    before = ", on from an earlier student" if distill.from_student else ""
    line = f"{distill.pairs} teacher pairs, loss {distill.loss}{before}; "
    line += describe(images, samples)
    spec = structs.replace(
        spec,
        student=StudentSpec(
            steps=distill.evaluations,
            start_step=spec.solver.start_step,
            edges_push=distill.edges_push,
            trained_by=distill.loss,
            trained_samples=samples,
        ),
        data_statement=merge_statement(spec.data_statement, "distill", line),
        licences=tuple(sorted({*spec.licences, *(image.licence for image in images)})),
        created_by=f"wsi-stain {__version__}",
    )
    save_nets(bundle, spec, {"student": weights})
    listener(Event("train", "note", text=f"{bundle}: student of {samples} samples."))
    return spec
