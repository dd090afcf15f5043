"""The host of an embedded cluster: one process with the scheduler, the controller and the workers' supervisor.

It talks with its session over the lifeline, in lines of JSON. To the session: ``scheduler`` (it listens),
``worker`` (one registered), ``worker-ended``, ``drained``, ``error``. From the session: ``{"drain": seconds}``, and
``{"close": true}`` once it has closed its clients. The end of file means both, for a session that was killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
import signal
import socket
import tempfile
import traceback
import warnings
from typing import TYPE_CHECKING, Any

from .workers import Growth, Workers

if TYPE_CHECKING:
    from distributed import Scheduler

__all__ = ["main"]

#: Seconds that the close may take when the session died and could not say.
ORPHAN_CLOSE = 30.0
#: Seconds of a close that are kept for the workers, after the service was drained.
WORKERS_CLOSE = 5.0
#: Seconds that the session may take to close its clients.
CLIENTS_CLOSE = 3.0
#: Seconds between two looks at how many workers the controller would like.
GROW_EVERY = 0.25


def main(lifeline: str, options: str) -> None:
    """Run an embedded cluster until its session closes it or is gone."""
    # No user code runs here, and what Dask warns of (a busy port of the dashboard) is handled.
    warnings.simplefilter("ignore")
    asyncio.run(Host(socket.socket(fileno=int(lifeline)), **json.loads(options)).run())


class Host:
    """The cluster, from the first process to the last file.

    Parameters
    ----------
    lifeline : socket.socket
        The connection to the session.
    n_workers, nthreads, max_workers : int
        Workers to begin with, threads of each, and workers at most.
    dashboard_address : str or None
        Where the dashboard should listen; None for no dashboard.
    preload : str
        Module whose ``dask_setup`` puts the controller into the scheduler.
    """

    def __init__(
        self,
        lifeline: socket.socket,
        *,
        n_workers: int,
        nthreads: int,
        max_workers: int,
        dashboard_address: str | None,
        preload: str,
    ) -> None:
        self.n_workers = n_workers
        self.dashboard_address = dashboard_address
        self.preload = preload
        self.directory = tempfile.mkdtemp(prefix="dask-serve-")
        self.scheduler: Scheduler | None = None
        self.workers = Workers(nthreads=nthreads, limit=max_workers, directory=self.directory, report=self.report)
        self._socket = lifeline
        self._writer: asyncio.StreamWriter | None = None
        self._stop = asyncio.Event()
        self._released = asyncio.Event()
        self._close_timeout = ORPHAN_CLOSE

    def report(self, **event: Any) -> None:
        """Send one event to the session, if it is still there."""
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(json.dumps(event).encode() + b"\n")

    async def run(self) -> None:
        """Start everything, wait for a reason to stop, and stop everything in order."""
        reader, self._writer = await asyncio.open_connection(sock=self._socket)
        self.report(event="directory", directory=self.directory)
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._stop.set)
        listening = asyncio.ensure_future(self._listen(reader))
        try:
            # Workers import for as long as the scheduler does: both at the same time.
            self.workers.grow(self.n_workers)
            await asyncio.sleep(0)
            await self._serve()
        except Exception as error:  # noqa: BLE001 - the session raises it
            self.report(event="error", text=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
        finally:
            await self._close()
            listening.cancel()
            with contextlib.suppress(ConnectionError):
                await self._writer.drain()
            self._writer.close()

    async def _serve(self) -> None:
        from .scheduler import start_scheduler

        self.scheduler = await start_scheduler(self.dashboard_address, self.preload, self.report)
        self.workers.connect(self.scheduler.address)
        reasons = [
            asyncio.ensure_future(self._stop.wait()),
            asyncio.ensure_future(self._until_closed(self.scheduler)),
            asyncio.ensure_future(self._grow(self.scheduler)),
        ]
        done, rest = await asyncio.wait(reasons, return_when=asyncio.FIRST_COMPLETED)
        for task in rest:
            task.cancel()
        for task in done:
            task.result()

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                message = json.loads(line)
                self._close_timeout = message.get("drain", self._close_timeout)
                self._stop.set()
                if "close" in message:
                    self._released.set()
        self._stop.set()
        self._released.set()

    async def _until_closed(self, scheduler: Scheduler) -> None:
        """Wait until somebody else closes the scheduler (``client.shutdown()``)."""
        await scheduler.finished()

    async def _grow(self, scheduler: Scheduler) -> None:
        """Start workers for replicas that the controller cannot place."""
        controller: Any = scheduler.plugins["dask-serve"]
        growth = Growth()
        while True:
            await asyncio.sleep(GROW_EVERY)
            if scheduler.status.name != "running":
                # The workers that end now were told to.
                self.workers.hold()
            elif len(scheduler.workers) >= len(self.workers):
                waiting = controller.registry.unplaced.values()
                self.workers.grow(len(self.workers) + growth.more(sum(number for number, _ in waiting)))

    async def _close(self) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._close_timeout
        self.workers.hold()
        if self.scheduler is not None and self.scheduler.status.name == "running":
            budget = max(self._close_timeout - WORKERS_CLOSE, self._close_timeout / 2)
            with contextlib.suppress(asyncio.TimeoutError, OSError):
                await asyncio.wait_for(self._drain(self.scheduler), budget)
            self.report(event="drained")
            # Clients that lose their scheduler fill the terminal with attempts to find it again.
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._released.wait(), CLIENTS_CLOSE)
        # Tasks that users left behind are lost with the workers; that is no news worth a warning.
        for name in ("distributed", "dask_serve"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        await self.workers.close(min(max(deadline - loop.time(), 0.1), WORKERS_CLOSE))
        if self.scheduler is not None:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.scheduler.close(reason="embedded cluster closes"), WORKERS_CLOSE)
        shutil.rmtree(self.directory, ignore_errors=True)

    @staticmethod
    async def _drain(scheduler: Scheduler) -> None:
        """Let the controller end proxies and replicas, in its own order."""
        from distributed import rpc

        async with rpc(scheduler.address) as remote:
            await remote.serve_shutdown()
