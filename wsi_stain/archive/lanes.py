"""Several slides in work at once over one set of workers.

In: jobs, orders. Out: pyramids; what came of each slide, in the books. Not here: how one slide is
translated.

While one slide is stitched, the next is translated and the one after that is read: each has a
thread here, and their shards meet in one queue at the workers, earlier slides first. The largest
slide begins first, so that no giant is left alone at the end. Slides in work are bounded, and
with them patch stores and open files.

What fails in one slide ends that slide only. Errors that may pass (`weather`) are tried again
later, after a wait that doubles.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from wsi_stain import stages
from wsi_stain.archive.jobs import Job
from wsi_stain.archive.ledger import Ledger
from wsi_stain.archive.log import SlideLog
from wsi_stain.archive.past import Past, look_back
from wsi_stain.archive.queue import JobQueue, Turn
from wsi_stain.archive.record import ArchiveFiles
from wsi_stain.archive.scratch import DiskBudget, Stager, scratch_folder
from wsi_stain.archive.weather import may_pass
from wsi_stain.archive.wording import next_command, told, without_folders
from wsi_stain.cluster import get_ready
from wsi_stain.config import ArchiveConfig, ClusterConfig, RunConfig
from wsi_stain.dispatch import Executor, open_executor
from wsi_stain.errors import DiskFullError, OutputError, WsiStainError
from wsi_stain.evaluate.positive import positive_fraction
from wsi_stain.evaluate.report import write_report
from wsi_stain.layout import Place, RunFiles
from wsi_stain.manifest import Event, Listener, ignore
from wsi_stain.pipeline import translate_planned
from wsi_stain.planning import plan_slide, some_tiles

__all__ = ["ArchiveListener", "Lanes", "Orders", "Workers"]

# Hears the name of a slide and what happened to it; no name: something about the workers.
ArchiveListener = Callable[[str, Event], None]
STAGE_AHEAD = 1


@dataclass(frozen=True)
class Orders:
    """What an archive's run is told.

    Attributes
    ----------
    files
        Output folder and part.
    config
        How to go through the slides.
    base
        Settings of slides for which a list says nothing else: bundle, cluster.
    origins
        Where settings came from, for the records.
    scratch
        Folder for patch stores and copies, or none.
    most_tiles
        Tiles of each slide to work on, for a trial; 0: all.
    """

    files: ArchiveFiles
    config: ArchiveConfig
    base: RunConfig
    origins: Mapping[str, str] = field(default_factory=dict)
    scratch: Path | None = None
    most_tiles: int = 0


class StoppedError(Exception):
    """The archive ends before this slide: no user sees it."""


class Workers:
    """Starts the executor when the first slide needs it: none does where all are done.

    Used by `with`. A thread of its own starts and stops it: Dask's client ends in the context that
    it began in.
    """

    def __init__(self, cluster: ClusterConfig, listener: Listener = ignore) -> None:
        self._cluster, self._listener = cluster, listener
        self._turn = threading.Lock()
        self._over = threading.Event()
        self._started: Future[Executor] = Future()
        self._keeper: Future[None] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="workers")

    def __enter__(self) -> Workers:
        get_ready(self._cluster)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._pool.shutdown()
        if self._keeper is not None:
            self._keeper.result()

    def get(self) -> Executor:
        """Give the executor.

        Raises
        ------
        DeviceError
            Workers cannot be started.
        """
        with self._turn:
            if self._keeper is None:
                self._keeper = self._pool.submit(self._keep)
            either: list[Future[Any]] = [self._started, self._keeper]
            wait(either, return_when="FIRST_COMPLETED")
            if self._keeper.done():
                self._keeper.result()
            return self._started.result()

    def _keep(self) -> None:
        with open_executor(self._cluster, stages.cuda_devices, self._listener) as executor:
            self._started.set_result(executor)
            self._over.wait()


class Lanes:
    """The threads of an archive's run: each takes one slide after the other.

    Memory bound: that of one run, times the slides at once.

    Attributes
    ----------
    was_cut_short
        Whether slides were left out because the disk is full.
    """

    def __init__(
        self, jobs: Sequence[Job], orders: Orders, ledger: Ledger, listener: ArchiveListener
    ) -> None:
        self.was_cut_short = False
        self._jobs = jobs
        self._orders, self._ledger, self._listener = orders, ledger, listener
        self._queue = JobQueue(sorted(jobs, key=lambda job: -job.size_bytes()))
        self._stopping = threading.Event()
        self._telling = threading.Lock()
        files, config = orders.files, orders.config
        self._scratch = orders.scratch and scratch_folder(orders.scratch, files.out, files.part)
        self._budget = DiskBudget(orders.scratch or files.out)
        serial = orders.base.cluster.executor == "serial"
        self._n_slots = 1 if serial else min(config.slides_at_once, max(1, len(jobs)))
        self._stager = None
        if config.stage and self._scratch:
            self._stager = Stager(self._scratch / "staged", self._is_needed)

    def work(self, workers: AbstractContextManager[Workers]) -> None:
        """Do all; on an interrupt the workers end first, then those who wait for them."""
        slots = ThreadPoolExecutor(self._n_slots, thread_name_prefix="slide")
        try:
            with self._stager or nullcontext(), workers as shared:
                threads = [slots.submit(self._slot, shared) for _ in range(self._n_slots)]
                try:
                    for thread in threads:
                        thread.result()
                finally:  # after an interrupt others are still at work
                    self._stopping.set()
                    self._queue.end()
        finally:
            slots.shutdown()
            self._remove_scratch()

    def hear_workers(self, event: Event) -> None:
        """Pass on what is said about the workers, which belong to no slide."""
        with self._telling:
            self._listener("", event)

    def _slot(self, workers: Workers) -> None:
        while (turn := self._queue.take()) is not None:
            if self._stager is not None:
                self._stager.look_ahead(self._queue.upcoming(STAGE_AHEAD))
            with SlideLog(self._orders.files.logs / f"{turn.job.name}.log", self._clean) as log:
                self._do(turn, workers, log)

    def _do(self, turn: Turn, workers: Workers, log: SlideLog) -> None:
        """Do one slide, whatever happens to it."""
        try:
            files = self._files(turn.job)
            past = self._look_back(turn.job)
            if past is not None and not past.fault:
                self._skip(turn.job, files, past, log)
            else:
                self._translate(turn, past, workers, log)
        except StoppedError:
            self._ledger.enter(turn.job, state="pending")
            self._tell(turn.job, Event("archive", "note"))
        # As wide as a process: a slide that fails, by a bug too, must not end the archive.
        except Exception as error:
            self._failed(turn, error, log)

    def _translate(self, turn: Turn, past: Past | None, workers: Workers, log: SlideLog) -> None:
        job, began_s = turn.job, time.monotonic()
        self._ledger.enter(job, self._files(job), state="running", error="", next="")
        self._tell(job, Event("archive", "start"))
        config, notes = job.config, list[str]()
        if past is not None:
            config = _overwriting(config)
            notes = [f"An output was there and not sound, so it was made again: {past.fault}."]
        with self._slide(job) as slide:
            summary = self._road(slide, turn, config, self._listening(job, log), workers)
        self._tidy(job)
        if self._orders.config.report:
            notes += self._report(job, log, is_fresh=True)
        positive, doubt = self._positive(self._files(job))
        notes += doubt
        self._ledger.enter(
            job,
            state="done",
            positive_fraction=positive,
            tiles=summary["tiles"],
            seconds=round(time.monotonic() - began_s, 1),
            flags=summary["flags"],
            notes=[*notes, *(self._clean(note) for note in summary["notes"])],
        )
        self._tell(job, Event("archive", "finish", text="done"))

    def _road(
        self, slide: Path, turn: Turn, config: RunConfig, listen: Listener, workers: Workers
    ) -> Mapping[str, Any]:
        """Plan, wait for room on the disk, translate."""
        plan = plan_slide(slide, config, listen)
        if self._orders.most_tiles:
            plan = some_tiles(plan, self._orders.most_tiles)
        room = self._budget.reserved(plan.projection.store_bytes, self._stopping.is_set)
        with plan.source, room:
            return translate_planned(
                plan,
                self._place(turn.job),
                config,
                origins=self._orders.origins,
                listener=listen,
                keep_store=self._orders.config.keep_store,
                executor=workers.get().ranked(turn.rank),
            ).summary

    def _listening(self, job: Job, log: SlideLog) -> Listener:
        def listen(event: Event) -> None:
            if self._stopping.is_set():
                raise StoppedError
            log.hear(event)
            self._tell(job, event)

        return listen

    def _report(self, job: Job, log: SlideLog, *, is_fresh: bool) -> list[str]:
        """Write a slide's page; where that fails the slide is done all the same, with a note."""
        folder, listener = self._files(job).folder, self._listening(job, log)
        try:
            write_report(folder, is_fresh=is_fresh, listener=listener)
        except WsiStainError as error:
            return [f"The report could not be written: {self._clean(told(error))}"]
        return []

    def _positive(self, files: RunFiles) -> tuple[float | None, list[str]]:
        """Measure a finished slide; where that fails it is done all the same, with a note."""
        try:
            return positive_fraction(files), []
        except WsiStainError as error:
            text = self._clean(told(error))
            return None, [f"The positive area could not be measured: {text}"]

    def _skip(self, job: Job, files: RunFiles, past: Past, log: SlideLog) -> None:
        record, doubts = past.record, list[str]()
        positive = self._ledger.known(job).positive_fraction
        if positive is None:
            positive, doubts = self._positive(files)
        # Done before anybody asked for pages.
        if self._orders.config.report and not files.report.exists():
            doubts += self._report(job, log, is_fresh=False)
        self._ledger.enter(
            job,
            files,
            state="skipped",
            tiles=record.tiles.get("tiles", 0),
            positive_fraction=positive,
            flags=record.flags,
            notes=[*(self._clean(note) for note in record.notes), *doubts],
            error="",
            next="",
        )
        self._tell(job, Event("archive", "finish", text="skipped"))

    def _failed(self, turn: Turn, error: Exception, log: SlideLog) -> None:
        """Settle what becomes of a slide that failed: done by another, again later, or failed."""
        job, config = turn.job, self._orders.config
        if isinstance(error, OutputError) and not self._is_needed(job):
            past = self._look_back(job)
            if past is not None:
                self._skip(job, self._files(job), past, log)
                return
        if self._stopping.is_set():
            # Whatever it was that broke, it did so because all ends: the slide has no fault.
            self._ledger.enter(job, state="pending", error="")
            return
        log.fail(error)
        text = self._clean(told(error))
        if may_pass(error) and turn.attempt < config.attempts:
            wait_s = config.retry_wait_s * 2 ** (turn.attempt - 1)
            self._ledger.enter(job, state="pending", error=text)
            self._tell(job, Event("archive", "note", text=f"again in {wait_s:g} s: {text}"))
            self._queue.put_back(turn, wait_s)
            return
        tried = f" ({turn.attempt} attempts)" if turn.attempt > 1 else ""
        following = self._clean(next_command(error, job.slide, self._orders.files.out))
        self._ledger.enter(job, state="failed", error=text + tried, next=following)
        self._tell(job, Event("archive", "finish", text=f"failed: {text}"))
        if isinstance(error, DiskFullError):
            # What the others make could not be kept either.
            self.was_cut_short = True
            self._queue.end()

    def _files(self, job: Job) -> RunFiles:
        return RunFiles.of(self._place(job), job.slide, job.marker, job.config.write.format)

    def _place(self, job: Job) -> Place:
        scratch = None if self._scratch is None else self._scratch / "stores" / job.name
        return Place(self._orders.files.out, job.stem, scratch)

    def _slide(self, job: Job) -> AbstractContextManager[Path]:
        return nullcontext(job.slide) if self._stager is None else self._stager.staged(job)

    def _tidy(self, job: Job) -> None:
        """Remove the folder of a finished slide on the scratch disk, which its run has emptied."""
        scratch = self._place(job).scratch
        if scratch is not None and not self._orders.config.keep_store:
            scratch.rmdir()

    def _remove_scratch(self) -> None:
        """Remove the archive's folder on the scratch disk, unless unfinished stores lie there."""
        if self._scratch is not None:
            with suppress(OSError):  # not empty, or never made
                (self._scratch / "stores").rmdir()
                self._scratch.rmdir()

    def _look_back(self, job: Job) -> Past | None:
        return look_back(job, self._files(job), verify=self._orders.config.verify)

    def _is_needed(self, job: Job) -> bool:
        past = self._look_back(job)
        return past is None or bool(past.fault)

    def _tell(self, job: Job, event: Event) -> None:
        with self._telling:
            self._listener(job.name, event)

    def _clean(self, text: str) -> str:
        orders = self._orders
        known = {orders.files.out, *(job.slide.parent for job in self._jobs)}
        return without_folders(text, known | ({orders.scratch} if orders.scratch else set()))


def _overwriting(config: RunConfig) -> RunConfig:
    write = msgspec.structs.replace(config.write, overwrite=True)
    return msgspec.structs.replace(config, write=write)
