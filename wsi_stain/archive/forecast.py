"""What an archive will take, before any work: tissue, tiles, disk. Thumbnails only.

In: jobs. Out: a forecast per slide, made by several processes. Not here: seconds (`pace`).
"""

from __future__ import annotations

import csv
import io
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Literal

import msgspec

from wsi_stain.archive.jobs import Job
from wsi_stain.archive.past import look_back
from wsi_stain.archive.wording import next_command, told
from wsi_stain.bundles import check_files, find_bundle, read_spec
from wsi_stain.cluster import available_cores
from wsi_stain.config import BundleSpec
from wsi_stain.errors import WsiStainError
from wsi_stain.files import atomic_write_bytes
from wsi_stain.layout import Place, RunFiles
from wsi_stain.planning import SlidePlan, plan_by_spec
from wsi_stain.stages import refuse_outputs

__all__ = ["SlideForecast", "forecast", "save_forecast"]

CHUNK = 4


class SlideForecast(msgspec.Struct, kw_only=True):
    """What one slide will take."""

    name: str
    state: Literal["to do", "done", "refused"]
    tissue_mm2: float = 0.0
    tiles: int = 0
    shards: int = 0
    scratch_bytes: int = 0
    output_bytes: int = 0
    error: str = ""
    next: str = ""


def forecast(
    jobs: Sequence[Job], out: Path, heard: Callable[[int], None] = lambda done: None
) -> list[SlideForecast]:
    """Plan all slides, in as many processes as there are cores.

    Parameters
    ----------
    jobs
        Slides.
    out
        Output folder: what is done there needs nothing.
    heard
        Told how many are planned.

    Raises
    ------
    BundleError
        A bundle is damaged.
    """
    for name in {job.config.bundle for job in jobs}:
        folder = find_bundle(name)
        check_files(folder, read_spec(folder))
    found = []
    for one in _planned(jobs, out):
        found.append(one)
        heard(len(found))
    return found


def _planned(jobs: Sequence[Job], out: Path) -> Iterator[SlideForecast]:
    n_processes = min(available_cores(), -(-len(jobs) // CHUNK))
    if n_processes <= 1:
        yield from (_of_slide(job, out) for job in jobs)
        return
    # Not a fork: this process has threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_processes, mp_context=context) as pool:
        yield from pool.map(_of_slide, jobs, [out] * len(jobs), chunksize=CHUNK)


def _of_slide(job: Job, out: Path) -> SlideForecast:
    """Plan one slide; what is wrong with it is part of the answer."""
    try:
        place = Place(out, job.stem)
        files = RunFiles.of(place, job.slide, job.marker, job.config.write.format)
        past = look_back(job, files, verify=False)
        if past is not None and not past.fault:
            return SlideForecast(name=job.name, state="done")
        plan = plan_by_spec(job.slide, _spec(job.config.bundle), job.config)
        with plan.source:
            if past is None:  # else what is there is not sound, and is made again
                refuse_outputs(plan, files, job.config)
            return _to_do(job, plan)
    except (WsiStainError, OSError) as error:
        return SlideForecast(
            name=job.name,
            state="refused",
            error=told(error),
            next=next_command(error, job.slide, out),
        )


def _to_do(job: Job, plan: SlidePlan) -> SlideForecast:
    scale, projection = plan.scale, plan.projection
    slide_mm2 = scale.size_out.area_px * scale.mpp_out**2 / 1e6
    return SlideForecast(
        name=job.name,
        state="to do",
        tissue_mm2=round(slide_mm2 * plan.mask.tissue_fraction, 3),
        tiles=projection.tiles,
        shards=projection.shards,
        scratch_bytes=projection.store_bytes,
        output_bytes=projection.output_bytes,
    )


@cache
def _spec(bundle: str) -> BundleSpec:
    """Read a bundle once per process."""
    return read_spec(find_bundle(bundle))


def save_forecast(path: Path, slides: Sequence[SlideForecast]) -> None:
    """Write a table, CSV.

    Raises
    ------
    OutputError
        The folder refuses.
    """
    text = io.StringIO()
    names = [field.name for field in msgspec.structs.fields(SlideForecast)]
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(names)
    rows.writerows([getattr(slide, name) for name in names] for slide in slides)
    atomic_write_bytes(path, text.getvalue().encode())
