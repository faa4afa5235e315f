"""The scratch disk: patch stores, and copies of slides, ahead of need and bounded.

In: jobs. Out: folders, local paths of slides. Not here: what is put into a store.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from wsi_stain.archive.jobs import Job, Part
from wsi_stain.errors import SlideError
from wsi_stain.files import cannot_write, remove_any
from wsi_stain.slides.identity import companions

__all__ = ["DiskBudget", "Stager", "scratch_folder"]

POLL_S = 2.0


def scratch_folder(scratch: Path, out: Path, part: Part) -> Path:
    """Name the folder of one archive on a scratch disk that several may share."""
    digest = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:12]
    return scratch / f"wsi-stain-{digest}{part.tag}"


class DiskBudget:
    """Lets a slide begin when the disk has room for its patches beside those of others.

    Parameters
    ----------
    folder
        A folder on that disk; it exists.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reserved: list[int] = []
        self._moved = threading.Condition()

    @contextmanager
    def reserved(self, size_bytes: int, stopped: Callable[[], bool]) -> Iterator[None]:
        """Wait for room; where nobody else holds any there is nothing to wait for.

        Whether it is enough for one slide alone is checked by its own run. What others have
        written already counts twice, which errs on the safe side.
        """
        with self._moved:
            while self._reserved and not stopped():
                free_bytes = shutil.disk_usage(self._folder).free
                if sum(self._reserved) + size_bytes <= free_bytes:
                    break
                self._moved.wait(POLL_S)
            self._reserved.append(size_bytes)
        try:
            yield
        finally:
            with self._moved:
                self._reserved.remove(size_bytes)
                self._moved.notify_all()


class Stager:
    """Copies slides from slow storage while others are worked on; used by `with`.

    Disk bound: the slides in work, and `ahead` more.

    Parameters
    ----------
    folder
        Where copies go; ours alone, emptied at the beginning and removed at the end.
    is_needed
        Whether a slide will be read at all.
    """

    def __init__(self, folder: Path, is_needed: Callable[[Job], bool]) -> None:
        self._folder, self._is_needed = folder, is_needed
        self._copies: dict[str, Future[Path]] = {}
        self._turn = threading.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="stage")

    def __enter__(self) -> Stager:
        remove_any(self._folder)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        remove_any(self._folder)

    def look_ahead(self, jobs: Iterable[Job]) -> None:
        """Begin to copy what comes next."""
        with self._turn:
            for job in jobs:
                if job.name not in self._copies:
                    self._copies[job.name] = self._pool.submit(self._copy_if_needed, job)

    @contextmanager
    def staged(self, job: Job) -> Iterator[Path]:
        """Give the copy's path; it is removed at the end of the block.

        Raises
        ------
        SlideError, DiskFullError
            It cannot be read, or not be kept.
        """
        self.look_ahead([job])
        try:
            copied = self._copies[job.name].result()
            yield copied if copied.exists() else self._copy(job)
        finally:
            with self._turn:
                del self._copies[job.name]
            remove_any(self._folder / job.name)

    def _copy_if_needed(self, job: Job) -> Path:
        if self._is_needed(job):
            return self._copy(job)
        return self._folder / job.name / job.slide.name

    def _copy(self, job: Job) -> Path:
        """Copy a slide and all that belongs to it, to names that it keeps."""
        target = self._folder / job.name / job.slide.name
        try:
            files = {job.slide: target} | {
                file: target.parent / file.relative_to(job.slide.parent)
                for file in companions(job.slide)
            }
            remove_any(target.parent)
            for file, copy in files.items():
                copy.parent.mkdir(parents=True, exist_ok=True)
                _copy_any(file, copy)
        except OSError as error:
            remove_any(target.parent)
            if error.filename is not None and Path(error.filename).is_relative_to(self._folder):
                raise cannot_write(target, error) from error
            raise SlideError(
                f"Slide {job.slide} cannot be copied to scratch: {error.strerror or error}."
            ) from error
        return target


def _copy_any(file: Path, copy: Path) -> None:
    if file.is_dir():  # an OME-Zarr
        shutil.copytree(file, copy, dirs_exist_ok=True)
    else:
        shutil.copyfile(file, copy)
