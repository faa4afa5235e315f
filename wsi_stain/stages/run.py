"""A run in progress: shards are made, the result is checked, the record is closed.

In: what `begin` settled. Out: shards, the manifest. Not here: the color (`beside`), the pyramid
(`picture`).
"""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wsi_stain.bundles import name_anywhere
from wsi_stain.config import RunConfig
from wsi_stain.errors import OutputError
from wsi_stain.executor import Done, Executor, Step
from wsi_stain.geometry import Region
from wsi_stain.layout import RunFiles
from wsi_stain.manifest import Event, Listener, RunManifest
from wsi_stain.planning import SlidePlan
from wsi_stain.slides.fill import FillTask, missing_in
from wsi_stain.slides.missing import MissingTile, write_table
from wsi_stain.slides.plan import TileGrid
from wsi_stain.slides.store import ArrayName, PatchStore
from wsi_stain.stages.expect import expectation, shown_by_tiles
from wsi_stain.stages.keys import ihc_key
from wsi_stain.stages.picture import PictureWriter
from wsi_stain.stages.tiles import flag_texts, read_scores, slide_sd, summarize
from wsi_stain.stages.tiles import write_table as write_scores
from wsi_stain.stain.spread import OD_PER_LEVEL
from wsi_stain.translate.fit import ColorFit
from wsi_stain.translate.task import Arithmetic, ShardReport, TranslateTask, arithmetic, in_common
from wsi_stain.write.annotations import annotate_run
from wsi_stain.write.uncertainty import write_uncertainty
from wsi_stain.write.validate import Expected, Validation, validate

__all__ = ["Run", "one_at_a_time"]

MISSING_FLAG = "tiles missing in the slide"


