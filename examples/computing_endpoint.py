"""Endpoints that compute: a request runs a Dask computation on the cluster, and tells how far it is.

The answer is a stream of server-sent events: one for each part that is done, and the result. When the client leaves,
the request ends where it waits, its futures go, and Dask forgets the tasks that have not begun.

Run it alone, 10 s with its own cluster, or serve it until Ctrl-C and ask it::

    python -m examples.computing_endpoint
    dask serve run examples.computing_endpoint:app
    curl -N 'http://127.0.0.1:8000/?parts=40'
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
from distributed import Client, as_completed, get_client
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

import dask_serve as serve

POINTS = 200_000


def darts(seed: int) -> int:
    """Throw darts at a square for a while; how many are in the circle. A Dask task."""
    time.sleep(0.05)
    x, y = np.random.default_rng(seed).random((2, POINTS))
    return int((x * x + y * y < 1).sum())


@serve.deployment
class Pi:
    """Answers HTTP with events: ``GET /?parts=40``."""

    async def __call__(self, request: Request) -> Response:
        parts = request.query_params.get("parts", "40")
        if not parts.isdecimal() or not 1 <= int(parts) <= 1000:
            return JSONResponse({"error": "parts is a number from 1 to 1000"}, status_code=400)
        return StreamingResponse(self.events(int(parts)), media_type="text/event-stream")

    async def events(self, parts: int) -> AsyncIterator[str]:
        """Compute, and tell of each part."""
        # In a coroutine this is a client of the replica's own loop: its futures are awaited.
        client = get_client()
        futures = client.map(darts, range(parts), pure=False)
        total = client.submit(sum, futures)
        done = 0
        async for _ in as_completed(futures):
            done += 1
            yield event("progress", {"done": done, "of": parts})
        yield event("result", {"pi": 4 * await total / (parts * POINTS)})


def event(name: str, data: dict[str, Any]) -> str:
    """Write one event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def tasks(dask_scheduler: Any) -> int:
    """How many of these tasks the scheduler knows."""
    return sum(str(key).startswith("darts") for key in dask_scheduler.tasks)


app = Pi.bind()


def main(client: Client) -> dict[str, Any]:
    """Ask for a result, and leave another one half-way; what was seen."""
    serve.start(client=client, port=0)
    serve.run(app, client=client)
    url = serve.url(client=client)
    try:
        with httpx.stream("GET", f"{url}/?parts=12", timeout=30, trust_env=False) as answer:
            lines = [line for line in answer.iter_lines() if line.startswith("data")]
        print(f"{lines[0]} ... {lines[-1]}")
        with httpx.stream("GET", f"{url}/?parts=400", timeout=30, trust_env=False) as answer:
            for line in answer.iter_lines():
                if '"done": 3,' in line:
                    break
            known = client.run_on_scheduler(tasks)
        begun = time.monotonic()
        while (left := client.run_on_scheduler(tasks)) and time.monotonic() < begun + 20:
            time.sleep(0.01)
        seconds = time.monotonic() - begun
        print(f"the client left after 3 of 400 parts: of {known} tasks {left} are left {seconds:.2f} s later")
        return {"events": len(lines), "known": known, "left": left, "seconds": seconds}
    finally:
        serve.shutdown(client=client)


if __name__ == "__main__":
    with Client(n_workers=2, threads_per_worker=2, dashboard_address=":0") as client:
        main(client)
