"""Workers that die, hang or lose their door, under load; what is replaced, and what is not."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from distributed import Client
from helpers import wait_until
from test_deaths import Processes, in_flight, ready
from test_leaving import Load, Model, cluster, hosts, pid_of, run

import dask_serve as serve
from dask_serve.exceptions import ReplicaLostError


@pytest.fixture
def processes(tmp_path) -> Iterator[Processes]:
    found = Processes(tmp_path)
    yield found
    for process in found.started:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGCONT)
    found.end()


def pids(load: Load, since: float) -> set[int]:
    """Processes of the calls that ended after a moment, and began after it."""
    return {told for ended, took, told in list(load.answers) if isinstance(told, int) and ended - took > since}


def test_a_killed_worker_under_load(processes):
    cluster(processes, 3)
    with Client(processes.address) as client:
        handle, url = run(client, 3, construct=0.5)
        with Load(handle, url, retries_on_loss=1) as load, Load(handle) as careless:
            before = hosts(client)
            victim = next(iter(before.values()))
            pid = pid_of(client, victim)
            os.kill(pid, signal.SIGKILL)
            killed = time.monotonic()
            wait_until(lambda: victim not in hosts(client).values())
            wait_until(lambda: len(hosts(client)) == 3)
            took = time.monotonic() - killed
            load.goes_on()
            careless.goes_on()
            assert pid not in pids(load, killed + 0.5)
        assert load.errors == []
        # Those that were in flight there, and no other.
        assert len(careless.errors) <= 3
        assert all("ReplicaLostError" in error for error in careless.errors)
        assert took < 3.5


def living(client: Client, worker: str) -> int:
    """Count the replicas of a worker that have not ended."""

    def count(dask_worker: Any) -> int:
        from dask_serve.replica.process import ServeProcess

        return len(ServeProcess.units_of(dask_worker))

    return int(client.run(count, workers=[worker])[worker])


def stopped(client: Client, handle: Any, url: str, timeout: float) -> None:
    """Stop a worker, and see that it gets no requests, is replaced, and does no harm when it goes on."""
    before = hosts(client)
    victim = next(iter(before.values()))
    pid = pid_of(client, victim)
    with Load(handle, url, retries_on_loss=1) as load, Load(handle, threads=1) as careless:
        lost = [handle.nap.remote(3600) for _ in range(8)]
        wait_until(lambda: in_flight(client) >= 8)
        os.kill(pid, signal.SIGSTOP)
        at = time.monotonic()
        wait_until(lambda: victim not in hosts(client).values(), timeout=10)
        silent = time.monotonic() - at
        wait_until(lambda: len(hosts(client)) == len(before), timeout=timeout + 10)
        replaced = time.monotonic() - at
        # What ran there fails, or runs elsewhere; nothing hangs.
        wait_until(lambda: any(ref.done() for ref in lost), timeout=10)
        load.goes_on()
        count = len(load.answers)
        wait_until(lambda: len(load.answers) > count + 50)
        here = [(ended - took - at) for ended, took, told in load.answers if told == pid and ended - took > at]
        os.kill(pid, signal.SIGCONT)
        wait_until(lambda: living(client, victim) == list(hosts(client).values()).count(victim))
        since = time.monotonic()
        load.goes_on(200)
        after = pids(load, since)
    failed = [ref.exception(timeout=1) for ref in lost if ref.done()]
    for ref in lost:
        ref.cancel()
    assert silent < 3.0
    assert timeout - 1.0 < replaced < timeout + 3.5
    assert here == []
    assert failed
    assert all(isinstance(error, ReplicaLostError) for error in failed)
    assert load.errors == []
    assert all("ReplicaLostError" in error for error in careless.errors)
    assert len(hosts(client)) == len(before)
    # The replicas that were given up have ended; its worker may hold new ones.
    if victim not in hosts(client).values():
        assert pid not in after


def test_a_worker_that_hangs(processes):
    cluster(processes, 3, "--no-nanny")
    with Client(processes.address) as client:
        handle, url = run(client, 3, health_check_timeout_s=4.0)
        stopped(client, handle, url, 4.0)


LIGHT_WORKERS = """
import asyncio, sys
from distributed import Worker

async def main():
    workers = [Worker(sys.argv[1], nthreads=1, dashboard=False, memory_limit=0) for _ in range(int(sys.argv[2]))]
    await asyncio.gather(*workers)
    await asyncio.gather(*(worker.finished() for worker in workers))

