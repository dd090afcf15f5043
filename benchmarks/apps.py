"""The deployments that are measured; they do nothing, so that what remains is dask_serve."""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import PlainTextResponse

import dask_serve as serve

from . import web


@serve.deployment
class NoOp:
    """Answers HTTP with a word, and Python with the argument."""

    async def __call__(self, request: Request) -> PlainTextResponse:
        """Do what ``bare_uvicorn`` does."""
        return PlainTextResponse("hello")

    async def echo(self, value: Any) -> Any:
        """Do what ``dask_actor.Echo`` does."""
        return value


@serve.deployment
@serve.ingress(web.items)
class Items:
    """The FastAPI application in a replica."""


@serve.deployment
@serve.ingress(web.transfers)
class Transfers:
    """Large bodies and server-sent events in a replica."""


@serve.deployment(max_ongoing_requests=1000)
class Streamer:
    """Yields without end, and does nothing else."""

    async def numbers(self) -> AsyncIterator[int]:
        """Yield without ever waiting."""
        for number in itertools.count():
            yield number

    def blocking_numbers(self) -> Iterator[int]:
        """Do the same in a thread."""
        yield from itertools.count()

    async def records(self) -> AsyncIterator[dict[str, Any]]:
        """Yield what has to be pickled item by item."""
        for number in itertools.count():
            yield {"token": "word", "number": number}

    async def ticks(self) -> AsyncIterator[int]:
        """Yield one item in a turn of the event loop."""
        for number in itertools.count():
            await asyncio.sleep(0)
            yield number


#: Seconds that the batches of `Batched` take: so many, and so many more for each call.
FIXED, EACH = 0.02, 0.001


@serve.deployment(max_ongoing_requests=200)
class Batched:
    """A model whose batches cost little more than single calls, and methods that do nothing, batched and not."""

    @serve.batch(max_batch_size=64)
    def model(self, values: list[int]) -> list[int]:
        """Take as long as a model on a GPU would: the processor is free meanwhile."""
        time.sleep(FIXED + EACH * len(values))
        return values

    def plain(self, value: int) -> int:
        """Return the argument."""
        return value

    async def aplain(self, value: int) -> int:
        """Return the argument."""
        return value

    @serve.batch
    def batched(self, values: list[int]) -> list[int]:
        """Return the arguments."""
        return values

    @serve.batch
    async def abatched(self, values: list[int]) -> list[int]:
        """Return the arguments."""
        return values


@serve.deployment
class Busy:
    """Computes in four Python threads, for ever, and answers beside that."""

    def __init__(self) -> None:
        for _ in range(4):
            threading.Thread(target=spin, daemon=True).start()

    async def echo(self, value: Any) -> Any:
        """Return the argument."""
        return value


@serve.deployment
class Maker:
    """Returns an array that it has."""

    def __init__(self, nbytes: int) -> None:
        self.array = np.ones(nbytes, np.uint8)

    async def make(self) -> np.ndarray:
        """Return the array."""
        return self.array


@serve.deployment
class Taker:
    """Takes an array, and looks at its size only."""

    async def size(self, array: np.ndarray) -> int:
        """Return its bytes."""
        return array.nbytes


@serve.deployment
class Sleeper:
    """Takes its time."""

    def __init__(self, service: float, construct: float = 0.0) -> None:
        time.sleep(construct)
        self.service = service
        self.worked = 0.0

    def __call__(self) -> str:
        """Keep a thread."""
        time.sleep(self.service)
        return "done"

    async def who(self) -> tuple[str, float]:
        """Return who answers, and when it began; keep nothing but a slot."""
        begun = time.monotonic()
        await asyncio.sleep(self.service)
        return serve.get_replica_context().replica_id, begun

    def keep(self, seconds: int) -> None:
        """Keep the interpreter's lock: what is called by way of PyDLL does not let go of it."""
        ctypes.PyDLL(None).sleep(seconds)

    async def rest(self) -> None:
        """Keep nothing but a slot."""
        begun = time.perf_counter()
        await asyncio.sleep(self.service)
        self.worked += time.perf_counter() - begun

    async def busy(self) -> float:
        """Return the seconds that `rest` has taken."""
        return self.worked

    async def slow_down(self, times: float) -> None:
        """Take so many times as long from now on."""
        self.service *= times


@serve.deployment
class Spinner:
    """Computes in Python, for so many seconds of its thread's own time."""

    def __init__(self, service: float) -> None:
        self.service = service

    def __call__(self) -> str:
        """Keep a core."""
        end = time.thread_time() + self.service
        while time.thread_time() < end:
            pass
        return "done"


def spin_for(seconds: float) -> None:
    """Hold the interpreter's lock for so long as it lets us."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def spin() -> None:
    """Hold the interpreter's lock as long as it lets us."""
    count = 0
    while True:
        count += 1