@dataclass
class Run:
    """A run in progress: the plan, its files, and what has been settled so far.

    Only the main thread changes it or writes the manifest; `listener` may be called from any.
    """

    plan: SlidePlan
    files: RunFiles
    config: RunConfig
    store: PatchStore
    manifest: RunManifest
    listener: Listener
    he_key: str
    devices: set[str] = field(default_factory=set)
    missing: set[MissingTile] = field(default_factory=set)
    began_s: float = field(default_factory=time.monotonic)

    def remark(self, text: str) -> None:
        """Tell a person something, now and in the record; an empty text is nothing."""
        if text:
            self.manifest.note(text)
            self.listener(Event("run", "note", text=text))

    def work(self, executor: Executor, color: ColorFit, writer: PictureWriter) -> None:
        """Read and translate every pending shard; the writer follows as shards get done."""
        for text in (*self.plan.notes, *color.notes):
            self.remark(text)
        self.manifest.record(stain=color.numbers() | {"notes": list(color.notes)})
        there = in_common(executor.ask(arithmetic, self.config.cluster.device))
        steps = self._steps(color, there)
        self._tell_what_is_there(len(steps[-1].numbers))
        bars = {step.name: _Progress(self, step) for step in steps}
        rows_px = self.plan.grid.scale.size_out.height_px
        self.manifest.stage_started("write", total=rows_px)
        writer.start()
        for shard in set(range(self.plan.grid.n_shards)).difference(steps[-1].numbers):
            writer.gate.open(shard)
        for done in executor.run_steps(steps):
            self._hear(done)
            bars[done.step].advance(done)
            if done.step == steps[-1].name:
                writer.gate.open(done.number)
            writer.check()
        self.manifest.record(devices=sorted({*self.manifest.content.devices, *self.devices}))

    def release(self, writer: PictureWriter) -> None:
        """Let the pyramid get its last rows and its name: nothing else can fail by now."""
        rows_px = self.plan.grid.scale.size_out.height_px
        # From here on a file under the output's name may be ours.
        self.manifest.stage_reached("write", done=rows_px)
        writer.gate.open_all()

    def written(self, seconds: float) -> None:
        """Record that the pyramid is there; `seconds` without those spent waiting for shards."""
        rows_px = self.plan.grid.scale.size_out.height_px
        self.manifest.stage_finished("write", done=rows_px, seconds=seconds)
        self.listener(Event("write", "finish", done=rows_px, total=rows_px))

    def check(self) -> None:
        """Open the pyramid again as a stranger."""
        self.listener(Event("validate", "start"))
        self.missing.update(self.plan.source.missing)
        for shard in range(self.plan.grid.n_shards):
            self.missing.update(missing_in(self.store, shard) or ())
        expected = expectation(self.plan, self.missing)
        found = validate(self.files.output, expected=expected)
        if not found.ok:
            # Only then: it reads the slide again.
            shown = shown_by_tiles(self.plan, expected)
            if contradicted := {*expected.tissue, *expected.glass} - {*shown.tissue, *shown.glass}:
                self.remark(_contradiction(contradicted))
                found = validate(self.files.output, expected=shown)
        self._require_sound(self.files.output, found)
        self.listener(Event("validate", "finish"))

    def tell_missing(self) -> None:
        """Say which tiles of the slide are background, in the record and in a table."""
        write_table(self.files.missing, sorted(self.missing))
        flags = [f"{MISSING_FLAG}: {len(self.missing)}"] if self.missing else []
        self.manifest.record(flags=flags)
        if self.missing:
            self.remark(_words(self.missing, self.files.missing.name))

    def spread(self) -> None:
        """Write the spread over seeds; of a single seed there is none, nor may an old one stay."""
        seeds, path = self.config.sample.seeds, self.files.uncertainty
        if seeds == 1:
            path.unlink(missing_ok=True)
            return
        self.listener(Event("uncertainty", "start"))
        grid = self.plan.grid
        write_uncertainty(
            path,
            grid,
            self.store.tiles_in_order("sd"),
            self.config.write,
            name=f"{self.files.name}, uncertainty",
            seeds=seeds,
        )
        expected = Expected(grid.scale.size_out, grid.scale.mpp_out)
        self._require_sound(path, validate(path, expected=expected))
        self.listener(Event("uncertainty", "finish"))

    def _require_sound(self, path: Path, found: Validation) -> None:
        if found.ok:
            return
        # Under its own name somebody would use it.
        path.replace(self.files.unsound)
        raise OutputError(
            f"{path} was written but is not sound: {'; '.join(found.problems)}.",
            hint=f"It lies in {self.files.unsound}. Report this with the manifest beside it.",
        )

    def score_tiles(self) -> None:
        """Tell which tiles to look at: a table of all, a summary in the record."""
        scores = read_scores(self.store)
        write_scores(self.files.tile_scores, self.plan.grid, scores, self.config.trust)
        summary = summarize(scores, self.config.trust)
        if self.config.sample.seeds > 1:
            summary["uncertainty"] = {
                "seeds": self.config.sample.seeds,
                "dab_sd": slide_sd(scores, self.plan.grid.tissue),
                "od_per_level": OD_PER_LEVEL,
            }
        flags = [*self.manifest.content.flags, *flag_texts(summary)]
        self.manifest.record(tiles=summary, flags=flags)

    def annotate(self) -> None:
        """Write what QuPath shows over the pyramid, and the script that opens both pictures."""
        self.listener(Event("annotate", "start"))
        plan = self.plan
        stain, missing = self.manifest.content.stain, sorted(self.missing)
        annotate_run(self.files, plan.mask, plan.grid, plan.spec, stain, missing)
        self.listener(Event("annotate", "finish"))

    def finish(self, *, keep_store: bool) -> dict[str, Any]:
        """Close the record; gives the summary for the terminal."""
        # In this order a kill loses no work: a store that outlives its run only takes space.
        several = self.config.sample.seeds > 1
        self.manifest.finish([self.files.output, *([self.files.uncertainty] if several else [])])
        if not keep_store:
            self.files.store.replace(self.files.discarded)
            shutil.rmtree(self.files.discarded)
        record = self.manifest.content
        seconds = {stage.name: round(stage.seconds, 1) for stage in record.stages}
        return {
            "output": str(self.files.output),
            "run folder": str(self.files.folder),
            "size": str(self.plan.grid.scale.size_out),
            "pixel size um": round(self.plan.grid.scale.mpp_out, 5),
            "bytes": record.outputs[0].bytes,
            "tiles": self.plan.grid.n_tiles,
            "to look at": self._to_look_at(),
            "uncertainty": self._uncertainty(),
            "flags": list(record.flags),
            "notes": list(record.notes),
            # Stages overlap, so their seconds add up to more than the whole.
            "seconds": seconds | {"in all": round(time.monotonic() - self.began_s, 1)},
            "note": "virtual stain, research use only",
        }

    def _to_look_at(self) -> str:
        """Word how many tiles are flagged, and where they are listed."""
        tiles = self.manifest.content.tiles
        return f"{tiles['flagged']} of {tiles['tiles']} tiles; {self.files.tile_scores}"

    def _uncertainty(self) -> str:
        """Word the spread over seeds and where it lies; nothing for a single seed."""
        found = self.manifest.content.tiles.get("uncertainty")
        if found is None:
            return ""
        spread = f"sd of DAB OD {found['dab_sd']} over {found['seeds']} seeds"
        return f"{spread}; {self.files.uncertainty}"

    def _steps(self, color: ColorFit, there: Arithmetic) -> tuple[Step, Step]:
        """Settle what is pending, in the order of a shard's way.

        Workers may be elsewhere: they are told whole paths, and for all shards one kind of device
        and one precision.
        """
        config = self.config
        key = ihc_key(self.plan, color, config, there)
        store = self.files.store.absolute()
        translate = TranslateTask(
            store=store,
            bundle=name_anywhere(config.bundle),
            sample=config.sample,
            start=color.start,
            white=color.white,
            map_scale=color.map_scale,
            seed=config.seed,
            device=there.device,
            key=key,
            dtype=there.dtype,
        )
        fill = FillTask(self.plan.source, store, self.he_key)
        torn = self._torn()
        arrays: tuple[ArrayName, ...] = ("ihc", "sd") if config.sample.seeds > 1 else ("ihc",)
        unmade = {s for name in arrays for s in self.store.pending(name, key, verify=True)}
        unread = {*self.store.pending("he", self.he_key, verify=True), *torn}
        return (
            Step("fill", fill, sorted(unread)),
            Step("translate", translate, sorted({*unmade, *torn})),
        )

    def _tell_what_is_there(self, n_pending: int) -> None:
        """Say that a run goes on; the record holds it for each stage."""
        n_shards = self.plan.grid.n_shards
        if n_pending < n_shards:
            text = f"{n_shards - n_pending} of {n_shards} shards are there already: it goes on"
            self.listener(Event("run", "note", text=text))

    def _torn(self) -> list[int]:
        """List shards with tiles missing that were allowed before and are not now."""
        lacks = {shard: missing_in(self.store, shard) for shard in range(self.plan.grid.n_shards)}
        allowed = self.config.slide.allow_missing
        return [s for s, missing in lacks.items() if missing is None or (missing and not allowed)]

    def _hear(self, done: Done) -> None:
        """Take what a worker says about a shard into the record."""
        if not isinstance(done.result, ShardReport):
            return
        self.devices.add(f"{done.result.device} {done.result.dtype}")
        asked, fits = done.result.asked_tiles, done.result.batch_tiles
        text = (
            f"Memory of {done.result.device} did not hold batches of {asked} tiles: {fits} were "
            f"taken, so that tiles may differ by 1 grey level (--batch {fits} asks for them)."
        )
        if 0 < fits < asked and text not in self.manifest.content.notes:
            self.remark(text)


