"""A scheduler that is killed, and started again as its workers are: when HTTP answers, without any client."""

from __future__ import annotations

import socket
import time
import urllib.error
import urllib.request

from distributed import Client

import dask_serve as serve

from .apps import Sleeper
from .fleet import Fleet, until
from .processes import DEADLINE
from .table import Row, Sample

#: What a worker says when its scheduler knows it.
REGISTERED = "Registered to:"


def restart() -> Row:
    """Measure, and be the supervisor."""
    ports = free_ports()
    with Fleet() as fleet:
        options = ["--port", str(ports[0]), "--preload", "dask_serve.preload"]
        options += ["--serve-port", str(ports[1]), "--serve-state", str(fleet.place / "state.sqlite")]
        scheduler = fleet.scheduler(*options)
        with Client(fleet.address, set_as_default=False) as client:
            workers = [fleet.worker("--no-nanny") for _ in range(2)]
            client.wait_for_workers(2, timeout=2 * DEADLINE)
            serve.run(Sleeper.options(num_replicas=2).bind(0.01), client=client, timeout=2 * DEADLINE)
        url = f"http://127.0.0.1:{ports[1]}/"
        until(lambda: answers(url))
        scheduler.kill()
        scheduler.wait()
        killed = time.monotonic()
        fleet.scheduler(*options)
        for number, worker in enumerate(workers):
            worker.wait(DEADLINE)
            workers[number] = fleet.worker("--no-nanny")
        until(lambda: all(fleet.said(worker, REGISTERED) for worker in workers))
        returned = time.monotonic()
        until(lambda: answers(url))
        took = time.monotonic() - returned
    what = "Scheduler killed and started again with --preload: from its last worker's return to an answer over HTTP"
    note = f" (the worker returned {returned - killed:.1f} s after the kill)"
    return Row(what, "s", [Sample(took)], most=5, note=note)


def answers(url: str) -> bool:
    """Return whether HTTP is served."""
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except (OSError, urllib.error.URLError):
        return False


def free_ports() -> list[int]:
    """Return two ports that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        return [one.getsockname()[1], two.getsockname()[1]]
