"""What this process does with the slide while workers start and work: color, pictures to keep.

In: a run. Out: a `ColorFit`, the run's H&E folder. Not here: shards.
"""

from __future__ import annotations

import copy
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from wsi_stain.config import RunConfig
from wsi_stain.manifest import Event
from wsi_stain.planning import SlidePlan
from wsi_stain.slides.fill import read_tiles
from wsi_stain.slides.image import SlideSource
from wsi_stain.stages.run import Run
from wsi_stain.translate.fit import ColorFit, fit_pictures
from wsi_stain.write.overview import keep_he

__all__ = ["Beside", "fit_color"]

FIT_TILES = 48


class Beside:
    """Fits the color, then keeps the H&E pictures, in a thread beside the main one.

    Used by `with`: begins on entering, and on leaving waits for what is in hand; `finish` waits for
    all of it.

    Parameters
    ----------
    run
        The run.

    Notes
    -----
    The thread reads with a `SlideSource` of its own: one reader is not for two threads.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._source = copy.deepcopy(run.plan.source)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="beside")

    def __enter__(self) -> Beside:
        self._color: Future[ColorFit] = self._pool.submit(self._fit)
        self._pictures: Future[None] = self._pool.submit(self._keep)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._source.close()

    def color(self) -> ColorFit:
        """Wait for the fit.

        Raises
        ------
        NoTissueError, SlideError
            No stained pixels, or tiles that cannot be read.
        """
        return self._color.result()

    def finish(self) -> None:
        """Wait for the pictures: what they trip over must be known before the pyramid has a name.

        Raises
        ------
        SlideError, OutputError
            The slide cannot be read at their resolution, or they cannot be written.
        """
        self._pictures.result()
        self._run.missing.update(self._source.missing)

    def _fit(self) -> ColorFit:
        self._run.listener(Event("fit", "start"))
        color = fit_color(self._run.plan, self._source, self._run.config)
        self._run.listener(Event("fit", "finish"))
        return color

    def _keep(self) -> None:
        """Keep a small H&E picture for the report, which must work without the slide."""
        self._run.listener(Event("overview", "start"))
        plan = self._run.plan
        keep_he(
            self._source, plan.grid.scale, plan.mask, self._run.files.he, marker=plan.spec.marker
        )
        self._run.listener(Event("overview", "finish"))


def fit_color(plan: SlidePlan, source: SlideSource, config: RunConfig) -> ColorFit:
    """Fit white, normalization, start image and map scale on tiles spread over the tissue.

    The tiles are read from the slide, not from the store: no shard has to be there.
    """
    grid = plan.grid
    # Glass is worked on too where that is asked for; it tells nothing of stains.
    has_tissue = grid.tissue > 0
    stained = np.flatnonzero(has_tissue) if has_tissue.any() else np.arange(grid.n_tiles)
    picks = stained[np.unique(np.linspace(0, len(stained) - 1, FIT_TILES).round().astype(int))]
    he = np.concatenate([read_tiles(source, grid, range(i, i + 1)) for i in picks.tolist()])
    return fit_pictures(he, plan.glass, plan.spec, config.stain, config.sample)
