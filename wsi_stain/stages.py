"""The stages of a run, one function or method each; `pipeline` calls them in order.

In: a plan. Out: shards, transforms, the pyramid, the manifest. Not here: how any of it is done
(that is in the four rooms), nor which verbs exist.

Each stage asks the store what is still pending under its key, so a run that was killed goes on
where it stopped. A key holds the identity of all that the shard depends on.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from wsi_stain.bundles import bundle_digest, find_bundle
from wsi_stain.config import (
    BundleSpec,
    ClusterConfig,
    RunConfig,
)
from wsi_stain.dispatch import Executor
from wsi_stain.doctor import package_versions
from wsi_stain.errors import OutputError
from wsi_stain.geometry import Region
from wsi_stain.layout import RunFiles
from wsi_stain.manifest import Event, Listener, RunManifest
from wsi_stain.planning import SlidePlan, machine_bytes, slide_facts
from wsi_stain.slides.fill import fill_shard
from wsi_stain.slides.image import SlideSource
from wsi_stain.slides.projection import PlanLimits, check
from wsi_stain.slides.store import PatchStore
from wsi_stain.stain.density import is_stained
from wsi_stain.stain.white import estimate_white
from wsi_stain.translate.bundle import count_cuda_devices, fast_dtype, pick_device
from wsi_stain.translate.fit import ColorFit, fit_pictures
from wsi_stain.translate.worker import (
    ShardReport,
    TranslateTask,
)
from wsi_stain.write.overview import keep_he
from wsi_stain.write.stitch import stitch_bands
from wsi_stain.write.tiff import write_pyramid
from wsi_stain.write.validate import Expected, validate

FIT_TILES = 48
PROBES = 24
PROBE_PX = 128


@dataclass(frozen=True)
class FillTask:
    """Reads shards of one slide into the store; sent to each worker once."""

    source: SlideSource
    store: Path
    key: str

    def __call__(self, shard: int) -> int:
        """Fill one shard; gives its number of tiles."""
        return fill_shard(self.source, PatchStore.open(self.store), shard, self.key)


@dataclass
class Run:
    """A run in progress: the plan, its files, and what has been settled so far."""

    plan: SlidePlan
    files: RunFiles
    config: RunConfig
    store: PatchStore
    manifest: RunManifest
    he_key: str
    color: ColorFit | None = None
    ihc_key: str = ""
    devices: set[str] = field(default_factory=set)

    def remark(self, text: str, listener: Listener) -> None:
        """Tell a person something, now and in the record; an empty text is nothing."""
        if text:
            self.manifest.note(text)
            listener(Event("run", "note", text=text))

    def fill(self, executor: Executor, listener: Listener) -> None:
        """Read the patches."""
        task = FillTask(self.plan.source, self.files.store, self.he_key)
        pending = self.store.pending("he", self.he_key, verify=True)
        self._dispatch("fill", executor, task, pending, listener)

    def keep_he(self, listener: Listener) -> None:
        """Keep a small H&E picture for the report, which must work without the slide."""
        listener(Event("overview", "start"))
        source, scale, mask = self.plan.source, self.plan.grid.scale, self.plan.mask
        keep_he(source, scale, mask, self.files.he, marker=self.plan.spec.marker)
        listener(Event("overview", "finish"))

    def fit(self, listener: Listener) -> None:
        """Fit the color, once for the slide."""
        listener(Event("fit", "start"))
        self.color = fit_color(self.plan, self.store, self.config)
        for text in (*self.plan.source.notes, *self.color.notes):
            self.remark(text, listener)
        device = pick_device(self.config.cluster.device)
        self.ihc_key = digest(
            self.he_key,
            self.color.numbers(),
            bundle_digest(find_bundle(self.config.bundle)),
            msgspec.to_builtins(self.config.sample),
            self.config.seed,
            device.type,
            str(fast_dtype(device)),
        )
        self.manifest.record(stain=self.color.numbers())
        listener(Event("fit", "finish"))

    def translate(self, executor: Executor, listener: Listener) -> None:
        """Run the model on every pending shard; `fit` comes first."""
        if self.color is None:
            raise RuntimeError("translate before fit")
        task = TranslateTask(
            store=self.files.store,
            bundle=self.config.bundle,
            sample=self.config.sample,
            start=self.color.start,
            white=self.color.white,
            map_scale=self.color.map_scale,
            seed=self.config.seed,
            device=self.config.cluster.device,
            key=self.ihc_key,
        )
        pending = self.store.pending("ihc", self.ihc_key, verify=True)
        self._dispatch("translate", executor, task, pending, listener)
        self.manifest.record(devices=sorted({*self.manifest.content.devices, *self.devices}))

    def write(self, listener: Listener) -> None:
        """Stitch and write the pyramid."""
        grid = self.plan.grid
        size = grid.scale.size_out
        listener(Event("write", "start", total=size.height_px))
        self.manifest.stage_started("write", total=size.height_px)

        def bands() -> Iterator[NDArray[np.uint8]]:
            done = 0
            read = functools.partial(self.store.read_tile, "ihc")
            for band in stitch_bands(grid, read, _white_level(self.plan.spec)):
                yield band
                done += len(band)
                listener(Event("write", "advance", done=done, total=size.height_px))

        facts = write_pyramid(
            self.files.output,
            size,
            bands(),
            grid.scale.mpp_out,
            self.config.write,
            name=self.files.output.name.removesuffix(".ome.tiff"),
        )
        self.manifest.stage_finished("write", done=size.height_px, seconds=facts.seconds)
        listener(Event("write", "finish", done=size.height_px, total=size.height_px))

    def check(self, listener: Listener) -> None:
        """Open the pyramid again as a stranger."""
        listener(Event("validate", "start"))
        found = validate(self.files.output, expected=expectation(self.plan))
        if not found.ok:
            # Under its own name somebody would use it.
            self.files.output.replace(self.files.unsound)
            raise OutputError(
                f"{self.files.output} was written but is not sound: {'; '.join(found.problems)}.",
                hint=f"It lies in {self.files.unsound}; report this with the manifest beside it.",
            )
        listener(Event("validate", "finish"))

    def finish(self, *, keep_store: bool) -> dict[str, Any]:
        """Close the record; gives the summary for the terminal."""
        # In this order a kill loses no work: a store that outlives its run only takes space.
        self.manifest.finish([self.files.output])
        if not keep_store:
            self.files.store.replace(self.files.discarded)
            shutil.rmtree(self.files.discarded)
        return {
            "output": str(self.files.output),
            "run folder": str(self.files.folder),
            "size": str(self.plan.grid.scale.size_out),
            "pixel size um": round(self.plan.grid.scale.mpp_out, 5),
            "tiles": self.plan.grid.n_tiles,
            "seconds": {s.name: round(s.seconds, 1) for s in self.manifest.stages},
            "note": "virtual stain, research use only",
        }

    def _dispatch(
        self, stage: str, executor: Executor, task: Any, pending: list[int], listener: Listener
    ) -> None:
        grid = self.plan.grid
        done = grid.n_tiles - sum(len(grid.shard(shard)) for shard in pending)
        listener(Event(stage, "start", done=done, total=grid.n_tiles))
        self.manifest.stage_started(stage, total=grid.n_shards, done=grid.n_shards - len(pending))
        for shard, report in executor.run(task, pending):
            done += len(grid.shard(shard))
            if isinstance(report, ShardReport):
                self.devices.add(f"{report.device} {report.dtype}")
            listener(Event(stage, "advance", done=done, total=grid.n_tiles))
        self.manifest.stage_finished(stage, done=grid.n_shards)
        listener(Event(stage, "finish", done=done, total=grid.n_tiles))


def prepare(plan: SlidePlan, out: Path, config: RunConfig) -> RunFiles:
    """Make the run folder, after the plan was checked against memory, disk and existing files."""
    files = RunFiles.of(out, plan.source.path, plan.spec.marker)
    if files.output.is_dir():
        raise OutputError(f"{files.output} is a folder.", hint="Choose another one: --out DIR.")
    if files.output.exists() and not _may_replace(plan, files, config):
        raise OutputError(f"{files.output} exists already.", hint="Use --overwrite to replace it.")
    memory_bytes = config.cluster.memory_limit_mb * 2**20 or int(0.75 * machine_bytes())
    there = next(path for path in files.folder.absolute().parents if path.exists())
    check(plan.projection, PlanLimits(memory_bytes, shutil.disk_usage(there).free))
    try:
        files.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"Output folder {files.folder} cannot be made: {error.strerror}.",
            hint="Choose a folder that can be written: --out DIR.",
        ) from error
    return files


def begin(plan: SlidePlan, files: RunFiles, config: RunConfig, origins: Mapping[str, str]) -> Run:
    """Open the store and write the record before any work."""
    if _may_replace(plan, files, config):
        write = msgspec.structs.replace(config.write, overwrite=True)
    else:
        write = config.write
    files.sweep()
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
    he_key = digest(plan.source.digest, plan.grid.digest, plan.source.mpp_l0)
    config = msgspec.structs.replace(config, write=write)
    return Run(plan, files, config, store, manifest, he_key)


def _may_replace(plan: SlidePlan, files: RunFiles, config: RunConfig) -> bool:
    """Tell whether an output that exists may go: it was said so, or a killed run left it.

    A run that may not replace anything found nothing there when it began. So what is there once
    it writes is its own, named a moment before the kill and not yet in the record.
    """
    if config.write.overwrite or not files.manifest.exists():
        return config.write.overwrite
    return RunManifest.load(files.manifest).was_writing(
        plan.source.digest, plan.grid.digest, _settings(config)
    )


def _settings(config: RunConfig) -> dict[str, Any]:
    """Give the settings for the record, as JSON gives them back, without the user's folders."""
    settings: dict[str, Any] = json.loads(msgspec.json.encode(config))
    return settings | {"bundle": Path(config.bundle).name}


