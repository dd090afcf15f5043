"""Calls from where only the scheduler can be reached, and the parts that carry them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, NamedTuple

import cloudpickle
import pytest
from distributed import Client, Security
from distributed.comm import Comm
from distributed.comm.core import connect, listen
from distributed.utils_test import captured_logger, gen_cluster, gen_test
from far_side import FarSide, possible
from helpers import wait_until
from test_deaths import Processes

import dask_serve as serve
from dask_serve.controller import tunnel
from dask_serve.controller.tunnel import Tunnels
from dask_serve.exceptions import ReplicaLostError, RequestCancelledError, RequestError, RequestTimeoutError
from dask_serve.replica.process import ServeProcess
from dask_serve.routing import dial
from dask_serve.routing.dial import NotThereError, Ways, reach
from dask_serve.routing.session import Session
from dask_serve.routing.tunnel import SchedulerTunnel, TunnelTransport
from dask_serve.wire import pump as pump_module
from dask_serve.wire.connection import CallerConnection
from dask_serve.wire.frames import Frame
from dask_serve.wire.messages import Kind
from dask_serve.wire.pump import HIGH_WATER, Pump


@pytest.fixture(autouse=True, scope="module")
def sent_by_value() -> Iterator[None]:
    """The far side does not have this module."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


WINDOW = 1 << 20
LARGE = 20_000_000


def tunnels_of(client: Client) -> int:
    """How many tunnels stand on the scheduler."""
    return client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.plugins["dask-serve"].tunnels))


# -- from another network


@serve.deployment(max_ongoing_requests=2)
class Model:
    def __init__(self) -> None:
        self.cancelled = 0

    async def __call__(self, x: Any = None) -> Any:
        return x

    async def nap(self, seconds: float) -> int:
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return os.getpid()

    async def count_cancelled(self) -> int:
        return self.cancelled


@serve.deployment
class Sizes:
    def __call__(self, x: Any) -> int:
        return len(x)


@serve.deployment
class Both:
    def __init__(self, model: Any, sizes: Any) -> None:
        self.model, self.sizes = model, sizes

    async def __call__(self) -> str:
        return "both"


def handles() -> tuple[Any, Any]:
    return serve.get_deployment_handle("Model"), serve.get_deployment_handle("Sizes")


def naps(client: Client) -> bool:
    """A request of the session is at a replica."""
    router = Session.of(client).engine()[1].routers.get("default/Model")
    return router is not None and router.in_flight == 1


needs_namespaces = pytest.mark.skipif(not possible(), reason="network namespaces cannot be made here (unshare --net)")


@pytest.fixture(scope="class")
def cluster(tmp_path_factory) -> Iterator[Processes]:
    processes = Processes(tmp_path_factory.mktemp("cluster"))
    processes.scheduler("--preload", "dask_serve.preload")
    processes.worker()
    yield processes
    processes.end()


@pytest.fixture(scope="class")
def near(cluster) -> Iterator[Client]:
    with Client(cluster.address) as client:
        client.wait_for_workers(1, timeout=20)
        serve.run(Both.bind(Model.bind(), Sizes.bind()), route_prefix=None, client=client, timeout=30)
        yield client


@pytest.fixture(scope="class")
def far(cluster, near, tmp_path_factory) -> Iterator[FarSide]:
    side = FarSide(cluster.address, tmp_path_factory.mktemp("far"))
    yield side
    side.end()


