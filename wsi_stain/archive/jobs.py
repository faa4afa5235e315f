"""Jobs: a slide, its settings, and a name for its output that no other has.

In: entries, settings. Out: jobs, the whole list or one part of it. Not here: any work.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from wsi_stain.archive.source import Entry
from wsi_stain.bundles import bundle_digest, find_bundle, read_spec
from wsi_stain.config import BundleSpec, RunConfig, settle_solver
from wsi_stain.errors import ConfigError
from wsi_stain.layout import safe_name, slug
from wsi_stain.slides.identity import companions

__all__ = ["WHOLE", "Job", "Part", "make_jobs"]


@dataclass(frozen=True)
class Job:
    """One slide to translate.

    Attributes
    ----------
    name
        Unique in the archive: what its output's name begins with, marker and all.
    stem
        The same without the marker.
    slide
        The slide's file.
    marker
        What the bundle stains for.
    bundle_digest
        Identity of the model.
    config
        Settings, with the list's pixel size and bundle.
    """

    name: str
    stem: str
    slide: Path
    marker: str
    bundle_digest: str
    config: RunConfig

    def size_bytes(self) -> int:
        """Measure the slide's files; 0 where it cannot be seen."""
        try:
            files = (self.slide, *companions(self.slide))
            return sum(file.stat().st_size for file in files)
        except OSError:
            return 0


@dataclass(frozen=True)
class Part:
    """One of several parts of an archive, which need not know of each other.

    Attributes
    ----------
    index, total
        1 to `total`, and how many there are.
    """

    index: int = 1
    total: int = 1

    @classmethod
    def parse(cls, text: str) -> Part:
        """Read "3/16".

        Raises
        ------
        ConfigError
            Anything else.
        """
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        part = cls(int(match[1]), int(match[2])) if match else cls(0, 0)
        if not 1 <= part.index <= part.total:
            raise ConfigError(
                f"--part {text} is no part.", hint="Give number and total, 1/16 to 16/16."
            )
        return part

    @property
    def tag(self) -> str:
        """What the names of its files have more than those of the whole."""
        width = len(str(self.total))
        return f"-{self.index:0{width}}-of-{self.total}" if self.total > 1 else ""

    def holds(self, name: str) -> bool:
        """Tell whether a job is in it; by name, so that new slides move no old ones."""
        number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        return number % self.total == self.index - 1


WHOLE = Part()


def make_jobs(entries: Sequence[Entry], config: RunConfig) -> list[Job]:
    """Give each entry its settings and a name.

    Slides of one name in several folders are told apart by the folders' names, those of one
    folder by their suffixes.

    Raises
    ------
    BundleError
        A bundle is not there.
    ConfigError
        An output name that would leave the folder, or two slides with one name.
    """

    @functools.cache
    def bundle(name: str) -> tuple[BundleSpec, str]:
        folder = find_bundle(name)
        return read_spec(folder), bundle_digest(folder)

    jobs = []
    for entry in entries:
        name = entry.bundle or config.bundle
        spec, digest = bundle(name)
        stem = _checked(entry) if entry.out else safe_name(entry.slide.name)
        sample = settle_solver(spec, config.sample)
        settings = msgspec.structs.replace(config, bundle=name, sample=sample)
        if entry.mpp is not None:
            slide = msgspec.structs.replace(config.slide, mpp=entry.mpp)
            settings = msgspec.structs.replace(settings, slide=slide)
        jobs.append(Job("", stem, entry.slide, spec.marker, digest, settings))
    for longer in (_by_folder, _by_suffix):
        for index in _clashing(jobs):
            if not entries[index].out:
                jobs[index] = replace(jobs[index], stem=longer(entries[index]))
    _refuse_clashes(entries, jobs)
    return [replace(job, name=f"{job.stem}_{slug(job.marker)}") for job in jobs]


def _checked(entry: Entry) -> str:
    """Refuse a name that is more than a name: it could lie outside of the output folder."""
    safe = safe_name(entry.out)
    if entry.out != safe:
        raise ConfigError(
            f"{entry.origin}: out {entry.out!r} cannot be the name of an output.",
            hint=f"Give letters, digits, - _ . +, and no folder or suffix, as: {safe}",
        )
    return safe


def _key(job: Job) -> tuple[str, str]:
    """Two jobs of one key would share files; some file systems do not tell a from A."""
    return job.stem.casefold(), slug(job.marker)


def _clashing(jobs: Iterable[Job]) -> list[int]:
    groups = defaultdict(list)
    for index, job in enumerate(jobs):
        groups[_key(job)].append(index)
    return [index for group in groups.values() if len(group) > 1 for index in group]


def _by_folder(entry: Entry) -> str:
    return safe_name("_".join((*entry.folders, safe_name(entry.slide.name))))


def _by_suffix(entry: Entry) -> str:
    return safe_name(f"{_by_folder(entry)}_{entry.slide.suffix[1:].lower()}")


def _refuse_clashes(entries: Sequence[Entry], jobs: Sequence[Job]) -> None:
    if not (clashing := _clashing(jobs)):
        return
    first = clashing[0]
    second = next(i for i in clashing[1:] if _key(jobs[i]) == _key(jobs[first]))
    raise ConfigError(
        f"Two slides would have the output {jobs[first].stem}_{slug(jobs[first].marker)}: "
        f"{entries[first].origin} and {entries[second].origin}.",
        hint="Name them apart in a list: column out.",
    )
