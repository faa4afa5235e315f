"""The beginning of a run: early refusals, folder, store, record.

In: a plan, settings. Out: a `Run`. Not here: any work on shards.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from wsi_stain.bundles import bundle_digest, find_bundle
from wsi_stain.config import ClusterConfig, RunConfig
from wsi_stain.doctor import package_versions
from wsi_stain.errors import OutputError
from wsi_stain.files import refuse_existing, writing
from wsi_stain.layout import Place, RunFiles
from wsi_stain.manifest import Listener, RunManifest
from wsi_stain.planning import SlidePlan, allowed_memory_bytes, slide_facts
from wsi_stain.slides.projection import PlanLimits, check
from wsi_stain.slides.store import PatchStore
from wsi_stain.stages.keys import he_key
from wsi_stain.stages.run import Run, one_at_a_time
from wsi_stain.translate.task import cuda_here

RECORDED = ("device", "workers", "executor", "memory_limit_mb", "attempts")

__all__ = ["begin", "cuda_devices", "prepare", "refuse_outputs"]


def prepare(plan: SlidePlan, out: Path | Place, config: RunConfig) -> RunFiles:
    """Make the run folder, after the plan was checked against memory, disk and existing files.

    Raises
    ------
    OutputError
        Something is in the way, or the system lets nobody in.
    PlanError
        Memory or disk are too small.
    """
    with writing(out.out if isinstance(out, Place) else out):
        files = RunFiles.of(out, plan.source.path, plan.spec.marker, config.write.format)
        if files.output.is_dir() and config.write.format == "ome-tiff":
            raise OutputError(f"{files.output} is a folder.", hint="Choose another one: --out DIR.")
        refuse_outputs(plan, files, config)
        _check_limits(plan, files, config)
        for folder in (files.folder, files.store.parent):
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
    return files


def refuse_outputs(plan: SlidePlan, files: RunFiles, config: RunConfig) -> None:
    """Refuse to write where something lies that may not be replaced.

    Raises
    ------
    OutputError
        It is named.
    """
    overwrite = _may_replace(plan, files, config)
    # A spread that belongs to another picture would be taken for this one's.
    for output in (files.output, files.uncertainty):
        refuse_existing(output, overwrite=overwrite)
    for other in files.others:
        if other.exists():
            raise OutputError(
                f"{other} is there in another format: both would share {files.folder.name}.",
                hint="Choose another folder (--out), or remove it and its run folder.",
            )


def _check_limits(plan: SlidePlan, files: RunFiles, config: RunConfig) -> None:
    """Check memory, and each disk for what will lie on it."""
    memory_bytes = allowed_memory_bytes(config.cluster)
    projection = plan.projection
    if files.scratch is not None:
        limits = PlanLimits(memory_bytes, _free_bytes(files.store))
        check(replace(projection, output_bytes=0), limits)
        projection = replace(projection, store_bytes=0)
    check(projection, PlanLimits(memory_bytes, _free_bytes(files.folder)))


def _free_bytes(path: Path) -> int:
    """Measure the free space; a file system without any size says none, and writing will tell."""
    there = next(folder for folder in path.absolute().parents if folder.exists())
    usage = shutil.disk_usage(there)
    return usage.free if usage.total else sys.maxsize


def begin(
    plan: SlidePlan,
    files: RunFiles,
    config: RunConfig,
    origins: Mapping[str, str],
    listener: Listener,
) -> Run:
    """Open the store and write the record before any work; the lock is held."""
    # Between the first look and the lock another run may have ended.
    refuse_outputs(plan, files, config)
    # What a killed run left under the output's name goes before the record that says whose it was:
    # a second kill must not find a file that nobody owns.
    if not config.write.overwrite and _may_replace(plan, files, config):
        files.set_aside()
    files.sweep()
    files.remove_report()
    store = PatchStore.create(files.store, plan.grid)
    manifest = RunManifest.begin(
        files.manifest,
        settings=_settings(config),
        origins=dict(origins),
        slide=slide_facts(plan.source),
        grid_digest=plan.grid.digest,
        bundle={"name": plan.spec.name, "digest": bundle_digest(find_bundle(config.bundle))},
        seed=config.seed,
        versions=package_versions(),
    )
    # What the plan read fills the cache of a reader that only a serial run uses again.
    plan.source.close()
    return Run(
        plan=plan,
        files=files,
        config=config,
        store=store,
        manifest=manifest,
        listener=one_at_a_time(listener),
        he_key=he_key(plan),
    )


def _may_replace(plan: SlidePlan, files: RunFiles, config: RunConfig) -> bool:
    """Tell whether an output that exists may go: it was said so, or a killed run left it.

    A run that may not replace anything found nothing there when it began. So what is there once
    all its rows are with the writer is its own, named a moment before the kill and not yet in the
    record.
    """
    if config.write.overwrite or not files.manifest.exists():
        return config.write.overwrite
    return RunManifest.load(files.manifest).was_naming(
        plan.source.digest, plan.grid.digest, _settings(config)
    )


def _settings(config: RunConfig) -> dict[str, Any]:
    """Give the settings for the record, as JSON gives them back, without the user's folders."""
    settings: dict[str, Any] = json.loads(msgspec.json.encode(config))
    # Which hosts did it, and where their keys lie, is no matter of the picture.
    cluster = {name: settings["cluster"][name] for name in RECORDED}
    return settings | {"bundle": Path(config.bundle).name, "cluster": cluster}


def cuda_devices(config: ClusterConfig) -> int:
    """Count the CUDA devices a run may use, see `cuda_here`."""
    return cuda_here(config.device)