@needs_namespaces
class TestFar:
    def test_calls(self, far, near):
        def calls(client: Client) -> Any:
            with captured_logger("dask_serve.routing", level=logging.INFO) as log:
                model, _ = handles()
                results = [ref.result(10) for ref in [model.remote(i) for i in range(100)]]

                async def main() -> list[Any]:
                    handle = model.options(sync=False)
                    refs = [await handle.remote(i) for i in range(100)]
                    return await asyncio.gather(*refs)

                return results, asyncio.run(main()), log.getvalue()

        synchronous, asynchronous, log = far.run(calls)
        assert synchronous == asynchronous == list(range(100))
        # Each loop finds its way, and it is told once.
        assert log.count("go through the scheduler") == 1
        assert tunnels_of(near) >= 1

    def test_the_direct_way_is_not_tried_each_time(self, far):
        """A loop of its own needs a connection of its own."""

        def again(client: Client) -> float:
            model = handles()[0].options(sync=False)

            async def main() -> float:
                since = time.monotonic()
                await (await model.remote(1))
                return time.monotonic() - since

            asyncio.run(main())
            return min(asyncio.run(main()) for _ in range(3))

        assert far.run(again) < dial.HEAD_START

    def test_large_payloads(self, far):
        def there_and_back(client: Client) -> bool:
            data = os.urandom(LARGE)
            return handles()[0].remote(data).result(30) == data

        assert far.run(there_and_back)

    def test_a_ref_is_passed_on_without_its_value(self, far):
        def chain(client: Client) -> int:
            model, sizes = handles()
            return sizes.remote(model.remote(bytes(LARGE))).result(30)

        assert far.run(chain) == LARGE

    def test_promotion(self, far):
        def promote(client: Client) -> Any:
            model, _ = handles()
            pending, large, small = model.nap.remote(0.3), model.remote(bytes(LARGE)), model.remote(20)
            length = client.submit(len, large)
            return length.result(30), client.submit(lambda x: x + 1, small).result(10), client.gather(pending) > 0

        assert far.run(promote) == (LARGE, 21, True)

    def test_cancelling(self, far):
        def cancel(client: Client) -> None:
            model, _ = handles()
            before = model.count_cancelled.remote().result(10)
            ref = model.nap.remote(60)
            wait_until(lambda: naps(client))
            ref.cancel()
            with pytest.raises(RequestCancelledError):
                ref.result(5)
            wait_until(lambda: model.count_cancelled.remote().result(10) == before + 1)

        far.run(cancel)

    def test_deadline(self, far):
        def late(client: Client) -> None:
            with pytest.raises(RequestTimeoutError):
                handles()[0].options(request_timeout_s=0.2).nap.remote(60).result(10)

        far.run(late)

    def test_waiting_requests_come_to_their_turn(self, far):
        """WANT and CREDIT pass: the replica takes two at a time, and callers on both sides have more."""

        def many(client: Client) -> int:
            return len([ref.result(20) for ref in [handles()[0].nap.remote(0.02) for _ in range(40)]])

        far.start(many)
        assert [ref.result(20) for ref in [handles()[0].nap.remote(0.02) for _ in range(40)]]
        assert far.answer() == 40

    def test_deploying(self, far, near):
        def deploy(client: Client) -> Any:
            handle = serve.run(Sizes.bind(), name="other", route_prefix=None, client=client, timeout=30)
            found = handle.remote("abc").result(10)
            serve.delete("other", client=client)
            return found

        assert far.run(deploy) == 3

    def test_nothing_is_left(self, cluster, near, tmp_path):
        wait_until(lambda: tunnels_of(near) <= 1)  # that of the class's session
        before = tunnels_of(near)
        side = FarSide(cluster.address, tmp_path)
        assert side.run(lambda client: handles()[0].remote(7).result(10)) == 7
        assert tunnels_of(near) == before + 1
        side.end()
        wait_until(lambda: tunnels_of(near) == before)

    def test_a_killed_caller_leaves_nothing(self, cluster, near, tmp_path):
        before = tunnels_of(near)
        cancelled = handles()[0].count_cancelled.remote().result(10)
        side = FarSide(cluster.address, tmp_path)

        def nap(client: Client) -> bool:
            handles()[0].nap.remote(60)
            wait_until(lambda: naps(client))
            # Behind it on the same connection.
            return handles()[0].remote(True).result(10)

        assert side.run(nap)
        side.process.send_signal(signal.SIGKILL)
        side.process.wait()
        wait_until(lambda: tunnels_of(near) == before)
        wait_until(lambda: handles()[0].count_cancelled.remote().result(10) == cancelled + 1)


