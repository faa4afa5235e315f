"""What an archive will take, in all: the slides' forecasts times the machine's pace.

In: jobs, orders. Out: figures, and `forecast.csv` beside them. Not here: how they are found.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from wsi_stain.archive.forecast import SlideForecast, forecast, save_forecast
from wsi_stain.archive.jobs import Job
from wsi_stain.archive.lanes import Orders
from wsi_stain.archive.pace import Pace, measure_pace, read_pace
from wsi_stain.files import cannot_write
from wsi_stain.manifest import Event, Listener

__all__ = ["Outlook", "look_out"]


@dataclass(frozen=True)
class Outlook:
    """What will be done, and what it takes on this machine.

    Attributes
    ----------
    slides
        One forecast per slide.
    pace
        Of this machine; none where nothing is to be done.
    at_once
        Slides in work at once, whose patches lie on the scratch disk together.
    """

    slides: Sequence[SlideForecast]
    pace: Pace | None
    at_once: int

    def ahead(self) -> list[SlideForecast]:
        """Give the slides that will be translated."""
        return [slide for slide in self.slides if slide.state == "to do"]

    def refused(self) -> list[SlideForecast]:
        """Give the slides that cannot be."""
        return [slide for slide in self.slides if slide.state == "refused"]

    def seconds(self) -> float:
        """Project the time of the whole archive on this machine."""
        ahead = self.ahead()
        tiles = sum(slide.tiles for slide in ahead)
        return self.pace.seconds(len(ahead), tiles) if self.pace else 0.0

    def facts(self) -> dict[str, Any]:
        """Name and value, for a person."""
        ahead, seconds = self.ahead(), self.seconds()
        largest = sorted((slide.scratch_bytes for slide in ahead), reverse=True)[: self.at_once]
        done = len(self.slides) - len(ahead) - len(self.refused())
        facts: dict[str, Any] = {
            "slides": f"{len(ahead)} to do, {done} done, {len(self.refused())} refused",
            "tissue cm2": round(sum(slide.tissue_mm2 for slide in ahead) / 100, 2),
            "tiles": sum(slide.tiles for slide in ahead),
            "scratch disk GB (most at once)": round(sum(largest) / 1e9, 2),
            "output GB (about)": round(sum(slide.output_bytes for slide in ahead) / 1e9, 2),
        }
        if self.pace is not None:
            unit = "GPU" if self.pace.device == "cuda" else "core"
            facts |= {
                "hours here (about)": round(seconds / 3600, 3),
                f"{unit} hours (about)": round(seconds * self.pace.workers / 3600, 3),
                "measured here": f"{self.pace.tile_s:.3g} s a tile, {self.pace.slide_s:.3g} s a "
                f"slide beside, {self.pace.start_s:.3g} s to start, {self.pace.workers} workers",
            }
        return facts

    def as_json(self) -> dict[str, Any]:
        """All of it, for machines."""
        pace: Any = msgspec.to_builtins(self.pace)
        slides: Any = msgspec.to_builtins(list(self.slides))
        return {**self.facts(), "seconds": round(self.seconds(), 1), "pace": pace, "plan": slides}


def look_out(jobs: Sequence[Job], orders: Orders, listener: Listener) -> Outlook:
    """Plan all slides, and measure the machine's pace where that was not done before.

    Slides that a list gives other bundles are taken to go at the pace of the most common one.

    Raises
    ------
    WsiStainError
        A bundle is damaged, or nothing can be translated here.
    """
    files = orders.files
    try:
        files.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(files.out, error) from error
    listener(Event("plan", "start", total=len(jobs)))
    slides = forecast(
        jobs,
        files.out,
        lambda done: listener(Event("plan", "advance", done=done, total=len(jobs))),
    )
    listener(Event("plan", "finish", done=len(jobs), total=len(jobs)))
    save_forecast(files.out / f"forecast{files.part.tag}.csv", slides)
    pace = _pace(jobs, slides, orders, listener)
    return Outlook(slides, pace, orders.config.slides_at_once)


def _pace(
    jobs: Sequence[Job], slides: Sequence[SlideForecast], orders: Orders, listener: Listener
) -> Pace | None:
    """Take the pace from the slide that the middle one of all tiles lies on.

    Most of the time goes there: the slide in the middle by size may be of another scanner.
    """
    by_name = {job.name: job for job in jobs}
    ahead = sorted((slide for slide in slides if slide.state == "to do"), key=lambda s: s.tiles)
    if not ahead:
        return None
    last_tile = list(itertools.accumulate(slide.tiles for slide in ahead))
    middle = ahead[bisect.bisect_left(last_tile, (last_tile[-1] + 1) // 2)]
    job = by_name[middle.name]
    path = orders.files.out / "pace.json"
    pace = read_pace(path, job, orders)
    if pace is None:
        listener(Event("pace", "start"))
        pace = measure_pace(job, orders, path)
        listener(Event("pace", "finish"))
    return pace
