"""Many Dask workers in one process: `python fleet.py ADDRESS N`. Their GPUs are simulated by sleep.

Each is a worker to the scheduler, with its own connection and heartbeat; together they cost one
process, so that two cores can play hundreds of GPUs.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from contextlib import AsyncExitStack

import dask
from distributed import Worker

from wsi_stain.cluster.quiet import dask_settings, quiet_logs


async def serve(address: str, count: int, folder: str) -> None:
    async with AsyncExitStack() as stack:
        workers = [
            Worker(
                address,
                nthreads=2,
                resources={"GPU": 1},
                host="127.0.0.1",
                dashboard=False,
                dashboard_address="127.0.0.1:0",
                local_directory=folder,
                memory_limit=0,
            )
            for _ in range(count)
        ]
        for worker in workers:
            await stack.enter_async_context(worker)
        await asyncio.gather(*(worker.finished() for worker in workers))


def main(address: str, count: str) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        dask.config.set(dask_settings(folder)),
        quiet_logs(),
    ):
        asyncio.run(serve(address, int(count), folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