@needs_namespaces
def test_ends(tmp_path):
    """The worker is killed, is replaced, and then the scheduler is killed."""
    processes = Processes(tmp_path)
    try:
        scheduler = processes.scheduler("--preload", "dask_serve.preload")
        worker = processes.worker("--no-nanny")
        with Client(processes.address) as client:
            client.wait_for_workers(1, timeout=20)
            serve.run(Model.bind(), route_prefix=None, client=client, timeout=30)
            side = FarSide(processes.address, tmp_path)

            def nap(client: Client) -> str:
                client.ref = serve.get_app_handle("default").nap.remote(60)
                wait_until(lambda: naps(client))
                return str(client.ref)

            def outcome(client: Client) -> Any:
                since = time.monotonic()
                try:
                    return client.ref.result(20), 0.0
                except RequestError as error:
                    return type(error), time.monotonic() - since

            side.run(nap)
            worker.kill()
            error, took = side.run(outcome)
            assert error is ReplicaLostError
            assert took < 2
            processes.worker("--no-nanny")
            # Waits at the router until the new one is there.
            assert side.run(lambda client: serve.get_app_handle("default").remote(1).result(25)) == 1

            side.run(nap)
            scheduler.kill()
            error, took = side.run(outcome)
            assert issubclass(error, RequestError)
            assert took < 5
            side.end()
    finally:
        processes.end()


# -- in one process


class Recorder(asyncio.Protocol):
    """Notes what a transport tells."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.made = self.lost = 0
        self.full = False
        self.pauses = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.made += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost += 1

    def data_received(self, data: bytes) -> None:
        self.received += data

    def pause_writing(self) -> None:
        self.full = True
        self.pauses += 1

    def resume_writing(self) -> None:
        self.full = False


async def holds(met: Any, timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while not met():
        assert time.monotonic() < deadline, f"not met after {timeout} s"
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def comms() -> AsyncIterator[tuple[Comm, Comm]]:
    """Both ends of a connection of Dask's."""
    accepted: asyncio.Queue[Comm] = asyncio.Queue()
    release = asyncio.Event()

    async def handle(comm: Comm) -> None:
        accepted.put_nowait(comm)
        await release.wait()

    async with listen("tcp://127.0.0.1:0", handle, deserialize=False) as listener:
        ours = await connect(listener.contact_address, deserialize=False)
        theirs = await accepted.get()
        yield ours, theirs
        release.set()
        ours.abort()
        theirs.abort()


class Pair(NamedTuple):
    transport: TunnelTransport
    protocol: Recorder
    pump: Pump
    received: list[bytes]
    task: asyncio.Task[None]

    @property
    def size(self) -> int:
        return sum(map(len, self.received))


@contextlib.asynccontextmanager
async def pair() -> AsyncIterator[Pair]:
    """A transport and its protocol; at the other end a pump, what it received, and its task."""
    async with comms() as (ours, theirs):
        received: list[bytes] = []
        pump = Pump(theirs, WINDOW, received.append, lambda full: None)
        task = asyncio.ensure_future(pump.run())
        protocol = Recorder()
        yield Pair(TunnelTransport(ours, WINDOW, protocol), protocol, pump, received, task)
        pump.abort()
        await task
        await holds(lambda: protocol.lost)
        assert protocol.made == protocol.lost == 1


@gen_test()
async def test_a_writer_stops_when_nothing_is_consumed():
    async with pair() as p:
        data = os.urandom(4 * WINDOW)
        p.transport.write(data)
        assert p.protocol.full
        await holds(lambda: p.size == WINDOW)
        # Nothing more may come, however long one waits: the other direction still moves meanwhile.
        for i in range(10):
            p.pump.feed(bytes([i]))
            await holds(lambda i=i: len(p.protocol.received) == i + 1)
        assert p.size == WINDOW
        assert p.transport.get_write_buffer_size() == 3 * WINDOW
        assert p.protocol.full
        consumed: list[bytes] = []
        while sum(map(len, consumed)) < len(data):
            await holds(lambda: len(p.received) > len(consumed))
            consumed.append(p.received[len(consumed)])
            p.pump.consumed(len(consumed[-1]))
        assert b"".join(p.received) == data
        assert not p.protocol.full
        assert p.protocol.pauses == 1


