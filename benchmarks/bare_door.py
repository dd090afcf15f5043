"""What streams are compared with: frames through the same kind of connection, echoed by a process for that alone.

``python -m benchmarks.bare_door SECRET PROCESS`` listens as a door does, and prints its port when it can be reached.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from dask_serve.wire.connection import CallerConnection, DoorConnection
from dask_serve.wire.frames import Frame
from dask_serve.wire.local import connect_locally, listen_locally
from dask_serve.wire.loops import new_event_loop
from dask_serve.wire.messages import Chunk, Kind, encode


class Echo:
    """The caller: it keeps frames of one size going and counts what comes back.

    Parameters
    ----------
    in_flight : int
        How many are under way.
    nbytes : int
        Payload of each.
    """

    def __init__(self, in_flight: int, nbytes: int) -> None:
        self._in_flight = in_flight
        self._header = encode(Chunk())
        self._parts = [bytes(nbytes)]
        self._left = self._count = 0
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def open(self, secret: bytes, process: str, port: int) -> None:
        """Connect the way a router does: through the Unix socket where there is one."""
        loop = asyncio.get_running_loop()
        ready = loop.create_future()
        self.connection = CallerConnection(secret, process, self._on_frame, ready.set_result, lambda _: None)
        local = connect_locally(process)
        if local is not None:
            await loop.create_unix_connection(lambda: self.connection, sock=local)
        else:
            await loop.create_connection(lambda: self.connection, "127.0.0.1", port)
        await asyncio.wait_for(ready, 10)

    async def exchange(self, count: int) -> None:
        """Send that many frames, and wait until all are back."""
        self._left, self._count = count, count
        self._done = asyncio.get_running_loop().create_future()
        for _ in range(min(count, self._in_flight)):
            self._send()
        await self._done

    def _send(self) -> None:
        self._left -= 1
        self.connection.send(Kind.CHUNK, 1, self._header, self._parts)

    def _on_frame(self, connection: Any, frame: Frame) -> None:
        self._count -= 1
        if self._left:
            self._send()
        if not self._count:
            self._done.set_result(None)


async def serve(secret: bytes, process: str) -> None:
    """Send back every frame, for ever."""

    def on_frame(connection: Any, frame: Frame) -> None:
        connection.send(frame.kind, frame.request, frame.header, frame.parts)

    def visit() -> DoorConnection:
        return DoorConnection(secret, process, on_frame, lambda _: None)

    loop = asyncio.get_running_loop()
    server = await loop.create_server(visit, "127.0.0.1", 0)
    local = listen_locally(process)
    if local is not None:
        await loop.create_unix_server(visit, sock=local)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    """Run on the kind of loop that doors have."""
    new_event_loop().run_until_complete(serve(bytes.fromhex(sys.argv[1]), sys.argv[2]))


if __name__ == "__main__":
    main()
