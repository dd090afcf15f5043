"""Clients of a handle, their own process: each calls, waits for the answer, and pauses, until SIGTERM.

``-m benchmarks.online_clients SCHEDULER NUMBER PAUSE_S`` prints a `Calls` as JSON. In the process of whoever has a map
computed they would wait for its graph as well.
"""

from __future__ import annotations

import asyncio
import random
import signal
import sys
import time
from dataclasses import dataclass, field

import numpy as np
from distributed import Client

import dask_serve as serve

from .load import report

#: What is called, and with how many numbers.
APPLICATION, METHOD, COLUMNS = "scoring", "ask", 8


@dataclass
class Calls:
    """When each call was made, on the clock that all processes of a machine share, and the seconds that it took."""

    begun: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


async def generate(scheduler: str, number: int, pause: float) -> Calls:
    """Call until told to end."""
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    calls, row = Calls(), np.full((1, COLUMNS), 0.4)
    async with Client(scheduler, asynchronous=True) as client:
        handle = await serve.get_app_handle(APPLICATION, client=client)
        method = getattr(handle, METHOD)

        async def one() -> None:
            while not ended.is_set():
                await asyncio.sleep(random.expovariate(1 / pause))
                begun = time.monotonic()
                await method.remote(row)
                calls.begun.append(begun)
                calls.seconds.append(time.monotonic() - begun)

        await asyncio.gather(*(one() for _ in range(number)))
    return calls


if __name__ == "__main__":
    report(lambda: generate(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