@gen_test()
async def test_small_writes_are_joined_and_stay_in_order():
    async with pair() as p:
        for i in range(1000):
            p.transport.write(bytes([i % 256]) * 3)
        await holds(lambda: p.size == 3000)
        assert b"".join(p.received) == b"".join(bytes([i % 256]) * 3 for i in range(1000))
        assert len(p.received) < 10
        assert not p.protocol.full


@gen_test()
async def test_close_sends_the_rest():
    async with pair() as p:
        p.transport.write(bytes(WINDOW // 2))
        p.transport.close()
        p.transport.close()
        p.transport.write(b"too late")
        assert p.transport.is_closing()
        await asyncio.wait_for(p.task, 5)
        assert p.size == WINDOW // 2
        await holds(lambda: p.protocol.lost)
        p.transport.abort()


@gen_test()
async def test_abort_drops_the_rest():
    async with pair() as p:
        p.transport.write(bytes(8 * WINDOW))
        p.transport.abort()
        p.transport.abort()
        assert not p.protocol.lost  # never from within a call of its own
        await holds(lambda: p.protocol.lost)
        await asyncio.wait_for(p.task, 5)
        assert p.size <= WINDOW


@gen_test()
async def test_a_close_that_nobody_reads_ends_all_the_same(monkeypatch):
    monkeypatch.setattr(pump_module, "LINGER", 0.2)
    async with pair() as p:
        p.transport.write(bytes(2 * WINDOW))
        p.transport.close()
        await holds(lambda: p.protocol.lost)
        assert p.size == WINDOW


@gen_test()
async def test_the_other_end_closes():
    async with pair() as p:
        p.pump.feed(b"last words")
        p.pump.close()
        await asyncio.wait_for(p.task, 5)
        await holds(lambda: p.protocol.lost)
        assert p.protocol.received == b"last words"
        assert p.transport.is_closing()


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ([0, bytes(WINDOW + 1)], "more than its window"),
        ([1, b""], "acknowledged 1 bytes too many"),
        ("rubbish", "ended"),
        ([b"", 3], "ended"),
        (None, "ended"),
    ],
)
def test_a_peer_that_breaks_the_rules_is_cut_off(message, complaint):
    @gen_test()
    async def check() -> None:
        async with comms() as (ours, theirs):
            pump = Pump(theirs, WINDOW, lambda data: None, lambda full: None)
            with captured_logger("dask_serve.wire") as log:
                await ours.write(message)
                await asyncio.wait_for(pump.run(), 5)
            assert complaint in log.getvalue()

    check()


def test_doors_are_known_while_a_worker_of_theirs_lives():
    tunnels = Tunnels(None)
    tunnels.learn("p", "tcp://10.0.0.9:1234", "tcp://10.0.0.1:5")
    tunnels.learn("p", "tcp://10.0.0.9:1234", "tcp://10.0.0.1:6")
    # The host is the worker's, as Dask knows it: a report sends the scheduler to no other.
    assert tunnels._doors["p"][0] == "tcp://10.0.0.1:1234"
    tunnels.forget("tcp://10.0.0.1:5")
    assert "p" in tunnels._doors
    tunnels.forget("tcp://10.0.0.1:6")
    assert not tunnels._doors


@gen_cluster(client=True, nthreads=[("127.0.0.1", 2)])
async def test_only_doors_of_replicas_can_be_reached(c, s, a):
    dig = SchedulerTunnel(c)
    with pytest.raises(ConnectionError, match="makes no tunnels"):
        await dig("p", Recorder())
    await serve.run(Model.bind(), route_prefix=None, client=c)
    protocol = Recorder()
    with pytest.raises(NotThereError, match="it is not there"):
        await dig(s.address, protocol)
    assert not protocol.made
    await dig(ServeProcess.door().process, protocol)
    assert protocol.made
    tunnels = s.plugins["dask-serve"].tunnels
    assert len(tunnels) == 1
    # The door shows strangers out.
    protocol_again = Recorder()
    await dig(ServeProcess.door().process, protocol_again)
    await s.plugins["dask-serve"].tunnels.close()
    await holds(lambda: protocol.lost and protocol_again.lost)
    assert not len(tunnels)
    with pytest.raises(NotThereError):
        await dig(ServeProcess.door().process, Recorder())


