"""The caller's end of a tunnel: a transport that leads to a door through the scheduler.

It is a connection of Dask's to the scheduler, made and used on the event loop of the link that it carries, so that
bytes change no thread. The other end is `dask_serve.controller.tunnel`.
"""

from __future__ import annotations

import asyncio
from typing import Any

from distributed.comm import Comm
from distributed.comm.core import connect

from ..wire.frames import Buffer
from ..wire.pump import Pump
from .dial import NotThereError

__all__ = ["SchedulerTunnel", "TunnelTransport"]

#: Seconds until the scheduler has to have answered; it may itself take 3 to connect to the door.
ANSWER = 5.0


class SchedulerTunnel:
    """Makes tunnels through the scheduler of a client or worker.

    Parameters
    ----------
    owner : distributed.Client or distributed.Worker
    """

    def __init__(self, owner: Any) -> None:
        self._owner = owner

    async def __call__(self, process: str, protocol: asyncio.Protocol) -> None:
        """Connect a protocol to the door of a process, on the running loop.

        Raises
        ------
        NotThereError
            The scheduler knows no such process, or cannot connect to it.
        OSError
            The scheduler does not answer, or cannot do this.
        """
        try:
            comm, window = await asyncio.wait_for(self._open(process), ANSWER)
        except asyncio.TimeoutError:
            raise ConnectionError(f"the scheduler did not answer within {ANSWER} s") from None
        TunnelTransport(comm, window, protocol)

    async def _open(self, process: str) -> tuple[Comm, int]:
        scheduler = self._owner.scheduler
        if scheduler is None:
            raise ConnectionError("the Dask client is closed")
        arguments = self._owner.connection_args
        comm = await connect(scheduler.address, timeout=ANSWER, deserialize=False, **arguments)
        try:
            await comm.write({"op": "serve_tunnel", "process": process})
            answer = await comm.read()
            if isinstance(answer, dict) and "window" in answer:
                return comm, answer["window"]
        except BaseException:
            comm.abort()
            raise
        comm.abort()
        if isinstance(answer, dict) and "refused" in answer:
            raise NotThereError(answer["refused"])
        raise ConnectionError("the scheduler's dask_serve makes no tunnels")


class TunnelTransport(asyncio.Transport):
    """Looks to its protocol like a socket's transport.

    Parameters
    ----------
    comm : Comm
        The connection to the scheduler, which has said that it leads to the door.
    window : int
        Bytes that may be under way in each direction.
    protocol : asyncio.Protocol
        Told of everything as by any transport; ``connection_made`` at once.
    """

    def __init__(self, comm: Comm, window: int, protocol: asyncio.Protocol) -> None:
        super().__init__({"peername": f"the door behind {comm.peer_address}"})
        self._protocol = protocol
        self._closing = False
        self._pump = Pump(comm, window, self._deliver, self._set_full)
        protocol.connection_made(self)
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        try:
            await self._pump.run()
        finally:
            self._closing = True
            self._protocol.connection_lost(None)

    def _deliver(self, data: bytes) -> None:
        self._protocol.data_received(data)
        self._pump.consumed(len(data))

    def _set_full(self, full: bool) -> None:
        if full:
            self._protocol.pause_writing()
        else:
            self._protocol.resume_writing()

    def write(self, data: Buffer) -> None:
        """Send bytes, which must not change any more."""
        self._pump.feed(data)

    def get_write_buffer_size(self) -> int:
        """Return how many bytes wait to be sent."""
        return self._pump.queued

    def is_closing(self) -> bool:
        """Return whether it is closed or about to be."""
        return self._closing

    def can_write_eof(self) -> bool:
        """Return False: a tunnel ends in both directions at once."""
        return False

    def close(self) -> None:
        """Close it when everything is sent; nothing is received any more."""
        self._closing = True
        self._pump.close()

    def abort(self) -> None:
        """Close it at once; what is not sent is dropped."""
        self._closing = True
        self._pump.abort()