def _words(missing: set[MissingTile], table: str) -> str:
    """Word what is missing: how much, the first of it, where the rest is told."""
    first = min(missing)
    place = f"level {first.level}, row {first.row}, column {first.column}"
    return (
        f"Tiles of the slide that cannot be read and are left as background: {len(missing)}; the "
        f"first: {place} ({first.reason}); all of them: {table}."
    )


def _contradiction(regions: set[Region]) -> str:
    """Word where overview and tiles of the slide disagree."""
    first = min(regions)
    return (
        f"The slide's overview and its tiles show different things in {len(regions)} places of "
        f"{first.width_px} px; the first: x {first.x_px}, y {first.y_px} of the result. One of the "
        "two is damaged: look at both there."
    )


class _Progress:
    """One step over all shards: its bar, and its line in the record."""

    def __init__(self, run: Run, step: Step) -> None:
        self._run, self._name, self._left = run, step.name, len(step.numbers)
        self._grid: TileGrid = run.plan.grid
        self._busy_s = 0.0
        self._done = self._grid.n_tiles - sum(len(self._grid.shard(s)) for s in step.numbers)
        n_done = self._grid.n_shards - self._left
        run.manifest.stage_started(self._name, total=self._grid.n_shards, done=n_done)
        self._tell("start")
        self._end_if_done()

    def advance(self, done: Done) -> None:
        """Count a shard."""
        self._left -= 1
        self._done += len(self._grid.shard(done.number))
        self._busy_s += done.result.seconds
        self._tell("advance")
        self._end_if_done()

    def _end_if_done(self) -> None:
        if self._left == 0:
            done = self._grid.n_shards
            self._run.manifest.stage_finished(self._name, done=done, busy_s=self._busy_s)
            self._tell("finish")

    def _tell(self, kind: str) -> None:
        self._run.listener(Event(self._name, kind, self._done, self._grid.n_tiles))


def one_at_a_time(listener: Listener) -> Listener:
    """Let several threads call a listener that was made for one."""
    turn = threading.Lock()

    def listen(event: Event) -> None:
        with turn:
            listener(event)

    return listen
