"""The table of contents: one slide from H&E to a checked virtual IHC pyramid.

Read `translate_planned` from top to bottom: it is the road, and each line is one stage. What a
stage does is in `stages`; how is in the four rooms.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec import structs

from wsi_stain import stages
from wsi_stain.config import RunConfig
from wsi_stain.dispatch import Executor, open_executor
from wsi_stain.layout import Place, RunFiles
from wsi_stain.lock import OutputLock
from wsi_stain.manifest import Listener, ignore
from wsi_stain.planning import SlidePlan, plan_slide

__all__ = ["RunResult", "translate_planned", "translate_slide"]


@dataclass(frozen=True)
class RunResult:
    """What a finished run says."""

    files: RunFiles
    summary: Mapping[str, Any]

    def facts(self) -> dict[str, Any]:
        """Name and value, for the terminal and for machines."""
        return dict(self.summary)


def translate_slide(
    path: Path,
    out: Path | Place,
    config: RunConfig,
    *,
    origins: Mapping[str, str] | None = None,
    listener: Listener = ignore,
    keep_store: bool = False,
    executor: Executor | None = None,
) -> RunResult:
    """Translate one slide; goes on where an earlier run of the same command stopped.

    Parameters
    ----------
    path
        H&E slide; never written to.
    out
        Output folder, made if absent; a `Place` says more.
    config
        Settings.
    origins
        Where settings came from, for the record.
    listener
        Hears the stages.
    keep_store
        Keep the patch store after the run.
    executor
        Who does the shards, and lives on; none: what `config.cluster` asks for, for this run only.

    Raises
    ------
    WsiStainError
        Any of the family; nothing half-written is left at the output's place.
    """
    return translate_planned(
        plan_slide(path, config, listener),
        out,
        config,
        origins=origins,
        listener=listener,
        keep_store=keep_store,
        executor=executor,
    )


def translate_planned(
    plan: SlidePlan,
    out: Path | Place,
    config: RunConfig,
    *,
    origins: Mapping[str, str] | None = None,
    listener: Listener = ignore,
    keep_store: bool = False,
    executor: Executor | None = None,
) -> RunResult:
    """Translate a slide that is planned already; closes it. All else as `translate_slide`."""
    config = structs.replace(config, sample=plan.sample)  # what is recorded is what ran
    with plan.source:
        files = stages.prepare(plan, out, config)
        with OutputLock(files.lock) as lock:
            run = stages.begin(plan, files, config, origins or {}, listener)
            run.remark(lock.note)
            workers = (
                nullcontext(executor)
                if executor is not None
                else open_executor(config.cluster, stages.cuda_devices, run.listener)
            )
            # The color is fitted while workers start; the picture follows its shards, and its last
            # rows are written while workers end.
            with (
                stages.Beside(run) as beside,
                stages.PictureWriter(run) as writer,
                workers as started,
            ):
                run.work(started, beside.color(), writer)
                beside.finish()
                run.release(writer)
            run.check()
            run.tell_missing()
            run.spread()
            run.score_tiles()
            run.annotate()
            return RunResult(files, run.finish(keep_store=keep_store))
