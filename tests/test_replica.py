"""One replica and its threads: construction, limits, pools, deadlines, control, and what is left at the end."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from typing import Any

import msgspec
import pytest
from distributed import Client
from distributed.utils_test import gen_cluster
from helpers import until

import dask_serve as serve
from dask_serve.controller.status import ServeStatus, decode_status
from dask_serve.exceptions import (
    DeploymentFailedError,
    DeploymentUnavailableError,
    ReplicaLostError,
    RequestCancelledError,
    RequestTimeoutError,
)
from dask_serve.replica.process import ServeProcess
from dask_serve.routing.session import Session

ONE = [("127.0.0.1", 2)]
TWO = [("127.0.0.1", 2)] * 2


async def status_of(client: Client) -> ServeStatus:
    return decode_status((await client.scheduler.serve_status())["status"])


def units(worker: Any) -> list[Any]:
    return ServeProcess.units_of(worker)


def ours() -> set[str]:
    """Names of the threads of replicas and doors."""
    return {thread.name for thread in threading.enumerate() if "dask-serve-door" in thread.name or "/" in thread.name}


@serve.deployment
class Probe:
    """Knows how many requests it ran at the same time."""

    def __init__(self) -> None:
        self.running = self.most = self.started = 0
        self.threads: set[int] = set()
        self.lock = threading.Lock()
        self.gate = threading.Event()

    def _enter(self) -> None:
        with self.lock:
            self.started += 1
            self.running += 1
            self.most = max(self.most, self.running)

    def _leave(self) -> None:
        with self.lock:
            self.running -= 1

    async def slow(self, seconds: float = 0.01) -> int:
        self._enter()
        try:
            await asyncio.sleep(seconds)
        finally:
            self._leave()
        return self.most

    async def quick(self) -> int:
        self._enter()
        self._leave()
        return self.most

    def block(self, seconds: float = 0.01) -> int:
        self._enter()
        self.threads.add(threading.get_ident())
        try:
            time.sleep(seconds)
        finally:
            self._leave()
        return len(self.threads)

    def hold(self) -> str:
        self._enter()
        self.gate.wait(30)
        self._leave()
        return "held"

    async def freeze(self, seconds: float) -> str:
        """User code that should not, but does, block its event loop."""
        time.sleep(seconds)
        return "frozen"

    async def open_gate(self) -> None:
        self.gate.set()

    async def counts(self) -> tuple[int, int, int]:
        return self.started, self.running, self.most

    async def __call__(self, x: Any = None) -> Any:
        return x


# -- construction


@gen_cluster(client=True, nthreads=ONE)
async def test_constructor_that_raises_is_told_with_its_traceback(c, s, a):
    @serve.deployment
    class Broken:
        def __init__(self):
            self.load("weights.bin")

        def load(self, path):
            raise FileNotFoundError(f"no {path} here")

    began = time.monotonic()
    with pytest.raises(DeploymentFailedError) as info:
        await serve.run(Broken.bind(), route_prefix=None, client=c)
    assert time.monotonic() - began < 10
    text = str(info.value)
    assert "FileNotFoundError: no weights.bin here" in text
    assert "self.load(" in text
    assert "in load" in text
    await serve.delete("default", client=c)
    await until(lambda: not ours() - {"dask-serve-door"})


@gen_cluster(client=True, nthreads=ONE)
async def test_asynchronous_constructor(c, s, a):
    @serve.deployment
    class Late:
        async def __init__(self, value):
            await asyncio.sleep(0)
            self.value = value

        async def __call__(self):
            return self.value

    handle = await serve.run(Late.bind(5), route_prefix=None, client=c)
    assert await handle.remote() == 5


@gen_cluster(client=True, nthreads=ONE)
async def test_asynchronous_constructor_that_raises(c, s, a):
    @serve.deployment
    class Broken:
        async def __init__(self):
            await asyncio.sleep(0)
            raise OSError("the model registry is away")

    with pytest.raises(DeploymentFailedError, match="OSError: the model registry is away"):
        await serve.run(Broken.bind(), route_prefix=None, client=c)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, asyncio.CancelledError])
def test_constructor_that_wants_to_end_the_process(error):
    @gen_cluster(client=True, nthreads=ONE)
    async def check(c, s, a):
        @serve.deployment
        class Rude:
            def __init__(self):
                raise error("bye")

        with pytest.raises(DeploymentFailedError, match=error.__name__):
            await serve.run(Rude.bind(), route_prefix=None, client=c)

    check()


@gen_cluster(client=True, nthreads=ONE)
async def test_handles_in_constructors(c, s, a):
    @serve.deployment
    class Adder:
        def __call__(self, x):
            return x + 1

    @serve.deployment
    class Outer:
        async def __init__(self, adder):
            self.adder = adder
            self.first = await adder.remote(1)

        async def __call__(self):
            return self.first, await self.adder.remote(self.first)

    handle = await serve.run(Outer.bind(Adder.bind()), route_prefix=None, client=c)
    assert await handle.remote() == (2, 3)


@gen_cluster(client=True, nthreads=ONE)
async def test_blocking_on_a_handle_in_a_constructor_is_a_clear_error(c, s, a):
    @serve.deployment
    class Adder:
        def __call__(self, x):
            return x + 1

    @serve.deployment
    class Outer:
        def __init__(self, adder):
            self.first = adder.remote(1).result(timeout=5)

    with pytest.raises(DeploymentFailedError, match="await"):
        await serve.run(Outer.bind(Adder.bind()), route_prefix=None, client=c)


@gen_cluster(client=True, nthreads=ONE)
async def test_user_config_and_reconfigure(c, s, a):
    @serve.deployment(user_config={"threshold": 1})
    class Tuned:
        def __init__(self):
            self.seen = []

        async def reconfigure(self, config):
            if config.get("threshold") is None:
                raise ValueError("threshold is missing")
            self.seen.append(config["threshold"])

        async def __call__(self):
            return self.seen

    handle = await serve.run(Tuned.bind(), route_prefix=None, client=c)
    assert await handle.remote() == [1]
    [unit] = units(a)
    await serve.run(Tuned.options(user_config={"threshold": 2}).bind(), route_prefix=None, client=c)
    assert await handle.remote() == [1, 2]
    assert units(a) == [unit]
    # One that raises is taken back, and the replica goes on with the one before.
    with pytest.raises(DeploymentFailedError, match=r"(?s)not be reconfigured.*in reconfigure.*threshold is missing"):
        await serve.run(Tuned.options(user_config={}).bind(), route_prefix=None, client=c)
    await until(lambda: unit.options.user_config == {"threshold": 2})
    assert units(a) == [unit]
    assert (await handle.remote())[:2] == [1, 2]


@gen_cluster(client=True, nthreads=ONE)
async def test_user_config_without_reconfigure(c, s, a):
    @serve.deployment(user_config=1)
    class Lazy:
        def __getattr__(self, name):
            raise AttributeError(name)

    with pytest.raises(DeploymentFailedError, match="no method reconfigure"):
        await serve.run(Lazy.bind(), route_prefix=None, client=c)


# -- the end


@gen_cluster(client=True, nthreads=ONE)
async def test_what_never_began_is_not_lost_with_its_replica(c, s, a):
    @serve.deployment(graceful_shutdown_timeout_s=0.2)
    class Slow:
        def __call__(self, seconds):
            time.sleep(seconds)
            return serve.get_replica_context().replica_id

    handle = await serve.run(Slow.bind(), route_prefix=None, client=c)
    [unit] = units(a)
    first, *others = [handle.remote(seconds) for seconds in (3, 0, 0, 0)]
    await until(lambda: unit.core.admission.running == 4)
    await serve.run(Slow.options(version="2").bind(), route_prefix=None, client=c)
    with pytest.raises(ReplicaLostError):
        await first
    assert unit.id not in await asyncio.gather(*others)


# -- limits


@pytest.mark.parametrize(("limit", "method"), [(1, "slow"), (3, "slow"), (1, "quick"), (2, "block")])
def test_max_ongoing_requests_is_never_exceeded(limit, method):
    """With 50 callers through three routers at once; `quick` is fast enough for one request admitted ahead."""

    @gen_cluster(client=True, nthreads=ONE, timeout=60)
    async def check(c, s, a):
        app = Probe.options(max_ongoing_requests=limit, threads=4).bind()
        await serve.run(app, route_prefix=None, client=c)
        handles = [await serve.get_app_handle("default", client=c)]
        others = [await Client(s.address, asynchronous=True, set_as_default=False) for _ in range(2)]
        handles += [await serve.get_app_handle("default", client=other) for other in others]
        await asyncio.gather(*(getattr(handles[i % 3], method).remote() for i in range(150)))
        started, running, most = await handles[0].counts.remote()
        assert (started, running) == (150, 0)
        assert most == limit if method != "quick" else most <= limit
        if method == "quick":
            [unit] = units(a)
            assert unit.core.admission.ahead == 1
        for other in others:
            await other.close()

    check()


@gen_cluster(client=True, nthreads=ONE)
async def test_the_limit_changes_in_place(c, s, a):
    handle = await serve.run(Probe.options(max_ongoing_requests=1).bind(), route_prefix=None, client=c)
    # Both last until they are cancelled: the second one starts for no other reason than the new limit.
    refs = [handle.slow.remote(60) for _ in range(2)]
    [unit] = units(a)
    await until(lambda: unit.user.instance.started == 1)
    await serve.run(Probe.options(max_ongoing_requests=2).bind(), route_prefix=None, client=c)
    await until(lambda: unit.user.instance.started == 2)
    for ref in refs:
        await ref.cancel()


@gen_cluster(client=True, nthreads=ONE)
async def test_threads_is_the_size_of_the_pool(c, s, a):
    handle = await serve.run(Probe.options(threads=3).bind(), route_prefix=None, client=c)
    counts = await asyncio.gather(*(handle.block.remote() for _ in range(30)))
    assert max(counts) == 3
    assert (await handle.counts.remote())[2] == 3


# -- deadlines and cancels


@gen_cluster(client=True, nthreads=ONE)
async def test_work_past_its_deadline_is_not_started(c, s, a):
    handle = await serve.run(Probe.bind(), route_prefix=None, client=c)
    held = handle.hold.remote()
    [unit] = units(a)
    probe = await until(lambda: unit.user.instance)
    await until(lambda: probe.started == 1)
    late = handle.options(request_timeout_s=0.05)
    # The pool's only thread is held: these wait for it until their time is over.
    for ref in [late.block.remote() for _ in range(3)]:
        with pytest.raises(RequestTimeoutError):
            await ref
    await handle.open_gate.remote()
    assert await held == "held"
    await handle.block.remote()
    assert probe.started == 2


@gen_cluster(client=True, nthreads=ONE)
async def test_coroutines_past_their_deadline_are_not_started_either(c, s, a):
    handle = await serve.run(Probe.bind(), route_prefix=None, client=c)
    frozen = handle.freeze.remote(0.5)
    late = handle.options(request_timeout_s=0.1)
    for ref in [late.slow.remote() for _ in range(3)]:
        with pytest.raises(RequestTimeoutError):
            await ref
    assert await frozen == "frozen"
    assert (await handle.counts.remote())[0] == 0


@gen_cluster(client=True, nthreads=ONE)
async def test_cancelled_work_is_ended_or_not_started(c, s, a):
    handle = await serve.run(Probe.bind(), route_prefix=None, client=c)
    [unit] = units(a)
    probe = unit.user.instance
    running = handle.slow.remote(60)
    held = handle.hold.remote()
    await until(lambda: probe.started == 2)
    queued = handle.block.remote()
    await until(lambda: unit.core.admission.running == 3)
    await running.cancel()
    await queued.cancel()
    for ref in (running, queued):
        with pytest.raises((asyncio.CancelledError, RequestCancelledError)):
            await ref
    await until(lambda: probe.running == 1)
    await handle.open_gate.remote()
    assert await held == "held"
    await until(lambda: unit.core.admission.running == 0)
    assert probe.started == 2


# -- the end


@gen_cluster(client=True, nthreads=ONE)
async def test_deleting_lets_requests_finish_and_leaves_no_thread(c, s, a):
    handle = await serve.run(Probe.bind(), route_prefix=None, client=c)
    refs = [handle.slow.remote(0.3), handle.block.remote(0.3)]
    [unit] = units(a)
    await until(lambda: unit.user.instance.started == 2)
    await serve.delete("default", client=c)
    assert await asyncio.gather(*refs) == [2, 1]
    await until(lambda: ours() == {"dask-serve-door"})
    assert not s.tasks


@gen_cluster(client=True, nthreads=ONE)
async def test_what_still_runs_when_the_drain_is_over_is_answered_as_lost(c, s, a):
    """The door stays, for another application: no connection breaks, and yet nobody waits for ever."""
    await serve.run(Probe.bind(), name="other", route_prefix=None, client=c)
    handle = await serve.run(
        Probe.options(graceful_shutdown_timeout_s=0.1).bind(), name="app", route_prefix=None, client=c
    )
    unit = next(unit for unit in units(a) if unit.id.startswith("app/"))
    probe = unit.user.instance
    # One that runs and cannot be stopped, one that waits for the only thread, one that runs and can be stopped, and
    # one of that kind which may run twice.
    refs = [handle.hold.remote(), handle.block.remote(), handle.slow.remote(60)]
    refs.append(handle.options(retries_on_loss=1).slow.remote(60))
    await until(lambda: probe.started == 3 and unit.core.admission.running == 4)
    await serve.delete("app", client=c)
    # What has not begun, or may be sent again, could go to another replica, but there is none any more.
    gone, lost = DeploymentUnavailableError, ReplicaLostError
    for ref, error in zip(refs, (lost, gone, lost, gone), strict=True):
        with pytest.raises(error):
            await asyncio.wait_for(ref, 5)
    probe.gate.set()
    await until(lambda: not [name for name in ours() if name.startswith("app/")])


@gen_cluster(client=True, nthreads=ONE)
async def test_user_code_that_swallows_its_cancellation_does_not_keep_the_thread(c, s, a):
    @serve.deployment(graceful_shutdown_timeout_s=0)
    class Stubborn:
        async def __call__(self):
            while True:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(3600)

    handle = await serve.run(Stubborn.bind(), route_prefix=None, client=c)
    ref = handle.remote()
    [unit] = units(a)
    await until(lambda: unit.core.admission.running == 1)
    await serve.delete("default", client=c)
    with pytest.raises(ReplicaLostError):
        await asyncio.wait_for(ref, 5)
    await until(lambda: ours() == {"dask-serve-door"})


@gen_cluster(client=True, nthreads=TWO)
async def test_a_worker_that_closes_drains_its_replicas(c, s, a, b):
    handle = await serve.run(Probe.options(num_replicas=2).bind(), route_prefix=None, client=c)
    await until(lambda: units(a) and units(b))
    refs = [handle.slow.remote(0.5) for _ in range(20)]
    await until(lambda: sum(unit.core.admission.running for unit in units(a) + units(b)) == 20)
    assert units(a)[0].core.admission.running
    door = units(a)[0].door
    closing = asyncio.ensure_future(a.close())
    # New ones go to the other replica, without a failure.
    while not closing.done():
        await handle.slow.remote(0)
    await closing
    await asyncio.gather(*refs)
    await until(lambda: all(unit.core.admission.running == 0 for unit in units(b)))
    assert not units(a)
    # In-process workers share the process's door: it stays for the other one.
    assert ServeProcess.doors() == [door]
    await until(lambda: len(units(b)) == 2)
    await b.close()
    assert not ours()
    assert not ServeProcess.doors()
    with pytest.raises(OSError):
        await asyncio.open_connection("127.0.0.1", int(door.address.rpartition(":")[2]))


@gen_cluster(client=True, nthreads=TWO)
async def test_scaling_down_under_load_fails_no_request(c, s, a, b):
    app = Probe.options(num_replicas=4, max_ongoing_requests=4)
    handle = await serve.run(app.bind(), route_prefix=None, client=c)
    stop = asyncio.Event()
    answered = 0

    async def caller() -> None:
        nonlocal answered
        while not stop.is_set():
            await handle.slow.remote(0.005)
            answered += 1

    callers = [asyncio.ensure_future(caller()) for _ in range(20)]
    for number in (1, 3, 2):
        await serve.run(app.options(num_replicas=number).bind(), route_prefix=None, client=c)
        enough = answered + 40
        while len(units(a) + units(b)) != number or answered < enough:
            await handle.quick.remote()
    stop.set()
    await asyncio.gather(*callers)


@gen_cluster(client=True, nthreads=ONE)
async def test_an_actor_that_dask_lets_go_of_finishes_what_it_runs(c, s, a):
    """As in `client.restart()`: nobody drained it."""
    handle = await serve.run(Probe.bind(), route_prefix=None, client=c)
    refs = [handle.slow.remote(0.3), handle.block.remote(0.3)]
    [unit] = units(a)
    await until(lambda: unit.user.instance.started == 2)
    key = next(key for key in s.tasks if str(key).startswith("serve-"))
    controller = s.plugins["dask-serve"]
    s.client_releases_keys([key], client=controller._client.id)
    await asyncio.gather(*refs)
    assert unit.released


@gen_cluster(client=True, nthreads=ONE)
async def test_a_worker_that_closes_while_a_replica_is_constructed(c, s, a):
    @serve.deployment
    class Slow:
        async def __init__(self):
            await asyncio.sleep(3600)

    await serve.run(Slow.bind(), route_prefix=None, wait=False, client=c)
    await until(lambda: units(a))
    await asyncio.wait_for(a.close(), 5)
    assert not ours()


def test_options_travel_as_msgpack():
    """The contract with the controller."""
    from dask_serve.config import DeploymentOptions
    from dask_serve.replica.unit import _decode_options

    options = DeploymentOptions(max_ongoing_requests=3, user_config={"a": [1]})
    assert _decode_options(msgspec.msgpack.encode(options)) == options


@gen_cluster(client=True, nthreads=ONE)
async def test_get_worker_and_replica_context_in_user_code(c, s, a):
    @serve.deployment
    class Curious:
        def where(self):
            from distributed import get_worker

            return get_worker().address

        async def where_too(self):
            from distributed import get_worker

            return get_worker().address, serve.get_replica_context().deployment

    handle = await serve.run(Curious.bind(), route_prefix=None, client=c)
    assert await handle.where.remote() == a.address
    assert await handle.where_too.remote() == (a.address, "Curious")
    assert Session.of(c).worker_of(ServeProcess.door().process) == [a.address]
