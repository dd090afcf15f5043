"""Workers that live for a limited time, as under a batch system, and a service on them that fails no request.

Each worker leaves when its ``--lifetime`` is over, and its nanny starts the next one. Before it leaves, its replicas
are started elsewhere; it serves until they are ready. Meanwhile this calls and calls, over HTTP and by handle, without
a retry of its own. (On SLURM and the like the lifetime is a little less than the walltime of the job.)

Run it alone, half a minute with its own cluster::

    python -m examples.walltime
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from distributed import Client, get_worker
from starlette.requests import Request

import dask_serve as serve

WORKERS = 3


@serve.deployment(num_replicas=2, max_replicas_per_worker=1)
class Model:
    """Takes a while to start, as models do."""

    def __init__(self) -> None:
        time.sleep(0.3)
        self.worker = get_worker().id

    def __call__(self, request: Request | None = None) -> str:
        """Tell which worker answers; each new one has a new id."""
        return self.worker


class Load:
    """Calls one after the other in a thread, until it is told to stop."""

    def __init__(self, call: Callable[[], str]) -> None:
        self.answers: Counter[str] = Counter()
        self.failures: list[BaseException] = []
        self.slowest = 0.0
        self._call = call
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(0.005):
            begun = time.monotonic()
            try:
                self.answers[self._call()] += 1
            except Exception as error:  # noqa: BLE001 - whatever it is, it counts
                self.failures.append(error)
            self.slowest = max(self.slowest, time.monotonic() - begun)

    def stop(self) -> None:
        """Wait for the last answer."""
        self._over.set()
        self._thread.join()


@contextlib.contextmanager
def cluster(lifetime: float) -> Iterator[str]:
    """Start ``dask scheduler`` and workers, as on a real cluster; its address."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ends:
        file = Path(folder) / "scheduler.json"

        def start(command: str, *options: str) -> None:
            arguments = [sys.executable, "-m", "dask", command, "--scheduler-file", str(file), *options]
            log = ends.enter_context((Path(folder) / "log").open("a"))
            process = subprocess.Popen(arguments, stdout=log, stderr=log)
            ends.callback(process.wait)
            ends.callback(process.terminate)

        start("scheduler", "--port", "0", "--dashboard-address", ":0")
        lives = ["--lifetime", f"{lifetime} s", "--lifetime-stagger", "1 s", "--lifetime-restart"]
        for _ in range(WORKERS):
            start("worker", "--nthreads", "1", "--no-dashboard", *lives)
        yield str(file)


def present(dask_scheduler: Any) -> list[str]:
    """Ids of the workers there are; a worker that was started again has another one."""
    return [worker.server_id for worker in dask_scheduler.workers.values()]


def main(generations: int = 1, lifetime: float = 6.0, patience: float = 50.0) -> dict[str, Any]:
    """Call until all workers have been replaced so often; what was seen."""
    with cluster(lifetime) as file, Client(scheduler_file=file) as client:
        client.wait_for_workers(WORKERS, timeout=30)
        serve.start(client=client, port=0)
        handle = serve.run(Model.bind(), client=client)
        url = serve.url(client=client)
        session = httpx.Client(trust_env=False, timeout=20)
        loads = [
            Load(lambda: session.get(url).raise_for_status().text),
            Load(lambda: handle.remote().result(20)),
        ]
        begun = time.monotonic()
        try:
            joined: set[str] = set()
            while len(joined) < WORKERS * (generations + 1):
                joined.update(client.run_on_scheduler(present))
                if time.monotonic() > begun + patience:
                    raise RuntimeError(f"only {len(joined)} workers have joined after {patience:g} s")
                time.sleep(0.1)
        finally:
            for load in loads:
                load.stop()
            session.close()
            serve.shutdown(client=client)
    answers = sum((load.answers for load in loads), Counter())
    failures = [error for load in loads for error in load.failures]
    slowest = max(load.slowest for load in loads)
    print(f"{len(joined)} workers have joined, {WORKERS} at a time, and {len(answers)} of them have answered")
    print(f"{answers.total()} requests, {len(failures)} failed, the slowest took {slowest:.2f} s")
    return {"joined": len(joined), "answers": answers, "failures": failures, "slowest": slowest}


if __name__ == "__main__":
    main()
