"""What changes, leaves, dies and grows under load: requests that fail, and the seconds until all is well again."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import urllib.request
from collections.abc import Iterator

from distributed import Client

import dask_serve as serve
from dask_serve.controller.status import DeploymentStatus

from .apps import Sleeper
from .calling import keep_going
from .fleet import Fleet, hosts, until
from .loops import Loop
from .processes import DEADLINE
from .restart import restart
from .table import Row, Sample
from .under_load import Full, Open

#: Seconds that a request takes, and that a constructor does.
SERVICE, CONSTRUCT = 0.01, 0.5
REPLICAS = 4
#: Seconds for which a worker has to be silent before its replicas are replaced, and that are measured in quiet.
PATIENCE, STEADY = 10.0, 4.0


def rows() -> Iterator[Row]:
    """Measure, each group on a cluster of its own."""
    for group in (updates, kills, departures, lifetime, load_step, hanging, selfish):
        with Fleet() as fleet:
            fleet.scheduler()
            with Client(fleet.address, set_as_default=False) as client:
                serve.start(port=0, client=client)
                yield from group(fleet, client)
    yield restart()


def deploy(client: Client, number: int = REPLICAS, version: str = "1", **options: object) -> str:
    """Deploy replicas, or update them, and return their URL."""
    options = {"num_replicas": number, "version": version, "retries_on_loss": 1, **options}
    serve.run(Sleeper.options(**options).bind(SERVICE, CONSTRUCT), client=client, timeout=2 * DEADLINE)
    return str(serve.url(client=client)) + "/"


def deployed(client: Client) -> DeploymentStatus:
    """Return how the replicas fare."""
    found: DeploymentStatus = serve.status(client=client).applications["default"].deployments["Sleeper"]
    return found


def ready(client: Client) -> dict[str, str]:
    """Return the addresses of workers, by the ready replicas there."""
    return {replica.id: replica.worker for replica in deployed(client).replicas if replica.state == "ready"}


def replaced(client: Client, before: dict[str, str]) -> bool:
    """Return whether there are as many replicas as before, and others."""
    now = ready(client)
    return len(now) == len(before) and now.keys() != before.keys()


def half(number: int = REPLICAS) -> float:
    """Return half of the requests a second that replicas can answer."""
    return 0.5 * number / SERVICE


def value(what: str, unit: str, found: float, most: float | None = None, note: str = "") -> Row:
    """Make a row of one figure."""
    return Row(what, unit, [Sample(found)], most=most, note=note)


def failures(what: str, load: Full) -> Row:
    """Make a row of the requests that failed at full load."""
    note = f" ({load.load.requests:,} answered{'; ' + load.load.why if load.load.why else ''})"
    return value(f"{what}, 32 connections: failed requests", "requests", load.load.failed, most=0, note=note)


def updates(fleet: Fleet, client: Client) -> Iterator[Row]:
    """Rolling updates, at full load and at half of it."""
    fleet.workers(client, 4)
    url = deploy(client)
    with Full(url) as full:
        deploy(client, version="2")
    yield failures("Rolling update of 4 replicas", full)

    with Open(url, half()) as load:
        begun = time.monotonic()
        time.sleep(STEADY)
        changed = time.monotonic()
        for version in "345":
            deploy(client, version=version)
        ended = time.monotonic()
    steady, during = load.late(begun, changed), load.late(changed, ended)
    note = f" ({1e3 * during:.0f} ms for {ended - changed:.1f} s, against {1e3 * steady:.0f} ms; "
    note += f"{load.failed} failed, {load.hung} hung{load.why})"
    yield value("The same at half load, three in a row: 99th percentile meanwhile", "x", during / steady, 3, note)


def kills(fleet: Fleet, client: Client) -> Iterator[Row]:
    """A worker is killed, at half load and at full load; its nanny starts it again."""
    fleet.workers(client, 4)
    url = deploy(client)
    with Open(url, half()) as load:
        took = kill(client)
    what = "kill -9 of one of 4 workers at half load, retries_on_loss=1"
    yield value(f"{what}: hung requests", "requests", load.hung, most=0)
    yield value(f"{what}: failed requests", "requests", load.failed, most=0, note=load.why)
    yield value(f"{what}: until all are ready again, without the constructor", "s", took - CONSTRUCT, most=3)
    client.wait_for_workers(4, timeout=DEADLINE)
    with Full(url) as full:
        kill(client)
    yield failures("kill -9 of one of 4 workers, retries_on_loss=1", full)


def kill(client: Client) -> float:
    """Kill a worker with a replica, and return the seconds until there are as many again."""
    before = ready(client)
    pid = hosts(client)[next(iter(before.values()))]
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    until(lambda: replaced(client, before))
    return time.monotonic() - killed


def departures(fleet: Fleet, client: Client) -> Iterator[Row]:
    """Workers that leave in order, and replicas that are not wanted any more."""
    fleet.workers(client, 4)
    url = deploy(client)
    before = ready(client)
    address = next(iter(before.values()))
    with Full(url) as full:
        client.retire_workers([address])
        until(lambda: replaced(client, before))
    yield failures("retire_workers", full)

    before = ready(client)
    address = next(iter(before.values()))
    with Full(url) as full:
        drained = fleet.start("serve", "drain", address, "--scheduler", fleet.address)
        until(lambda: drained.poll() is not None)
        if drained.returncode or address in ready(client).values() or not replaced(client, before):
            raise RuntimeError(f"{address} was not drained: {ready(client)} instead of {before}")
    yield failures("dask serve drain of one of 3 workers", full)

    before = ready(client)
    address = next(iter(before.values()))
    nanny = fleet.above(hosts(client)[address])
    with Full(url) as full:
        nanny.terminate()
        until(lambda: nanny.poll() is not None)
        until(lambda: replaced(client, before))
    yield failures("SIGTERM of a worker with a nanny", full)

    with Full(url) as full:
        deploy(client, 1)
        until(lambda: len(deployed(client).replicas) == 1)
    yield failures("Scale-down from 4 to 1", full)


def lifetime(fleet: Fleet, client: Client) -> Iterator[Row]:
    """A worker whose time is over."""
    fleet.workers(client, 1)
    fleet.worker("--lifetime", "10s")
    client.wait_for_workers(2, timeout=DEADLINE)
    url = deploy(client, 2)
    before = ready(client)
    if len(set(before.values())) != 2:
        raise RuntimeError(f"both replicas are on one worker, or the other has left: {before}")
    with Full(url) as full:
        until(lambda: len(hosts(client)) == 1)
        until(lambda: replaced(client, before))
    yield failures("--lifetime of one of 2 workers", full)


def load_step(fleet: Fleet, client: Client) -> Iterator[Row]:
    """Replicas that follow the load: from 1 to 20 slow requests at once, and from none at all."""
    fleet.workers(client, 2, "--no-nanny")
    scaling = {"max_replicas": 4, "downscale_delay_s": 0.5}
    app = Sleeper.options(autoscaling_config=scaling).bind(0.25, CONSTRUCT)
    handle = serve.run(app, client=client).who.options(sync=False)
    [first] = ready(client)
    began: list[float] = []

    async def call(number: int) -> None:
        replica, moment = await (await handle.remote())
        if replica != first:
            began.append(moment)

    with Loop() as loop:
        loop.run(keep_going(call, 1, 2.0))
        step = time.monotonic()
        loop.run(keep_going(call, 20, 4.0))
    took = min(began, default=step + DEADLINE) - step - CONSTRUCT
    what = "1 to 20 slow requests at once: until a new replica serves, without its constructor"
    yield value(what, "s", took, most=1.5)

    zero = {**scaling, "min_replicas": 0, "downscale_delay_s": 0.1}
    serve.run(Sleeper.options(autoscaling_config=zero).bind(SERVICE, CONSTRUCT), client=client)
    samples = []
    for _ in range(3):
        until(lambda: not deployed(client).replicas)
        asked = time.monotonic()
        with urllib.request.urlopen(serve.url(client=client) + "/", timeout=DEADLINE):
            samples.append(Sample(time.monotonic() - asked - CONSTRUCT))
    yield Row("From no replica to the first answer, without the constructor", "s", samples, most=1)


def hanging(fleet: Fleet, client: Client) -> Iterator[Row]:
    """A worker that is stopped, at half load."""
    fleet.workers(client, 3, "--no-nanny")
    url = deploy(client, 3, health_check_timeout_s=PATIENCE)
    before = ready(client)
    pid = hosts(client)[next(iter(before.values()))]
    with Open(url, half(3)) as load:
        os.kill(pid, signal.SIGSTOP)
        stopped = time.monotonic()
        until(lambda: replaced(client, before), PATIENCE + DEADLINE)
        took = time.monotonic() - stopped
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    # Elsewhere nothing takes that long: these were sent there.
    there = {at: taken for at, taken, status in load.asked if at >= stopped and (taken > 1.0 or status != 200)}
    note = f" ({len(there)} were, and took {max(there.values(), default=0.0):.1f} s"
    note += f"; {load.failed} failed, {load.hung} hung{load.why})"
    last = max(there, default=stopped) - stopped
    yield value("A worker that hangs (SIGSTOP), half load: until nothing is sent there", "s", last, most=3, note=note)
    what = f"The same: until it is replaced, without health_check_timeout_s={PATIENCE:g} and the constructor"
    yield value(what, "s", took - PATIENCE - CONSTRUCT)


def selfish(fleet: Fleet, client: Client) -> Iterator[Row]:
    """A worker whose interpreter's lock is held: it comes back, and nothing replaces it."""
    fleet.workers(client, 2, "--no-nanny")
    deploy(client, 2, health_check_timeout_s=PATIENCE)
    before = ready(client)
    handle = serve.get_app_handle(client=client).keep
    begun = time.monotonic()
    kept = handle.remote(5)
    until(kept.done)
    note = f" (held for {time.monotonic() - begun:.1f} s)"
    until(lambda: len(ready(client)) == 2)
    gone = len(before.keys() - ready(client).keys())
    yield value("A worker that holds the interpreter's lock for 5 s: replicas replaced", "replicas", gone, 0, note)
