"""How tasks get to workers: a worker asks for a task when a shard of it comes, and keeps it.

In: tasks. Out: a number that any worker can ask for; on a worker, a shard done. Not here: which
shards.

The scheduler holds the tasks, packed. So a slide costs the same however many workers there are, and
each worker unpacks a task once; after that only numbers travel. A shard tells which tasks are still
in use: the worker lets go of the others, and of what they have loaded.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from wsi_stain.errors import DeviceError

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["Parcel", "Parcels", "open_parcels", "run_shard"]

GONE = (OSError, CancelledError, RuntimeError)  # at the end the cluster may be gone already


class Parcel(NamedTuple):
    """Tasks on the way: what a shard must be told to find them.

    Attributes
    ----------
    office
        Which client's.
    number
        Which of them.
    in_use
        All numbers of this client that are in use, this one among them.
    """

    office: str
    number: int
    in_use: tuple[int, ...]


class Parcels:
    """The tasks of one client, held by its scheduler; for several threads.

    Parameters
    ----------
    client
        Connected.
    office
        The name under which workers know where to ask.
    """

    def __init__(self, client: Client, office: str) -> None:
        self._client, self._office = client, office
        self._numbers = itertools.count()
        self._in_use: set[int] = set()
        self._turn = threading.Lock()

    @contextmanager
    def sent(self, tasks: Sequence[Any]) -> Iterator[int]:
        """Have tasks at hand for workers while the block runs; gives their number.

        Raises
        ------
        DeviceError
            The scheduler does not answer.
        """
        from distributed.protocol import pickle

        number = next(self._numbers)
        try:
            self._client.set_metadata([self._office, str(number)], pickle.dumps(tuple(tasks)))
        except OSError as error:
            raise DeviceError(f"The task cannot be sent to workers: {error}.") from error
        with self._turn:
            self._in_use.add(number)
        try:
            yield number
        finally:
            with self._turn:
                self._in_use.remove(number)
            with contextlib.suppress(*GONE):
                self._client.set_metadata([self._office, str(number)], None)

    def parcel(self, number: int) -> Parcel:
        """Say what a shard must be told now."""
        with self._turn:
            return Parcel(self._office, number, tuple(sorted(self._in_use)))


@contextmanager
def open_parcels(client: Client, *, ours: bool) -> Iterator[Parcels]:
    """Have all workers, those that come later too, know where to ask for tasks.

    Parameters
    ----------
    client
        Connected.
    ours
        The workers are children of this process, which alone answers to Ctrl-C.

    Raises
    ------
    DeviceError
        The workers cannot be spoken to.
    """
    office = f"wsi-stain-{uuid.uuid4().hex}"
    _register(client, _carrier(ours=ours), office)
    try:
        yield Parcels(client, office)
    finally:
        with contextlib.suppress(*GONE):
            client.unregister_worker_plugin(office)
            client.set_metadata([office], None)


def _register(client: Client, carrier: Any, office: str) -> None:
    """Speak to all workers; one that dies in between breaks one attempt."""
    for last in (False, False, True):
        try:
            client.register_plugin(carrier, name=office)
        except OSError as error:
            if last:
                raise DeviceError(f"Workers cannot be prepared: {error}.") from error
        else:
            return


def _carrier(*, ours: bool) -> Any:
    """Make the plugin that keeps unpacked tasks on a worker."""
    import signal

    from distributed import Worker, WorkerPlugin
    from distributed.protocol import pickle
    from distributed.utils import sync

    class Carrier(WorkerPlugin):
        def setup(self, worker: Worker) -> None:
            self.worker, self.turn = worker, threading.Lock()
            self.kept: dict[int, tuple[Any, list[Any]]] = {}
            if ours:
                signal.signal(signal.SIGINT, signal.SIG_IGN)

        def tasks(self, parcel: Parcel) -> tuple[Any, list[Any]]:
            """Give tasks and, for each, the lock of who does it."""
            office, number, in_use = parcel
            with self.turn:
                # A shard sent earlier does not know of tasks that came later.
                for old in [n for n in self.kept if n not in in_use and n < max(in_use)]:
                    del self.kept[old]
                if number not in self.kept:
                    tasks = self._fetch(office, number)
                    self.kept[number] = tasks, [threading.Lock() for _ in tasks]
                return self.kept[number]

        def _fetch(self, office: str, number: int) -> Any:
            ask = self.worker.scheduler.get_metadata
            packed = sync(self.worker.loop, ask, keys=[office, str(number)], default=None)
            if packed is None:
                raise RuntimeError("this work was called off")
            return pickle.loads(packed)

    return Carrier()


def run_shard(number: int, *, parcel: Parcel, step: int) -> Any:
    """Run on a worker: find the task, do one shard; shards of one task take turns."""
    from distributed import get_worker

    carrier: Any = get_worker().plugins[parcel.office]
    tasks, turns = carrier.tasks(parcel)
    with turns[step]:
        return tasks[step](number)