def fit_color(plan: SlidePlan, store: PatchStore, config: RunConfig) -> ColorFit:
    """Fit white, normalization, start image and map scale on tiles spread over the tissue."""
    grid = plan.grid
    picks = np.unique(np.linspace(0, grid.n_tiles - 1, FIT_TILES).round().astype(int))
    he = np.stack([store.read_tile("he", int(i)) for i in picks])
    glass = estimate_white(plan.thumbnail_rgb, plan.source.background)
    return fit_pictures(he, glass, plan.spec, config.stain, config.sample)


def expectation(plan: SlidePlan) -> Expected:
    """Say what the pyramid must show: stained where the H&E is, white where it is bare glass."""
    grid = plan.grid
    size = grid.scale.size_out
    white = estimate_white(plan.thumbnail_rgb, plan.source.background).rgb
    stained = is_stained(plan.thumbnail_rgb, white)
    tissue = replace(plan.mask, pixels=plan.mask.pixels & stained)
    glass = replace(plan.mask, pixels=~(plan.mask.pixels | stained))
    boxes = [
        Region(x_px, y_px, PROBE_PX, PROBE_PX)
        for y_px in _spread(size.height_px)
        for x_px in _spread(size.width_px)
    ]
    full = [box for box in boxes if tissue.fraction(box, grid.scale.factor) >= 1.0]
    empty = [box for box in boxes if glass.fraction(box, grid.scale.factor) >= 1.0]
    return Expected(
        size=size,
        mpp_out=grid.scale.mpp_out,
        tissue=tuple(full[:: max(1, len(full) // PROBES)]),
        glass=tuple(empty[:: max(1, len(empty) // PROBES)]),
        white=plan.spec.color.white,
    )


def _spread(side_px: int) -> list[int]:
    """Give starts of probes spread over a side."""
    last = max(0, side_px - PROBE_PX)
    return sorted({round(last * i / 24) for i in range(25)})


def cuda_devices(config: ClusterConfig) -> int:
    """Count the CUDA devices a run may use, as torch sees them."""
    return count_cuda_devices(config.device)


def digest(*parts: Any) -> str:
    """SHA-256, hex, of plain values: the identity of a stage's inputs."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _white_level(spec: BundleSpec) -> tuple[int, int, int]:
    red, green, blue = (round(level) for level in spec.color.white)
    return red, green, blue