@gen_cluster(client=True, nthreads=[("127.0.0.1", 2)])
async def test_the_end_of_the_worker_and_of_the_scheduler(c, s, a):
    await serve.run(Model.bind(), route_prefix=None, client=c)
    tunnels = s.plugins["dask-serve"].tunnels
    first, second = Recorder(), Recorder()
    process = ServeProcess.door().process
    await SchedulerTunnel(c)(process, first)
    await a.close()
    await holds(lambda: first.lost)
    with pytest.raises(NotThereError):
        await SchedulerTunnel(c)(process, second)
    assert not second.made
    assert not len(tunnels)


@gen_cluster(client=True, nthreads=[("127.0.0.1", 2)])
async def test_a_closing_scheduler_ends_its_tunnels(c, s, a):
    await serve.run(Model.bind(), route_prefix=None, client=c)
    protocol = Recorder()
    await SchedulerTunnel(c)(ServeProcess.door().process, protocol)
    since = time.monotonic()
    await s.close()
    assert time.monotonic() - since < 4
    await holds(lambda: protocol.lost)


# -- TLS, and the choice between the ways (a door with TLS has no Unix socket beside it)


def gen_tls_cluster() -> Any:
    """`gen_cluster` with certificates made for the occasion; distributed's own do not come with its package."""
    try:
        import cryptography  # noqa: F401
    except ImportError:  # pragma: no cover
        return pytest.mark.skip(reason="temporary certificates need cryptography")
    return gen_cluster(
        client=True,
        scheduler="tls://127.0.0.1",
        nthreads=[("tls://127.0.0.1", 2)],
        security=Security.temporary(),
    )


@gen_tls_cluster()
async def test_tls_directly(c, s, a):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    assert await handle.remote(1) == 1
    [link] = Session.of(c).fabric(asyncio.get_running_loop())._links.values()
    assert link.door.startswith("tls://")
    assert link._connection.transport.get_extra_info("ssl_object") is not None
    assert not len(s.plugins["dask-serve"].tunnels)


@gen_tls_cluster()
async def test_tls_through_the_scheduler(c, s, a):
    Session.of(c)._ways.note("127.0.0.1", tunnelled=True)
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    tunnels = s.plugins["dask-serve"].tunnels
    data = os.urandom(LARGE)
    assert await handle.remote(data) == data
    assert await asyncio.gather(*[handle.remote(i) for i in range(50)]) == list(range(50))
    assert len(tunnels) == 1
    await c.close()
    await holds(lambda: not len(tunnels))


@contextlib.contextmanager
def black_hole() -> Iterator[str]:
    """The address of a port that answers nobody: its queue of callers is full."""
    with socket.socket() as server, contextlib.ExitStack() as fillers:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(2):
            filler = fillers.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(server.getsockname())
        yield f"tls://127.0.0.1:{server.getsockname()[1]}"


