"""A crew: workers that wait for work, and how they are reached.

In: a connected client. Out: `Crew`, and which workers may do which step. Not here: tasks, who
started the workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from wsi_stain.cluster.waiting import Waiting, silent

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["GPU", "Crew", "Places", "gpu_places", "workers_for"]

# The Dask resource of a worker that may translate where some workers hold a device and some none.
GPU = "GPU"
Places = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Crew:
    """Workers that wait for work.

    Attributes
    ----------
    client
        Connected to their scheduler.
    n_workers
        How many are expected; as many as there are where more come.
    wait_s
        How long to wait for a worker where there is none, s.
    places
        Step name to the Dask resources that a worker must have for it; a step that is not named
        may be done anywhere.
    is_remote
        Whether workers may be on other hosts, with other devices than this one's.
    where
        Where the workers are, for a person; may be empty.
    waiting
        Says that workers are waited for.
    dashboard
        Address of Dask's dashboard, where one can be opened from this host; else empty.
    """

    client: Client
    n_workers: int
    wait_s: float
    places: Places = field(default_factory=dict)
    is_remote: bool = False
    where: str = ""
    waiting: Waiting = field(default_factory=lambda: Waiting(silent, 0))
    dashboard: str = ""


def gpu_places(has_gpu: bool) -> Places:
    """Translate where a worker holds a device, if any does; read anywhere."""
    return {"translate": {GPU: 1.0}} if has_gpu else {}


def workers_for(workers: Mapping[str, Mapping[str, Any]], places: Places) -> list[str]:
    """List the workers, by address and as the scheduler describes them, that may do every step."""
    needed = {name: amount for place in places.values() for name, amount in place.items()}
    return [
        address
        for address, worker in workers.items()
        if all(worker["resources"].get(name, 0.0) >= amount for name, amount in needed.items())
    ]
