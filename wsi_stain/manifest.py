"""Events, and the record of a run that a person can read and a program can repeat.

In: what happened. Out: events, `manifest.json`. Not here: decisions, images.

Engines emit `Event`s; only the command line draws bars. The record is written before the work
and replaced whole at each change, so a killed run leaves a true one. It holds what is needed to
repeat the run, and nothing that identifies a patient: no label, no date of the slide, no path.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec

from wsi_stain.errors import OutputError
from wsi_stain.files import atomic_write_bytes, sha256_any, size_bytes

__all__ = [
    "MANIFEST_SCHEMA",
    "Event",
    "Listener",
    "OutputRecord",
    "RunManifest",
    "RunRecord",
    "StageRecord",
    "ignore",
    "read_json",
]

MANIFEST_SCHEMA = 1
DAMAGED_HINT = "Delete it and run wsi-stain translate again: finished shards are kept."
RECORDABLE = frozenset({"stain", "devices", "flags", "notes", "tiles"})


@dataclass(frozen=True)
class Event:
    """Something a person may want to see.

    Attributes
    ----------
    stage
        Name of the stage: "fill", "fit", "translate", "write", "validate", "train" ...
    kind
        "start" (total is set), "advance" (done units), "note" (text), "finish".
    done, total
        Units of work; what a unit is depends on the stage (tiles, output rows, samples).
    text
        One line for a person, may be empty.
    facts
        Name and value of what was found out: at the end of the plan, and where a dashboard is.
    """

    stage: str
    kind: str
    done: int = 0
    total: int = 0
    text: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Listen to nothing (the default of all engines)."""


class StageRecord(msgspec.Struct, kw_only=True):
    """One stage: how far it came, and what it cost over all attempts.

    Stages overlap: their seconds add up to more than the run's. `seconds` is wall time, for the
    writer without what it waited for shards; `busy_seconds` is that of all workers together.
    """

    name: str
    state: Literal["running", "finished", "interrupted"] = "running"
    done: int = 0
    total: int = 0
    seconds: float = 0.0  # of finished attempts, summed
    busy_seconds: float = 0.0  # of workers, finished attempts
    attempts: int = 1  # runs that worked on this stage


class OutputRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One file that the run made; of a folder, all its files (`sha256_any`)."""

    name: str  # without folder
    bytes: int
    sha256: str


class RunRecord(msgspec.Struct, kw_only=True, omit_defaults=False):
    """The content of `manifest.json`. Fields may be added; a change of meaning raises `schema`."""

    schema: int = MANIFEST_SCHEMA
    statement: str = "Virtual stain, research use only: not for diagnosis."
    state: Literal["running", "finished"] = "running"
    begun_utc: str
    finished_utc: str = ""
    seed: int
    bundle: dict[str, str]  # name, digest
    slide: dict[str, Any]  # digest, size, pixel size and its origin
    grid_digest: str
    settings: dict[str, Any]  # resolved: every value that was used
    origins: dict[str, str]  # asked: dotted name -> "flag" or "recipe"; the rest are defaults
    stain: dict[str, Any] = {}  # numbers fitted on this slide
    devices: list[str] = []
    versions: dict[str, str]
    stages: list[StageRecord] = []
    outputs: list[OutputRecord] = []
    tiles: dict[str, Any] = {}  # scores over all tiles: median, worst, limits, how many flagged
    flags: list[str] = []  # doubts about this result, for a machine
    notes: list[str] = []  # remarks for a person

    def detail_um(self, mpp: float) -> float:
        """Give the pixel size, um/px, of the coarser: the H&E as scanned, or pixels of `mpp`."""
        return max(mpp, float(self.slide.get("pixel size um", 0.0)))

    @property
    def output_white(self) -> tuple[float, float, float] | None:
        """Glass of the output, grey levels; none before the color is fitted."""
        # Records from before it had a name of its own: the start image's was the output's.
        white = self.stain.get("output_white") or self.stain.get("start", {}).get("target_white")
        if not white:
            return None
        red, green, blue = map(float, white)
        return red, green, blue


class RunManifest:
    """The record of one run and the file it lives in.

    Invariant: after each method the file equals `content`.

    Attributes
    ----------
    path
        `manifest.json`.
    content
        What it holds; change it through the methods only.
    """

    def __init__(self, path: Path, content: RunRecord) -> None:
        self.path = path
        self.content = content
        self._stage_began_s: dict[str, float] = {}

    @classmethod
    def begin(  # noqa: PLR0913 - the keys of the record, all of them known at its birth
        cls,
        path: Path,
        *,
        settings: Mapping[str, Any],
        origins: Mapping[str, str],
        slide: Mapping[str, Any],
        grid_digest: str,
        bundle: Mapping[str, str],
        seed: int,
        versions: Mapping[str, str],
    ) -> RunManifest:
        """Write the record before any work.

        Where an unfinished record of the same work lies at `path`, its stages are carried on:
        seconds and attempts add up over a run that was stopped and started again.

        Parameters
        ----------
        path
            File to write.
        settings, origins
            Every resolved value, as plain JSON types, and where those not left at their default
            came from.
        slide, bundle
            Facts; `slide` must not identify a patient.
        grid_digest, seed, versions
            See `RunRecord`.

        Raises
        ------
        OutputError
            Not writable, or what lies there is damaged or from a later version.
        """
        record = RunRecord(
            begun_utc=_now_utc(),
            seed=seed,
            bundle=dict(bundle),
            slide=dict(slide),
            grid_digest=grid_digest,
            settings=dict(settings),
            origins=dict(origins),
            versions=dict(versions),
        )
        if path.exists():
            _carry_on(cls.load(path).content, record)
        manifest = cls(path, record)
        manifest._save()
        return manifest

    @classmethod
    def load(cls, path: Path) -> RunManifest:
        """Read a record.

        Raises
        ------
        OutputError
            Missing, damaged, or written by a later version.
        """
        raw = read_json(
            path, "Run record", "Give the .run folder that translate wrote.", DAMAGED_HINT
        )
        try:
            return cls(path, msgspec.convert(raw, RunRecord))
        except msgspec.ValidationError as error:
            raise OutputError(
                f"Run record {path} is damaged: {error}.", hint=DAMAGED_HINT
            ) from error

    @property
    def stages(self) -> list[StageRecord]:
        """Stages in the order they were started."""
        return self.content.stages

    def was_naming(self, slide_digest: str, grid_digest: str, settings: Mapping[str, Any]) -> bool:
        """Tell whether this very work was stopped when its output had, or was to get, its name."""
        old, write = self.content, self._find("write")
        same = (old.slide.get("digest"), old.grid_digest) == (slide_digest, grid_digest)
        return (
            same
            and old.settings == settings
            and old.state == "running"
            and write is not None
            and 0 < write.total == write.done
        )

    def record(self, **facts: Any) -> None:
        """Set fields that become known during the run: stain, devices, flags, notes, tiles.

        Raises
        ------
        TypeError
            A field that is fixed at the beginning, or unknown.
        """
        if unknown := set(facts) - RECORDABLE:
            raise TypeError(f"not recordable: {sorted(unknown)}")
        for name, value in facts.items():
            setattr(self.content, name, value)
        self._save()

    def note(self, text: str) -> None:
        """Add a remark for a person; a remark already made is not repeated."""
        if text not in self.content.notes:
            self.content.notes.append(text)
            self._save()

    def stage_started(self, name: str, *, total: int, done: int = 0) -> None:
        """Say that a stage begins, or goes on, with `done` of `total` units finished."""
        self._stage_began_s[name] = time.monotonic()
        stage = self._find(name)
        if stage is None:
            self.content.stages.append(StageRecord(name=name, done=done, total=total))
        else:
            stage.state, stage.done, stage.total = "running", done, total
            stage.attempts += 1
        self._save()

    def stage_reached(self, name: str, *, done: int) -> None:
        """Say how far a running stage has come."""
        self._started(name).done = done
        self._save()

    def stage_finished(
        self, name: str, *, done: int, seconds: float | None = None, busy_s: float = 0.0
    ) -> None:
        """Say that a stage ended; `seconds` default to the time since it was started.

        Raises
        ------
        KeyError
            The stage was not started.
        """
        stage = self._started(name)
        stage.state = "finished"
        stage.busy_seconds = round(stage.busy_seconds + busy_s, 3)
        stage.done = done
        took_s = time.monotonic() - self._stage_began_s[name] if seconds is None else seconds
        stage.seconds = round(stage.seconds + took_s, 3)
        self._save()

    def finish(self, outputs: Sequence[Path]) -> None:
        """Close the record with the size and digest of every file made.

        Raises
        ------
        OutputError
            An output is missing or cannot be read.
        """
        self.content.outputs = [_describe(path) for path in outputs]
        self.content.state = "finished"
        self.content.finished_utc = _now_utc()
        self._save()

    def _started(self, name: str) -> StageRecord:
        stage = self._find(name)
        if stage is None:
            raise KeyError(name)
        return stage

    def _find(self, name: str) -> StageRecord | None:
        return next((stage for stage in self.content.stages if stage.name == name), None)

    def _save(self) -> None:
        text = msgspec.json.format(msgspec.json.encode(self.content), indent=2)
        atomic_write_bytes(self.path, text + b"\n")


def _carry_on(old: RunRecord, new: RunRecord) -> None:
    """Take over the stages of an unfinished record of the same slide, grid, model and seed."""

    def work(record: RunRecord) -> tuple[Any, ...]:
        return record.slide.get("digest"), record.grid_digest, record.bundle, record.seed

    if old.state == "running" and work(old) == work(new):
        new.begun_utc, new.stages, new.notes = old.begun_utc, old.stages, old.notes
        for stage in new.stages:
            if stage.state == "running":
                stage.state = "interrupted"


def _describe(path: Path) -> OutputRecord:
    try:
        return OutputRecord(name=path.name, bytes=size_bytes(path), sha256=sha256_any(path))
    except OSError as error:
        raise OutputError(f"Output {path} cannot be read: {error.strerror}.") from error


def read_json(path: Path, what: str, missing_hint: str, damaged_hint: str = "") -> Any:
    """Decode a record of ours, refusing those of later versions."""
    try:
        if path.exists() and not path.is_file():  # a pipe would block for ever
            raise OutputError(f"{what} {path} is no file.", hint=missing_hint)
        raw = msgspec.json.decode(path.read_bytes())
    except OutputError:
        raise
    except OSError as error:
        message = f"{what} {path} cannot be read: {error.strerror}."
        raise OutputError(message, hint=missing_hint) from error
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        message = f"{what} {path} is damaged: {error}."
        raise OutputError(message, hint=damaged_hint or missing_hint) from error
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if isinstance(schema, int) and schema > MANIFEST_SCHEMA:
        raise OutputError(
            f"{what} {path} has schema {schema}; this version reads up to {MANIFEST_SCHEMA}.",
            hint="Install a newer wsi-stain.",
        )
    return raw


def _now_utc() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
