"""The door beside user code that does not let go: of a thread, of its event loop, of the interpreter."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from distributed import Client, LocalCluster
from distributed.utils_test import captured_logger, gen_cluster
from helpers import until, wait_until

import dask_serve as serve
from dask_serve.exceptions import ReplicaLostError
from dask_serve.replica.process import ServeProcess
from dask_serve.routing import fabric as fabric_module
from dask_serve.routing import link as link_module
from dask_serve.routing.dial import split_address
from dask_serve.routing.fabric import Fabric
from dask_serve.routing.link import Link
from dask_serve.routing.router import Router
from dask_serve.routing.session import Session
from dask_serve.routing.state import RefState
from dask_serve.routing.table import DeploymentEntry, ReplicaEntry, Table, decode_table
from dask_serve.wire import connection as wire_connection
from dask_serve.wire import payloads
from dask_serve.wire.connection import CallerConnection
from dask_serve.wire.frames import Frame
from dask_serve.wire.messages import Call, Kind, encode

#: The door answers within this many seconds beside anything that lets go of the interpreter now and then. It takes
#: milliseconds; the rest is for machines that are busy otherwise.
PROMPT = 0.4


@serve.deployment(max_ongoing_requests=1)
class Rude:
    """Whatever it is asked, it takes a second, and lets nobody else."""

    def spin(self, seconds: float) -> str:
        end = time.perf_counter() + seconds
        n = 0
        while time.perf_counter() < end:
            n += 1
        return "spun"

    async def block(self, seconds: float) -> str:
        time.sleep(seconds)
        return "blocked"

    def hold_the_interpreter(self, seconds: float) -> str:
        # PyDLL does not release the interpreter lock around the call.
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))
        return "held"


@serve.deployment
class Polite:
    async def nap(self, seconds: float) -> str:
        await asyncio.sleep(seconds)
        return "rested"

    async def __call__(self, x: Any = None) -> Any:
        return x


@serve.deployment
class Both:
    def __init__(self, rude: Any, polite: Any) -> None:
        self.rude, self.polite = rude, polite

    async def __call__(self) -> str:
        return "both"


@pytest.fixture(scope="class")
def client() -> Iterator[Client]:
    with (
        LocalCluster(n_workers=1, threads_per_worker=4, processes=True, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        serve.run(Both.bind(Rude.bind(), Polite.bind()), route_prefix=None, client=client, timeout=30)
        yield client
        serve.shutdown(client=client)


def table_of(client: Client) -> Table:
    return decode_table(client.sync(client.scheduler.serve_table, timeout=0)["table"])


class Caller:
    """A caller as close to the wire as can be: sends frames, and notes what comes back and when."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.heard: dict[tuple[int, int], tuple[float, Frame]] = {}
        self.news = asyncio.Event()
        self.lost = False
        self._count = 0

    async def __aenter__(self) -> Caller:
        [replica] = self.table.deployments["default/Rude"].replicas
        ready = asyncio.get_running_loop().create_future()
        self.connection = CallerConnection(
            self.table.secret, replica.process, self._on_frame, ready.set_result, self._on_lost
        )
        host, port = split_address(replica.door)
        await asyncio.get_running_loop().create_connection(lambda: self.connection, host, port)
        await asyncio.wait_for(ready, 5)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.connection.abort()

    def _on_frame(self, connection: Any, frame: Frame) -> None:
        self.heard[frame.kind, frame.request] = time.perf_counter(), frame
        self.news.set()

    def _on_lost(self, connection: Any) -> None:
        self.lost = True
        self.news.set()

    def replica(self, deployment: str) -> ReplicaEntry:
        [found] = self.table.deployments[f"default/{deployment}"].replicas
        return found

    def call(self, deployment: str, method: str, *args: Any) -> int:
        self._count += 1
        call = Call(self.replica(deployment).id, method, f"test-{self._count}", None, False, None, [])
        self.connection.send(Kind.CALL, self._count, encode(call), payloads.dumps((args, {})))
        return self._count

    def ping(self) -> int:
        self._count += 1
        self.connection.send(Kind.PING, self._count, b"")
        return self._count

    async def hear(self, kind: int, request: int, timeout: float = 10.0) -> float:
        """Wait for a frame and return how long that took."""
        began = time.perf_counter()
        while (kind, request) not in self.heard:
            assert not self.lost
            self.news.clear()
            left = began + timeout - time.perf_counter()
            assert left > 0, f"heard {list(self.heard)} and not {kind, request}"
            await asyncio.wait_for(self.news.wait(), left)
        return time.perf_counter() - began


