"""The door's latency in a process whose user code computes in four Python threads."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator

from distributed import Client

import dask_serve as serve

from .apps import Busy, NoOp
from .table import Row, Sample


async def latency(handle: serve.DeploymentHandle, seconds: float) -> Sample:
    """Return the median of calls one after the other, in milliseconds."""
    values = []
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        sent = time.perf_counter()
        await handle.echo.remote(1)
        values.append(1e3 * (time.perf_counter() - sent))
    return Sample(statistics.median(values))


def rows(client: Client, pairs: int, seconds: float) -> Iterator[Row]:
    """Measure a quiet worker first; the threads of `Busy` end only with the worker."""
    for what, deployment, most in [("alone", NoOp, None), ("beside 4 computing Python threads", Busy, 2.0)]:
        handle = serve.run(deployment.bind(), name="door", route_prefix="/door", client=client)
        samples = [asyncio.run(latency(handle, seconds)) for _ in range(pairs)]
        yield Row(f"Door's median latency, {what}", "ms", samples, most=most)
