"""Updates and workers that leave, under load from Python and over HTTP: nothing of it fails a request."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner
from distributed import Client
from helpers import wait_until
from test_deaths import Processes, ready, table_of

import dask_serve as serve
from dask_serve.cli import serve as cli


@serve.deployment
class Model:
    """Answers with its process, after a moment."""

    def __init__(self, label: str = "a", construct: float = 0.0) -> None:
        time.sleep(construct)
        self.label = label

    async def nap(self, seconds: float) -> int:
        await asyncio.sleep(seconds)
        return os.getpid()

    async def __call__(self, request: Any) -> dict[str, Any]:
        await asyncio.sleep(0.005)
        return {"pid": os.getpid(), "label": self.label}


class Load:
    """Requests over HTTP with kept connections and by a handle, from some threads, until it is stopped."""

    def __init__(self, handle: Any, url: str = "", threads: int = 3, nap: float = 0.02, **options: Any) -> None:
        self.handle = handle.options(**options) if options else handle
        self.url = url
        self.nap = nap
        self.errors: list[str] = []
        #: When each request ended, how long it took, and what it told.
        self.answers: list[tuple[float, float, Any]] = []
        self._stop = threading.Event()
        calls = [self._call] * threads + [self._get] * (threads if url else 0)
        self._threads = [threading.Thread(target=self._run, args=(call,), daemon=True) for call in calls]
        for thread in self._threads:
            thread.start()

    def _call(self) -> Any:
        return self.handle.nap.remote(self.nap).result(timeout=30)

    def _get(self) -> Any:
        with urllib.request.urlopen(self.url, timeout=30) as answer:
            return json.loads(answer.read())["label"]

    def _run(self, call: Any) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                told = call()
            except Exception as error:
                self.errors.append(f"{call.__name__} after {time.monotonic() - began:.3f} s: {error!r}")
            else:
                now = time.monotonic()
                self.answers.append((now, now - began, told))

    def goes_on(self, number: int = 60) -> None:
        enough = len(self.answers) + number
        wait_until(lambda: len(self.answers) >= enough)

    def __enter__(self) -> Load:
        self.goes_on()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(35)
        assert not any(thread.is_alive() for thread in self._threads)


@pytest.fixture
def processes(tmp_path) -> Iterator[Processes]:
    found = Processes(tmp_path)
    yield found
    found.end()


def cluster(processes: Processes, workers: int, *options: str) -> list[Any]:
    processes.scheduler()
    return [processes.worker(*options) for _ in range(workers)]


def run(client: Client, workers: int, construct: float = 0.0, label: str = "a", **options: Any) -> tuple[Any, str]:
    client.wait_for_workers(workers, timeout=30)
    app = Model.options(**{"num_replicas": workers, **options}).bind(label, construct)
    handle = serve.run(app, client=client, timeout=60)
    return handle, serve.url(client=client) + "/"


def hosts(client: Client) -> dict[str, str]:
    """Worker addresses of the replicas in the table, by replica."""
    return {replica.id: replica.worker for replica in table_of(client).deployments["default/Model"].replicas}


def pid_of(client: Client, worker: str) -> int:
    return int(client.run(os.getpid, workers=[worker])[worker])


def test_rolling_update_scale_down_and_retirement(processes):
    cluster(processes, 3, "--no-nanny")
    with Client(processes.address) as client:
        handle, url = run(client, 3, num_replicas=4)
        counts = []
        with Load(handle, url) as load:
            done = threading.Event()

            def watch() -> None:
                while not done.is_set():
                    table = table_of(client)
                    # A worker too busy to answer for 2 s is left out for the moment; its replicas are there.
                    if not table.silent:
                        counts.append(len(table.deployments["default/Model"].replicas))
                    time.sleep(0.01)

            watcher = threading.Thread(target=watch)
            watcher.start()
            run(client, 3, num_replicas=4, label="b")
            done.set()
            watcher.join()
            load.goes_on()
            assert {told for _, _, told in load.answers[-20:] if isinstance(told, str)} <= {"b"}
            assert min(counts) == 4

            victim = next(iter(hosts(client).values()))
            retired = client.retire_workers([victim])
            assert list(retired) == [victim]
            assert victim not in hosts(client).values()
            wait_until(lambda: not table_of(client).silent)
            assert len(hosts(client)) == 4
            load.goes_on()

            run(client, 2, num_replicas=1, label="b")
            wait_until(lambda: len(hosts(client)) == 1)
            load.goes_on()
        assert load.errors == []


def test_lifetime(processes):
    processes.scheduler()
    processes.worker("--no-nanny", "--name", "stays")
    with Client(processes.address) as client:
        client.wait_for_workers(1, timeout=30)
        processes.worker("--no-nanny", "--name", "leaves", "--lifetime", "5s")
        handle, url = run(client, 2, construct=1.0)
        with Load(handle, url) as load:
            before = hosts(client)
            counts = []

            def left() -> bool:
                counts.append(len(hosts(client)))
                return len(client.scheduler_info(n_workers=-1)["workers"]) == 1

            wait_until(left, timeout=20)
            load.goes_on()
            assert len(hosts(client)) == 2
        assert min(counts) == 2, "the replacement is there before the old one ends"
        assert load.errors == []
        assert len(set(before) & set(hosts(client))) == 1


@pytest.mark.parametrize("nanny", [pytest.param(False, marks=pytest.mark.slow), True])
def test_sigterm(processes, nanny):
    workers = cluster(processes, 2, *([] if nanny else ["--no-nanny"]))
    with Client(processes.address) as client:
        handle, url = run(client, 2, construct=0.5, max_replicas_per_worker=None)
        with Load(handle, url) as load:
            long = [handle.nap.remote(2.0) for _ in range(8)]
            counts = []
            workers[0].terminate()

            def ended() -> bool:
                counts.append(len(hosts(client)))
                return workers[0].poll() is not None

            wait_until(ended, timeout=20)
            pids = {ref.result(timeout=10) for ref in long}
            load.goes_on()
            assert len(hosts(client)) == 2
        assert load.errors == []
        assert len(pids) == 2
        # Without a nanny, Dask breaks the connection to the scheduler first of all.
        assert min(counts) == (2 if nanny else 1), "its replacement was ready before it drained"


def test_drain_and_stay(processes):
    cluster(processes, 2, "--no-nanny")
    with Client(processes.address) as client:
        handle, url = run(client, 2)
        victim = next(iter(hosts(client).values()))
        with Load(handle, url) as load:
            done = CliRunner().invoke(cli, ["drain", victim, "--scheduler", processes.address])
            assert done.output == f"{victim} holds no replicas\n"
            assert victim not in hosts(client).values()
            load.goes_on()
        assert load.errors == []
        assert victim in client.scheduler_info(n_workers=-1)["workers"]
        done = CliRunner().invoke(cli, ["drain", victim, "--stay", "--scheduler", processes.address])
        assert done.output == f"{victim} may hold replicas again\n"
        run(client, 2, label="b")
        assert victim in hosts(client).values()
        assert ready(client)
