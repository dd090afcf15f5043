"""Large bodies in and out beside the same application on one bare uvicorn process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from http.client import HTTPConnection
from urllib.parse import urlsplit

import psutil
from distributed import Client

import dask_serve as serve

from . import web
from .apps import Transfers
from .processes import Clock, Cluster, bare_uvicorn
from .table import Row, Sample, interleave

MEGABYTE = 1_000_000
#: What moves, the path, and whether a body goes in and comes out.
CASES = (
    ("10 MB body in", "take", True, False),
    ("10 MB body out", "give", False, True),
    ("10 MB body in and out", "give-back", True, True),
)


class Mover:
    """One kept connection, which moves a body at a time."""

    def __init__(self, url: str, path: str, processes: dict[str, psutil.Process], goes: bool, comes: bool) -> None:
        parts = urlsplit(url + path)
        self._http = HTTPConnection(parts.hostname or "", parts.port, timeout=60)
        self._path = parts.path
        self._processes = {"caller": psutil.Process(), **processes}
        self._body = web.body if goes else None
        self._expected = web.LARGE if comes else len(str(web.LARGE))
        self._moved = web.LARGE * (goes + comes)
        self._buffer = memoryview(bytearray(web.LARGE))

    def move(self) -> None:
        """Send and receive once, into memory that is there already."""
        self._http.request("POST" if self._body else "GET", self._path, self._body)
        answer = self._http.getresponse()
        received = 0
        while count := answer.readinto(self._buffer[received:]):
            received += count
        if answer.status != 200 or received != self._expected:
            raise RuntimeError(f"{self._path} answered {answer.status} with {received} bytes")

    def measure(self, seconds: float) -> Sample:
        """Return megabytes a second, one body after the other."""
        clock, begun, count = Clock(self._processes), time.perf_counter(), 0
        while time.perf_counter() - begun < seconds:
            self.move()
            count += 1
        return Sample(count * self._moved / MEGABYTE / (time.perf_counter() - begun), clock.per_request(count))

    def close(self) -> None:
        """Close the connection."""
        self._http.close()


def rows(cluster: Cluster, client: Client, pairs: int, seconds: float) -> Iterator[Row]:
    """Measure each way by itself, then both."""
    serve.run(Transfers.bind(), name="bodies", route_prefix="/bodies", client=client)
    url = serve.url(client=client).rstrip("/") + "/bodies/"
    with bare_uvicorn("transfers") as (bare_url, bare):
        for what, path, goes, comes in CASES:
            ours = Mover(url, path, cluster.http(), goes, comes)
            theirs = Mover(bare_url, path, {"uvicorn": bare}, goes, comes)
            for mover in (ours, theirs):
                mover.move()
            samples = interleave(pairs, partial(ours.measure, seconds), partial(theirs.measure, seconds))
            yield Row(f"HTTP, {what}, against bare uvicorn", "MB/s", *samples, least=0.6)
            for mover in (ours, theirs):
                mover.close()
    serve.delete("bodies", client=client)