asyncio.run(main())
"""


@pytest.mark.slow
def test_a_worker_that_hangs_among_many(processes):
    """With 50 workers each has a heartbeat every 2 s; nobody calls who could notice it otherwise."""
    processes.scheduler()
    for name in "ab":
        processes.worker("--no-nanny", "--name", name)
    processes.start("-c", LIGHT_WORKERS, processes.address, "50")
    with Client(processes.address) as client:
        client.wait_for_workers(52, timeout=60)
        app = Model.options(num_replicas=2, workers=["a", "b"], max_replicas_per_worker=1).bind()
        handle = serve.run(app, route_prefix=None, client=client, timeout=60)
        victim, other = hosts(client).values()
        pid = pid_of(client, victim)
        heard = 0.0

        def beat() -> float:
            """Seconds since the one before; 0.0: there was none yet."""
            nonlocal heard
            assert len(hosts(client)) == 2, "a worker whose heartbeats are rare does not hang"
            before, heard = (
                heard,
                client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.workers[victim].last_seen),
            )
            return heard - before if before else 0.0

        wait_until(lambda: beat() > 1.5)
        os.kill(pid, signal.SIGSTOP)
        at = time.monotonic()
        wait_until(lambda: victim not in hosts(client).values(), timeout=10)
        took = time.monotonic() - at
        assert handle.nap.remote(0.0).result(timeout=10) == pid_of(client, other)
        os.kill(pid, signal.SIGCONT)
        wait_until(lambda: victim in hosts(client).values())
        assert took < 3.0


@pytest.mark.slow
def test_a_worker_that_hangs_for_ten_seconds(processes):
    cluster(processes, 3, "--no-nanny")
    with Client(processes.address) as client:
        handle, url = run(client, 3)
        stopped(client, handle, url, 10.0)


@serve.deployment(num_replicas=2, health_check_timeout_s=8.0, max_replicas_per_worker=1)
class Selfish:
    """Can keep the interpreter for itself."""

    async def nap(self, seconds: float) -> int:
        await asyncio.sleep(seconds)
        return os.getpid()

    def keep(self, seconds: float) -> int:
        # Unlike CDLL, it does not let go of the interpreter's lock.
        ctypes.PyDLL(None).sleep(int(seconds))
        return os.getpid()


def test_a_worker_whose_interpreter_is_taken_is_not_replaced(processes):
    cluster(processes, 2, "--no-nanny")
    with Client(processes.address) as client:
        client.wait_for_workers(2, timeout=30)
        handle = serve.run(Selfish.bind(), client=client, route_prefix=None, timeout=60)
        entry = "default/Selfish"
        before = ready(client, entry)
        with Load(handle, retries_on_loss=1) as load:
            began = time.monotonic()
            kept = handle.keep.remote(5)
            counts = []

            def done() -> bool:
                counts.append(len(ready(client, entry)))
                return kept.done()

            wait_until(done, timeout=15)
            keeper = kept.result(timeout=1)
            wait_until(lambda: sorted(ready(client, entry)) == sorted(before))
            load.goes_on()
        assert time.monotonic() - began > 5
        assert min(counts) == 1, "it was taken out of the table meanwhile"
        assert load.errors == []
        late = [ended - took - began for ended, took, told in load.answers if told == keeper and took > 1]
        assert all(at < 3.0 for at in late), late


def test_a_door_that_is_shut(processes):
    cluster(processes, 2, "--no-nanny")
    with Client(processes.address) as client:
        handle, url = run(client, 2, max_replicas_per_worker=1, health_check_timeout_s=1.0)
        before = hosts(client)
        victim = next(iter(before.values()))

        def shut() -> None:
            from dask_serve.replica.process import ServeProcess

            threading.Thread(target=ServeProcess.doors()[0].close).start()

        with Load(handle, url, retries_on_loss=1) as load:
            client.run(shut, workers=[victim])
            wait_until(lambda: len(set(hosts(client)) - set(before)) == 1 and len(hosts(client)) == 2)
            load.goes_on()
            since = time.monotonic()
            load.goes_on(200)
            assert len(pids(load, since)) == 2
        assert load.errors == []


def test_restart_under_load(processes):
    cluster(processes, 2)
    with Client(processes.address) as client:
        handle, url = run(client, 2)
        with Load(handle, url, retries_on_loss=1) as load:
            before = hosts(client)
            client.restart(timeout=30)
            wait_until(lambda: len(hosts(client)) == 2 and not set(hosts(client)) & set(before), timeout=20)
            load.goes_on()
        assert load.errors == []
