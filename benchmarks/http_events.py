"""Server-sent events beside the same application on one bare uvicorn process."""

from __future__ import annotations

import json
import re
import socket
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from distributed import Client

import dask_serve as serve

from .apps import Transfers
from .load import run
from .processes import Clock, Cluster, bare_uvicorn
from .table import Row, Sample, interleave
from .web import TOKENS

CLIENTS = 100
KINDS = {"paced": "one in a turn of the loop", "ready": "without ever waiting"}
LISTENERS = Path(__file__).parent / "listeners.py"

_stamp = re.compile(rb"data: ([\d.]+)\n\n").search


def throughput(url: str, processes: dict[str, psutil.Process], seconds: float) -> Sample:
    """Return tokens a second that all clients get; CPU is that of one token."""
    clock = Clock(processes)
    answers, tokens, took = json.loads(run([sys.executable, str(LISTENERS), url, str(CLIENTS), str(seconds)]))
    if tokens != answers * TOKENS:
        raise RuntimeError(f"{answers} answers of {url} had {tokens} tokens")
    return Sample(tokens / took, clock.per_request(tokens))


def delays(url: str, seconds: float) -> list[float]:
    """Return milliseconds from the ``yield`` of a first token until it is here, for one client after the other."""
    parts = urlsplit(url)
    request = f"GET {parts.path} HTTP/1.1\r\nhost: {parts.netloc}\r\n\r\n".encode()
    found = []
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as connection:
        begun = time.monotonic()
        while time.monotonic() - begun < seconds:
            connection.sendall(request)
            answer = b""
            first = None
            while not answer.endswith(b"\r\n0\r\n\r\n"):
                answer += connection.recv(65536)
                if first is None and (stamp := _stamp(answer)):
                    first = time.monotonic() - float(stamp[1])
            assert first is not None
            found.append(1e3 * first)
    return found


def rows(cluster: Cluster, client: Client, pairs: int, seconds: float) -> Iterator[Row]:
    """Measure how many tokens pass, then how long the first one takes."""
    serve.run(Transfers.bind(), name="events", route_prefix="/streamed", client=client)
    url = serve.url(client=client).rstrip("/") + "/streamed/events/"
    with bare_uvicorn("transfers") as (bare_url, bare):
        for kind, how in KINDS.items():
            ours = partial(throughput, url + kind, cluster.http())
            theirs = partial(throughput, f"{bare_url}events/{kind}", {"uvicorn": bare})
            for warm_up in (ours, theirs):
                warm_up(0.1)
            samples = interleave(pairs, partial(ours, seconds), partial(theirs, seconds))
            what = f"Server-sent events, {CLIENTS} clients, {TOKENS} tokens each, {how}, against bare uvicorn"
            yield Row(what, "tokens/s", *samples, least=0.5)
        mine, other = [], []
        for _ in range(pairs):
            mine += delays(f"{url}stamped", seconds)
            other += delays(f"{bare_url}events/stamped", seconds)
    for what, of in [("median", statistics.median), ("99th percentile", last_percent)]:
        note = f" (bare uvicorn: {of(other):.2g} ms; {len(mine)} answers)"
        yield Row(f"First token, from `yield` to the client, {what}", "ms", [Sample(of(mine))], most=3.0, note=note)
    serve.delete("events", client=client)


def last_percent(values: list[float]) -> float:
    """Return what 99 of 100 values do not exceed."""
    return sorted(values)[int(0.99 * len(values))]