class TestBesideRudeCode:
    """One cluster for all of them: closed before other tests look for what is left over."""

    @pytest.mark.parametrize("method", ["spin", "block"])
    def test_pings_refusals_and_cancels_beside_rude_code(self, client, method):
        async def check() -> None:
            async with Caller(table_of(client)) as caller:
                polite = caller.call("Polite", "nap", 60)
                rude = caller.call("Rude", method, 1.5)
                times = [await caller.hear(Kind.PONG, caller.ping()) for _ in range(5)]
                times.append(await caller.hear(Kind.FULL, caller.call("Rude", method, 1.5)))
                caller.connection.send(Kind.CANCEL, polite, b"")
                times.append(await caller.hear(Kind.ERROR, polite))
                times.append(await caller.hear(Kind.RESULT, caller.call("Polite", "__call__", 1)))
                assert (Kind.RESULT, rude) not in caller.heard
                assert max(times) < PROMPT, times
                await caller.hear(Kind.RESULT, rude)

        asyncio.run(check())

    def test_held_interpreter_breaks_nothing(self, client):
        async def check() -> None:
            async with Caller(table_of(client)) as caller:
                polite = caller.call("Polite", "nap", 0.5)
                rude = caller.call("Rude", "hold_the_interpreter", 1.0)
                pings = [caller.ping() for _ in range(3)]
                await caller.hear(Kind.RESULT, rude)
                for ping in pings:
                    await caller.hear(Kind.PONG, ping)
                await caller.hear(Kind.RESULT, polite)
                assert not caller.lost

        asyncio.run(check())

    def test_a_silent_door_gets_no_new_requests_and_comes_back(self, client):
        """The table keeps it, its requests are answered, and the link is used again."""
        rude = serve.get_deployment_handle("Rude", "default", client=client)
        polite = serve.get_deployment_handle("Polite", "default", client=client)
        assert polite.remote(1).result(timeout=5) == 1
        fabric = Session.of(client).engine()[1]
        [link] = fabric._links.values()
        before = table_of(client)
        napping = polite.nap.remote(0.2)
        held = rude.hold_the_interpreter.remote(3.0)
        wait_until(lambda: link.silent)
        waiting = [polite.remote(i) for i in range(3)]
        router = fabric.router("default/Polite")
        wait_until(lambda: router.queued == 3)
        assert held.result(timeout=10) == "held"
        assert napping.result(timeout=10) == "rested"
        assert [ref.result(timeout=10) for ref in waiting] == [0, 1, 2]
        assert not link.silent
        assert [*fabric._links.values()] == [link]
        # The controller has heard of it too, and replaced nothing.
        after = wait_until(lambda: (table := table_of(client)).silent == [] and table)
        assert after.deployments == before.deployments
        assert after.given_up == []


# -- links


def test_a_replica_found_behind_a_silent_door_gets_nothing_before_it_is_back():
    async def check() -> None:
        # Nobody listens there: the link only waits.
        with socket.create_server(("127.0.0.1", 0)) as server:
            link = Link(b"s", "p", f"tcp://127.0.0.1:{server.getsockname()[1]}", None, lambda link: None)
            link.silent = True
            router = Router("a/d")
            entry = ReplicaEntry("a/d/1", "p", link.door, "tcp://w")
            router.apply(DeploymentEntry("a/d", [entry], 10, None, None, []), {"p": link})
            [target] = router._dispatcher.targets.values()
            assert not target.usable
            link._mark(False)
            assert target.usable
            link.close()

    asyncio.run(check())


def test_a_door_that_hangs_for_good_is_given_up_once_the_table_has_lost_it(monkeypatch):
    """Its kernel acknowledges everything, so that the connection stands for ever."""
    monkeypatch.setattr(link_module, "SILENT_AFTER", 0.1)
    monkeypatch.setattr(fabric_module, "CHECK_EVERY", 0.02)
    monkeypatch.setattr(fabric_module, "GIVE_UP_AFTER", 0.1)

    async def check() -> None:
        loop = asyncio.get_running_loop()
        calls: list[Frame] = []
        server = await loop.create_server(
            lambda: wire_connection.DoorConnection(b"s", "p", lambda _, frame: calls.append(frame), lambda _: None),
            "127.0.0.1",
        )
        door = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        entry = DeploymentEntry("a/d", [ReplicaEntry("a/d/1", "p", door, "tcp://w")], 10, None, None, [])
        fabric = Fabric(loop, name="test")
        fabric.apply(Table("e", 1, b"s", {"a/d": entry}, []))
        call = RefState("m", payloads.dumps(((), {})), "id")
        fabric.router("a/d").submit(call, None, None)
        [link] = fabric._links.values()
        while not link.silent or loop.time() - link.silent_since < 0.3:
            await asyncio.sleep(0.01)
        assert not call.done()
        gone = DeploymentEntry("a/d", [], 10, None, None, [])
        fabric.apply(Table("e", 2, b"s", {"a/d": gone}, []))
        await asyncio.wait_for(call.wait(), 5)
        assert isinstance(call.exception, ReplicaLostError)
        await fabric.close()
        server.close()

    asyncio.run(check())


