"""More is asked of replicas that compute, for a moment, or on workers that have other work too."""

from __future__ import annotations

import time
from collections.abc import Iterator

from distributed import Client

import dask_serve as serve

from .apps import Sleeper, Spinner, spin_for
from .load import drive
from .open_loop import offer, quantile
from .processes import cluster
from .table import Row, Sample
from .under_load import Open

#: Seconds that a request takes, and within which it has to be answered.
SERVICE, DEADLINE = 0.01, 0.1
#: Threads of a worker.
THREADS = 4


def step(client: Client) -> Iterator[Row]:
    """S3: at 0.8 of the capacity, 1.4 times as much for 5 s and back."""
    serve.run(Sleeper.options(num_replicas=4).bind(SERVICE), name="sleeper", client=client)
    url = serve.url(client=client).rstrip("/") + "/"
    rate = 0.8 * drive(url, 32, 2.0).rate
    with Open(url, rate, DEADLINE) as load:
        begun = time.monotonic()
        time.sleep(4.0)
        # One second of them does not count there.
        offer(url, 0.4 * rate, 4.0, DEADLINE)
        ended = time.monotonic()
        time.sleep(5.0)
        over = time.monotonic()
    after = [status for at, _, status in load.asked if ended + 1.0 <= at < over]
    share = 100.0 * sum(status != 200 for status in after) / max(len(after), 1)
    ratio = load.late(ended + 1.0, over) / load.late(begun, begun + 4.0)
    what = "1.4 times as much as 0.8 of the capacity for 5 s: 99th percentile from 1 s after it, of that before"
    yield Row(what, "x", [Sample(ratio)], most=1.5)
    yield Row("The same: refused or late from 1 s after it", "%", [Sample(share)], most=1.0)
    serve.delete("sleeper", client=client)


def computing(client: Client, pairs: int, seconds: float) -> Iterator[Row]:
    """S2 with a replica that computes: its worker has one core, the proxy and the load another."""
    serve.run(Spinner.bind(SERVICE), name="spinner", client=client)
    url = serve.url(client=client).rstrip("/") + "/"
    capacity = drive(url, 32, seconds).rate
    for times in (2, 5):
        goodput, late = [], []
        for _ in range(pairs):
            report = offer(url, times * capacity, seconds, DEADLINE)
            good = sum(taken <= DEADLINE for taken in report.seconds.get(200, []))
            admitted = sum(count for status, count in report.counts.items() if status != 503)
            goodput.append(Sample(good / report.took / capacity))
            late.append(Sample(100.0 * (admitted - good) / max(admitted, 1)))
        what = f"A replica that computes, {times} times the capacity offered"
        note = f" ({capacity:.0f} requests/s)"
        yield Row(f"{what}: answers in time, of the capacity", "x", goodput, note=note)
        yield Row(f"{what}: late, of those taken in", "%", late)
    serve.delete("spinner", client=client)


def other_work(seconds: float) -> Iterator[Row]:
    """S11: Dask tasks on the replica's worker, and on another one."""
    with cluster(workers=2) as running, Client(running.address, set_as_default=False) as client:
        client.wait_for_workers(2)
        serve.start(port=0, client=client)
        serve.run(Sleeper.options(workers=["one"]).bind(SERVICE), name="sleeper", client=client)
        url = serve.url(client=client).rstrip("/") + "/"
        alone = latencies(url, seconds)
        for what, function, worker, most in (
            ("tasks that sleep in all threads of the replica's worker", time.sleep, "one", 1.5),
            ("tasks that compute in Python in all threads of the replica's worker", spin_for, "one", None),
            ("the same tasks on another worker (`workers=` sets them apart)", spin_for, "two", 1.5),
        ):
            tasks = [
                client.submit(function, 2 * seconds + 4.0, workers=[worker], key=f"{what}-{number}", pure=False)
                for number in range(THREADS)
            ]
            # They have begun.
            time.sleep(1.0)
            beside = latencies(url, seconds)
            client.gather(tasks)
            for share in (0.5, 0.99):
                sample = Sample(quantile(beside, share) / quantile(alone, share))
                name = "median" if share == 0.5 else "99th percentile"
                note = f" ({1e3 * quantile(alone, share):.1f} ms without, {1e3 * quantile(beside, share):.1f} ms with)"
                yield Row(f"Load 0.5 beside {what}: {name}", "x", [sample], most=most, note=note)


def latencies(url: str, seconds: float) -> list[float]:
    """Return the sorted seconds of requests at half of what one thread can do."""
    return offer(url, 0.5 / SERVICE, 2 * seconds).seconds[200]
