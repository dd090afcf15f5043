"""Under more load than can be served: what is answered in time, what is refused and how fast, and what is wasted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

from distributed import Client

import dask_serve as serve

from .apps import Sleeper
from .calling import keep_going
from .load import drive
from .loops import Loop
from .open_loop import offer, quantile
from .overload_more import computing, other_work, step
from .processes import cluster
from .table import Row, Sample

#: Seconds that a request takes, and within which it has to be answered.
SERVICE = 0.01
DEADLINE = 0.1
REPLICAS = 4


def rows(pairs: int, seconds: float) -> Iterator[Row]:
    """Measure on a cluster of its own."""
    seconds = max(seconds, 3.0)
    with cluster() as running, Client(running.address, set_as_default=False) as client:
        yield from overload(client, pairs, seconds)
        yield from leaving(client, seconds)
        yield from slow(client, seconds)
        yield from background(client, seconds)
        yield from callers(client, seconds)
        serve.delete("sleeper", client=client)
        yield from step(client)
        yield from computing(client, pairs, seconds)
    yield from other_work(seconds)


def deploy(client: Client, **options: object) -> str:
    """Deploy replicas that sleep, and return their URL."""
    serve.run(Sleeper.options(**{"num_replicas": REPLICAS, **options}).bind(SERVICE), name="sleeper", client=client)
    return serve.url(client=client).rstrip("/") + "/"


def overload(client: Client, pairs: int, seconds: float) -> Iterator[Row]:
    """S2: 2 and 5 times of what a closed loop gets, with 100 ms to the deadline."""
    url = deploy(client)
    capacity = drive(url, 32, seconds).rate
    for times in (2, 5):
        goodput, late, refused = [], [], []
        for _ in range(pairs):
            report = offer(url, times * capacity, seconds, DEADLINE)
            good = [taken for taken in report.seconds.get(200, []) if taken <= DEADLINE]
            admitted = sum(count for status, count in report.counts.items() if status != 503)
            goodput.append(Sample(len(good) / report.took / capacity))
            late.append(Sample(100.0 * (admitted - len(good)) / max(admitted, 1)))
            refused.append(Sample(1e3 * quantile(report.seconds.get(503, []), 0.99)))
        what = f"{times} times the capacity offered, {DEADLINE * 1e3:g} ms to the deadline"
        yield Row(f"{what}: answers in time, of the capacity", "x", goodput, least=0.9)
        yield Row(f"{what}: late, of those taken in", "%", late, most=1.0)
        yield Row(f"{what}: 99th percentile of refusals, at the client", "ms", refused, most=5.0)


def leaving(client: Client, seconds: float) -> Iterator[Row]:
    """S6: 30 % of the clients leave after 50 ms; below the capacity, and at twice that."""
    url = deploy(client)
    capacity = drive(url, 32, 1.0).rate
    for times in (0.9, 2):
        before = wasted(client)
        offer(url, times * capacity, seconds, 0.0, 0.3, 0.05)
        share = (wasted(client) - before) / (REPLICAS * (seconds + 1.0))
        what = f"30 % of the clients leave after 50 ms, {times:g} times the capacity offered: wasted time of replicas"
        yield Row(what, "%", [Sample(100.0 * share)], most=5.0)


def wasted(client: Client) -> float:
    """Return the seconds that replicas have worked for nobody."""
    workers = serve.status(client=client).workers
    return sum(replica.get("seconds_wasted", 0.0) for worker in workers for replica in worker.replicas.values())


def slow(client: Client, seconds: float) -> Iterator[Row]:
    """S7: one of the replicas takes 10 times as long, at 60 % of the capacity of all."""
    url = deploy(client)
    rate = 0.6 * REPLICAS / SERVICE
    even = offer(url, rate, 2 * seconds)
    handle = serve.get_app_handle("sleeper", client=client)
    # Who answers first is the slow one from now on.
    handle.slow_down.remote(10.0).result()
    offer(url, rate, seconds)
    uneven = offer(url, rate, 2 * seconds)
    sample = Sample(quantile(uneven.seconds[200], 0.99) / quantile(even.seconds[200], 0.99))
    yield Row("One of 4 replicas takes 10 times as long, load 0.6: 99th percentile", "x", [sample], most=2.0)
    serve.delete("sleeper", client=client)


def background(client: Client, seconds: float) -> Iterator[Row]:
    """S10: a background map takes all that online requests leave."""
    url = deploy(client)
    rate = 0.5 * REPLICAS / SERVICE
    alone = offer(url, rate, 2 * seconds)
    handle = serve.get_app_handle("sleeper", client=client).options(sync=False, request_class="background")
    done: list[float] = []

    def carry() -> None:
        with Loop() as loop:
            count, took = loop.run(keep_going(partial(answer, handle), 64, 2 * seconds + 2.0))
            done.append(count / took)

    mapping = threading.Thread(target=carry)
    mapping.start()
    beside = offer(url, rate, 2 * seconds)
    mapping.join()
    sample = Sample(quantile(beside.seconds[200], 0.99) / quantile(alone.seconds[200], 0.99))
    note = f" (the map does {done[0] * SERVICE / REPLICAS:.2f} of the capacity)"
    yield Row("A background map beside online load 0.5: 99th percentile", "x", [sample], most=1.5, note=note)


def callers(client: Client, seconds: float) -> Iterator[Row]:
    """One slot, 50 callers: how much of the time it is used."""
    for service, least in ((0.01, 0.95), (0.001, 0.85)):
        deployment = Sleeper.options(num_replicas=1, max_ongoing_requests=1)
        handle = serve.run(deployment.bind(service), name="sleeper", client=client).rest.options(sync=False)
        with Loop() as loop:
            before = handle_busy(handle)
            _, took = loop.run(keep_going(partial(answer, handle), 50, seconds))
            busy = handle_busy(handle) - before
        what = f"max_ongoing_requests=1, 50 callers, {service * 1e3:g} ms of service: used"
        yield Row(what, "x", [Sample(busy / took)], least=least)


async def answer(handle: serve.DeploymentHandle, number: int) -> None:
    """Call, and wait for the answer."""
    await (await handle.remote())


def handle_busy(handle: serve.DeploymentHandle) -> float:
    """Return the seconds that the replica's code has run."""
    return handle.options(method_name="busy", sync=True).remote().result()