class SlowReader(wire_connection.DoorConnection):
    """Takes what comes in small pieces, as over a slow line."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        # All bytes come by here.
        self._in_place = False

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.ready and not self.closed:
            self.transport.pause_reading()
            self.loop.call_later(0.01, self.transport.resume_reading)


def test_a_door_to_which_a_large_payload_is_still_on_its_way_is_not_silent(monkeypatch):
    """Its answer to a ping has to wait until the payload has gone through."""
    monkeypatch.setattr(link_module, "SILENT_AFTER", 0.3)
    monkeypatch.setattr(fabric_module, "CHECK_EVERY", 0.02)

    async def check() -> None:
        loop = asyncio.get_running_loop()
        frames: list[Frame] = []
        server = await loop.create_server(
            lambda: SlowReader(b"s", "p", lambda _, frame: frames.append(frame), lambda _: None), "127.0.0.1"
        )
        door = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        entry = DeploymentEntry("a/d", [ReplicaEntry("a/d/1", "p", door, "tcp://w")], 10, None, None, [])
        fabric = Fabric(loop, name="test")
        fabric.apply(Table("e", 1, b"s", {"a/d": entry}, []))
        since = loop.time()
        fabric.router("a/d").submit(RefState("m", payloads.dumps(bytes(20_000_000)), "id"), None, None)
        [link] = fabric._links.values()
        while not any(frame.kind == Kind.CALL for frame in frames):
            assert not link.silent
            await asyncio.sleep(0.01)
        # It took long enough for a silent one to be noticed.
        assert loop.time() - since > 2 * link_module.SILENT_AFTER
        await fabric.close()
        server.close()

    asyncio.run(check())


# -- strangers


async def _closed(reader: asyncio.StreamReader) -> bytes:
    try:
        return await asyncio.wait_for(reader.read(), 5)
    except ConnectionResetError:
        return b""


@gen_cluster(client=True, nthreads=[("127.0.0.1", 2)])
async def test_strangers_are_shown_out_and_disturb_nobody(c, s, a):
    wire_connection.HANDSHAKE_TIMEOUT, before = 0.3, wire_connection.HANDSHAKE_TIMEOUT
    try:
        handle = await serve.run(Polite.bind(), route_prefix=None, client=c)
        door = ServeProcess.door()
        host, port = split_address(door.address)
        stop = False
        answered = 0

        async def caller() -> None:
            nonlocal answered
            while not stop:
                assert await handle.remote(answered) is not None
                answered += 1

        callers = [asyncio.ensure_future(caller()) for _ in range(5)]
        with captured_logger("dask_serve.wire", level=logging.WARNING) as log:
            for greeting in (
                b"\x00" * 100,
                b"\xff" * 100,
                b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)),
                b"",
                b"\x05",
            ):
                reader, writer = await asyncio.open_connection(host, port)
                writer.write(greeting)
                assert await _closed(reader) == b""
                writer.close()
        assert len(log.getvalue().splitlines()) == 6, log.getvalue()
        seen = answered
        while answered < seen + 20:
            await asyncio.sleep(0)
        stop = True
        await asyncio.gather(*callers)
        assert len(door.connections) == 1
    finally:
        wire_connection.HANDSHAKE_TIMEOUT = before


@gen_cluster(client=True, nthreads=[("127.0.0.1", 2)])
async def test_a_caller_with_another_secret_is_refused(c, s, a):
    await serve.run(Polite.bind(), route_prefix=None, client=c)
    door = ServeProcess.door()
    lost = asyncio.Event()
    frames: list[Frame] = []
    connection = CallerConnection(
        b"guessed", door.process, lambda _, frame: frames.append(frame), lambda _: None, lambda _: lost.set()
    )
    with captured_logger("dask_serve.wire", level=logging.WARNING) as log:
        await asyncio.get_running_loop().create_connection(lambda: connection, *split_address(door.address))
        await asyncio.wait_for(lost.wait(), 5)
    assert "secret" in log.getvalue()
    assert not frames
    assert not connection.ready


@gen_cluster(client=True, nthreads=[("127.0.0.1", 2)])
async def test_kinds_of_a_later_version_are_ignored_and_wrong_ones_are_not(c, s, a):
    handle = await serve.run(Polite.bind(), route_prefix=None, client=c)
    assert await handle.remote(1) is not None
    door = ServeProcess.door()
    [caller] = door.connections
    [link] = Session.of(c).fabric(asyncio.get_running_loop())._links.values()
    link._connection.send(Kind.LAST + 1, 7, b"what is this", (b"and this",))
    door.loop.call_soon_threadsafe(caller.send, Kind.LAST + 1, 0, b"\x90")
    assert await handle.remote(2) is not None
    assert [*door.connections] == [caller]
    with captured_logger("dask_serve.wire", level=logging.WARNING) as log:
        link._connection.send(Kind.CREDIT, 7, b"")
        await until(lambda: caller not in door.connections)
    assert "does not send frames of kind 12" in log.getvalue()


@gen_cluster(client=True, nthreads=[("127.0.0.1", 2)])
async def test_an_answer_whose_caller_left_does_not_stay(c, s, a):
    """Neither its slot nor a large result."""

    @serve.deployment
    class Large:
        async def __call__(self):
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                return bytes(10_000_000)

    await serve.run(Large.bind(), route_prefix=None, client=c)
    other = await Client(s.address, asynchronous=True, set_as_default=False)
    handle = await serve.get_app_handle("default", client=other)
    ref = handle.remote()
    [unit] = ServeProcess.units_of(a)
    deadline = time.monotonic() + 5
    while not unit.core.admission.running:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    await other.close()
    while unit.core.admission.running or unit.door.connections:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    del ref
