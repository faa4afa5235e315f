"""Ask workers a question: what they are, what they can.

In: a crew, a question. Out: answers, errors. Not here: what an error means for a run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

from wsi_stain import __version__
from wsi_stain.cluster.crew import Crew, workers_for
from wsi_stain.config import ClusterConfig

__all__ = ["ask_all", "introduce", "was_killed"]

T = TypeVar("T")


def ask_all(
    crew: Crew, timeout_s: float, question: Callable[..., T], *about: Any
) -> tuple[list[T], list[BaseException]]:
    """Have the workers answer that will translate: all that are there, or else the next one.

    Parameters
    ----------
    crew
        The workers.
    timeout_s
        How long to wait for those who do not answer, s.
    question, about
        Called on the workers, with this.

    Returns
    -------
    tuple
        Answers, and errors of those that could not answer; both empty where none came in time.

    Raises
    ------
    CancelledError
        The scheduler was lost.
    """
    from distributed import wait

    client, place = crew.client, dict(crew.places.get("translate", {})) or None
    there = workers_for(client.scheduler_info(n_workers=-1)["workers"], crew.places)
    # Another may answer for a worker that is gone by then.
    how = {"pure": False, "resources": place, "allow_other_workers": True}
    asked = [client.submit(question, *about, workers=at, **how) for at in there]
    asked = asked or [client.submit(question, *about, pure=False, resources=place)]
    with contextlib.suppress(TimeoutError):  # some may have answered
        wait(asked, timeout=timeout_s)
    answers = [future.result() for future in asked if future.status == "finished"]
    return answers, [future.exception() for future in asked if future.status == "error"]


def introduce(count_devices: Callable[[ClusterConfig], int], config: ClusterConfig) -> str:
    """Run on a worker: tell the version, if the devices that were asked for are there."""
    count_devices(config)
    return __version__


def was_killed(error: BaseException) -> bool:
    """Tell whether this is what becomes of work that its workers died of."""
    from distributed import KilledWorker

    return isinstance(error, KilledWorker)
