"""What tests of several modules use."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
from distributed import Client, LocalCluster, SchedulerPlugin

import dask_serve as serve
from dask_serve.embedded import EmbeddedCluster
from dask_serve.routing.store import stores


async def until(condition: Callable[[], Any], timeout: float = 10.0) -> Any:
    """Wait for a condition, which may be a coroutine function, and return what it found."""
    deadline = time.monotonic() + timeout
    while True:
        found = condition()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return found
        assert time.monotonic() < deadline, f"not met within {timeout:g} s: {condition}"
        await asyncio.sleep(0.005)


def wait_until(condition: Callable[[], Any], timeout: float = 20.0) -> Any:
    """Wait for a condition, in a thread, and return what it found."""
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not met within {timeout:g} s: {condition}"
        time.sleep(0.01)
    return found


@contextlib.contextmanager
def embedded_client(n_workers: int, nthreads: int) -> Iterator[Client]:
    """Give a client of a cluster of so many worker processes, each with so many threads."""
    cluster = EmbeddedCluster.start(n_workers=n_workers, nthreads=nthreads, dashboard_address=None)
    with cluster, Client(cluster.scheduler_address, set_as_default=False) as client:
        client.wait_for_workers(n_workers, timeout=30)
        yield client


@contextlib.contextmanager
def local_client(n_workers: int, nthreads: int) -> Iterator[Client]:
    """Give the default client of a `LocalCluster`; what it serves ends with it. `embedded_client` has a launcher's."""
    options = {"dashboard_address": ":0", "silence_logs": logging.CRITICAL}
    with (
        LocalCluster(n_workers=n_workers, threads_per_worker=nthreads, **options) as cluster,
        Client(cluster) as client,
    ):
        yield client
        serve.shutdown(client=client)


def http_client(url: str, **options: Any) -> httpx.Client:
    """A client for HTTP without TLS: to load the system's certificates would take longer than most tests."""
    return httpx.Client(**{"base_url": url, "timeout": 20, "trust_env": False, "verify": False, **options})


class Going:
    """So many threads that `run` while a block does, until ``ended``."""

    def __init__(self, threads: int) -> None:
        self.ended = threading.Event()
        self._threads = [threading.Thread(target=self.run) for _ in range(threads)]

    def run(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Any:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.ended.set()
        for thread in self._threads:
            thread.join()


def stored() -> int:
    """Results in all stores of this process."""
    return sum(len(store) for store in stores.values())


class Graphs(SchedulerPlugin):
    """Counts what was submitted."""

    name = "graphs"

    def __init__(self) -> None:
        self.count = 0

    def update_graph(self, scheduler: Any, **kwargs: Any) -> None:
        self.count += 1