@contextlib.contextmanager
def silent_door() -> Iterator[str]:
    """The address of a port where everything is accepted and nothing is answered."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"tls://127.0.0.1:{server.getsockname()[1]}"


@contextlib.contextmanager
def closed_door() -> Iterator[str]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield f"tls://127.0.0.1:{sock.getsockname()[1]}"


class Caller:
    """Reaches doors as a link does, and measures how long it takes."""

    def __init__(self, client: Client, secret: bytes) -> None:
        self.secret = secret
        self.ssl = client.security.get_connection_args("client")["ssl_context"]
        self.ways = Ways(SchedulerTunnel(client))
        self.connections: list[CallerConnection] = []
        self.lost: list[CallerConnection] = []

    async def reach(self, process: str, door: str) -> tuple[CallerConnection, float]:
        def make(on_ready: Any, on_lost: Any) -> CallerConnection:
            made = CallerConnection(self.secret, process, self.on_frame, on_ready, on_lost)
            self.connections.append(made)
            return made

        since = time.monotonic()
        found = await reach(process, door, self.ssl, self.ways, make=make, on_lost=self.lost.append)
        return found, time.monotonic() - since

    def on_frame(self, connection: CallerConnection, frame: Frame) -> None:
        connection.pongs = frame.kind == Kind.PONG


@gen_tls_cluster()
async def test_which_way(c, s, a):
    await serve.run(Model.bind(), route_prefix=None, client=c)
    door = ServeProcess.door()
    tunnels = s.plugins["dask-serve"].tunnels
    caller = Caller(c, door._secret)

    async def answers(connection: CallerConnection) -> bool:
        connection.pongs = False
        connection.send(Kind.PING, 1, b"")
        await holds(lambda: connection.pongs)
        return True

    # Directly, where that works.
    found, took = await caller.reach(door.process, door.address)
    assert await answers(found)
    assert not len(tunnels)
    assert took < dial.HEAD_START
    assert not caller.ways.needs_tunnel("127.0.0.1")

    for closed, least, most in (
        (closed_door, 0.0, dial.HEAD_START),
        (black_hole, dial.HEAD_START, dial.CONNECT),
        (silent_door, dial.HEAD_START, dial.CONNECT + dial.PATIENCE),
    ):
        with closed() as address:
            caller = Caller(c, door._secret)
            found, took = await caller.reach(door.process, address)
            assert await answers(found)
            assert len(tunnels) == 1
            assert least <= took < most
            # The next one knows.
            again, took = await caller.reach(door.process, address)
            assert await answers(again)
            assert took < dial.HEAD_START
            # What is not there is not there, at once.
            with pytest.raises(NotThereError):
                await caller.reach("nobody", address)
            found.abort()
            again.abort()
            assert caller.lost == [found, again]
            # The loser is closed.
            made = caller.connections
            await holds(lambda made=made: all(one.closed or one.transport is None for one in made))
            await holds(lambda: not len(tunnels))

    # Neither way leads anywhere.
    caller = Caller(c, door._secret)
    with black_hole() as address, pytest.raises(ConnectionError, match="through the scheduler"):
        await caller.reach("nobody", address)
    assert not caller.ways.needs_tunnel("127.0.0.1")


@gen_tls_cluster()
async def test_the_direct_way_is_tried_again(c, s, a, monkeypatch):
    await serve.run(Model.bind(), route_prefix=None, client=c)
    door = ServeProcess.door()
    caller = Caller(c, door._secret)
    monkeypatch.setattr(dial, "TUNNEL_FOR", 0.0)
    caller.ways.note("127.0.0.1", tunnelled=True)
    await caller.reach(door.process, door.address)
    assert not len(s.plugins["dask-serve"].tunnels)
    monkeypatch.undo()
    caller.ways.note("127.0.0.1", tunnelled=True)
    await caller.reach(door.process, door.address)
    assert len(s.plugins["dask-serve"].tunnels) == 1


@gen_cluster(client=True, nthreads=[("127.0.0.1", 2)])
async def test_a_door_that_takes_nothing_stops_the_caller(c, s, a):
    """A port that never reads stands in for a door: the scheduler holds no more than a window for it."""
    await serve.run(Model.bind(), route_prefix=None, client=c)
    tunnels = s.plugins["dask-serve"].tunnels
    with socket.create_server(("127.0.0.1", 0)) as server:
        tunnels.learn("stuck", f"tcp://127.0.0.1:{server.getsockname()[1]}", a.address)
        protocol = Recorder()
        transports: list[TunnelTransport] = []
        protocol.connection_made = transports.append
        await SchedulerTunnel(c)("stuck", protocol)
        [transport] = transports
        total = 64 << 20
        transport.write(bytes(total))
        [end] = tunnels._ends
        await holds(lambda: end._paused and transport._pump._room == 0)
        assert protocol.full
        # What the system's buffers took is acknowledged, and a window more is under way.
        assert transport.get_write_buffer_size() > total // 2
        assert end._transport.get_write_buffer_size() <= tunnel.WINDOW + HIGH_WATER
        transport.abort()
        await holds(lambda: not len(tunnels))
