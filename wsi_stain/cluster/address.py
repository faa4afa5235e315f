"""A Dask scheduler that runs already: somebody else's workers, on this host or others.

In: an address, certificates. Out: a `Crew`. Not here: who started them; rules of the address,
which are in `config`.

A client and a scheduler run each other's code: see `credentials`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from wsi_stain.cluster.credentials import given_credentials
from wsi_stain.cluster.crew import GPU, Crew, gpu_places
from wsi_stain.cluster.dashboard import served_link
from wsi_stain.cluster.quiet import quiet_logs
from wsi_stain.cluster.waiting import Hear, Waiting
from wsi_stain.config import ClusterConfig
from wsi_stain.errors import DeviceError

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["address_crew", "wait_for_workers"]

CONNECT_S = 20
LOOK_S = 0.5


@contextmanager
def address_crew(config: ClusterConfig, hear: Hear) -> Iterator[Crew]:
    """Connect to a running scheduler, and wait for its first worker.

    Parameters
    ----------
    config
        `scheduler`, `tls_ca`, `tls_cert`, `tls_key`; `wait_s` for a first worker.
    hear
        Hears that workers are waited for.

    Raises
    ------
    ConfigError
        A certificate cannot be read, or the key can be read by others.
    DeviceError
        Nobody answers, the certificates do not fit, or there is no worker.
    """
    from distributed import Client

    security = given_credentials(config)
    with quiet_logs():
        try:
            client = Client(config.scheduler, security=security, timeout=CONNECT_S)
        except (OSError, TimeoutError, ValueError) as error:
            raise DeviceError(
                f"The scheduler {config.scheduler} cannot be reached: {_reason(error)}.",
                hint="Is it running, and do --tls-ca, --tls-cert and --tls-key belong to it?",
            ) from error
        with client:
            waiting = Waiting(hear, config.workers)
            workers = wait_for_workers(client, config.wait_s, f"of {config.scheduler}", waiting)
            has_gpu = any(GPU in worker["resources"] for worker in workers)
            yield Crew(
                client,
                config.workers or len(workers),
                config.wait_s,
                gpu_places(has_gpu),
                is_remote=True,
                where=f"of {config.scheduler}",
                waiting=waiting,
                dashboard=served_link(client),
            )


def wait_for_workers(
    client: Client, wait_s: float, where: str, waiting: Waiting
) -> list[dict[str, Any]]:
    """Wait until a worker is there; give all that are, as the scheduler describes them.

    Raises
    ------
    DeviceError
        None came in time.
    """
    end_s = time.monotonic() + wait_s
    while not (workers := client.scheduler_info(n_workers=-1)["workers"]):
        if time.monotonic() > end_s:
            raise DeviceError(
                f"No worker {where} came within {wait_s:.0f} s.",
                hint="Look into the logs of its jobs; cluster.wait_s in a recipe says how long "
                "to wait.",
            )
        waiting.tell(0)
        time.sleep(LOOK_S)
    waiting.end(len(workers))
    return list(workers.values())


def _reason(error: BaseException) -> str:
    """Give the innermost reason: Dask's own says only that time is up."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
