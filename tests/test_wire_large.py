"""Large payloads on their way: received in place, written in pieces, and what interrupts them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import socket
import struct
import sys
import threading
import time
from asyncio.protocols import _feed_data_to_buffered_proto
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import psutil
import pytest
from distributed import Security
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_wire_connection import SECRET, Caller, Door, Recorder, frame_bytes, runner, until, warnings
from test_wire_frames import big_parts, plain

from dask_serve.wire import connection, memory
from dask_serve.wire.connection import CallerConnection, DoorConnection
from dask_serve.wire.frames import Frame, encode_frame
from dask_serve.wire.in_place import InPlace
from dask_serve.wire.local import connect_locally, listen_locally
from dask_serve.wire.loops import new_event_loop
from dask_serve.wire.messages import Kind

MB = 1 << 20
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": new_event_loop}
WAYS = ("unix", "tcp", "tls")


def content(nbytes: int, seed: int = 0) -> bytes:
    """Bytes of which every part tells where it belongs."""
    return random.Random(seed).randbytes(nbytes)


class Pair:
    """A caller and a door on one loop, over a socket of one kind."""

    def __init__(self, way: str) -> None:
        self.way = way
        self.door = Door()
        self.caller = Caller()

    @property
    def peer(self) -> CallerConnection:
        return self.caller.connection

    @property
    def theirs(self) -> DoorConnection:
        return self.door.connections[0]

    @contextlib.asynccontextmanager
    async def connected(self, visit: Callable[[], asyncio.BaseProtocol] | None = None) -> AsyncIterator[Pair]:
        loop = asyncio.get_running_loop()
        listening = dialling = None
        if self.way == "tls":
            security = Security.temporary()
            listening = security.get_listen_args("worker")["ssl_context"]
            dialling = security.get_connection_args("client")["ssl_context"]
        visit = visit or self.door.visit
        if self.way == "unix":
            server = await loop.create_unix_server(visit, sock=listen_locally(f"test-{os.getpid()}-{id(self)}"))
        else:
            server = await loop.create_server(visit, "127.0.0.1", 0, ssl=listening)
        caller = self.caller
        made = caller.connection = CallerConnection(
            SECRET, "incarnation", lambda _, frame: caller.frames.append(frame), caller.ready.append, caller.lost.append
        )
        if self.way == "unix":
            sock = connect_locally(f"test-{os.getpid()}-{id(self)}")
            await loop.create_unix_connection(lambda: made, sock=sock)
        else:
            port = server.sockets[0].getsockname()[1]
            name = "" if dialling else None
            await loop.create_connection(lambda: made, "127.0.0.1", port, ssl=dialling, server_hostname=name)
        try:
            await until(lambda: caller.ready and (not self.door.connections or self.theirs.ready))
            yield self
        finally:
            made.close()
            await until(lambda: made.closed)
            server.close()
            await until(lambda: all(other.closed for other in self.door.connections))


class Case(NamedTuple):
    run: Callable[[Any], Any]
    pair: Pair
    in_place: list[InPlace]
    """What received in place."""


@pytest.fixture(params=[f"{loop} {way}" for loop in LOOPS for way in WAYS])
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    loop, way = request.param.split()
    if way == "unix" and sys.platform != "linux":
        pytest.skip("needs Linux")
    in_place: list[InPlace] = []

    class Noted(InPlace):
        def __init__(self, connection: connection.Connection) -> None:
            super().__init__(connection)
            in_place.append(self)

    monkeypatch.setattr(connection, "InPlace", Noted)
    gc.collect()
    monkeypatch.setattr(memory, "_pool", memory._Pool(memory.IDLE_LIMIT))
    with runner(LOOPS[loop]) as run:
        yield Case(run, Pair(way), in_place)


# -- cut anywhere


class Line(asyncio.Transport):
    """Delivers bytes as transports do, cut as it is told.

    ``stubborn``: all bytes of one read go to the protocol that was there when the read began, as with the TLS of
    Python 3.10.
    """

    def __init__(self, protocol: Any, stubborn: bool) -> None:
        self.socket = socket.socket()
        super().__init__({"socket": self.socket})
        self.protocol = protocol
        self.stubborn = stubborn
        protocol.connection_made(self)

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def get_protocol(self) -> Any:
        return self.protocol

    def write(self, data: Any) -> None:
        pass

    def abort(self) -> None:
        pass

    def deliver(self, data: bytes) -> None:
        while data:
            protocol = self.protocol
            if not isinstance(protocol, asyncio.BufferedProtocol):
                protocol.data_received(data)
                return
            if self.stubborn:
                _feed_data_to_buffered_proto(protocol, data)
                return
            room = protocol.get_buffer(-1)
            size = min(len(room), len(data))
            room[:size] = data[:size]
            protocol.buffer_updated(size)
            data = data[size:]


frames_of_all_sizes = st.lists(
    st.builds(Frame, st.just(3), st.just(7), st.binary(max_size=30), st.one_of(st.just([]), big_parts)), max_size=4
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow])
@given(frames_of_all_sizes, st.booleans(), st.data())
def test_cut_anywhere(sent: list[Frame], stubborn: bool, data: st.DataObject):
    out: list = []
    for frame in sent:
        encode_frame(frame.kind, frame.request, frame.header, frame.parts, out)
    whole = b"".join(out)
    edges = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=10)))
    received: list[Frame] = []

    async def test() -> None:
        made = DoorConnection(SECRET, "incarnation", lambda _, frame: received.append(frame), lambda _: None)
        line = Line(made, stubborn)
        made.ready = True
        made._reader.limit = connection.MAX_BODY
        for begin, end in zip([0, *edges], [*edges, len(whole)], strict=True):
            line.deliver(whole[begin:end])
        assert line.protocol is made
        made.abort()
        line.socket.close()

    with mock.patch.object(connection, "_IN_PLACE_FROM", 1000):
        asyncio.run(test())
    assert [plain(frame) for frame in received] == [plain(frame) for frame in sent]


# -- over real sockets


def test_large_and_small_frames_in_turns(case: Case):
    """Both ways at once, and each frame comes whole, once, and in its order."""
    sizes = [3 * MB, 0, 10, 300_000, 70_000, 8 * MB, 5, 5 * MB + 1, 2 * MB]
    sent = [[b"p", content(size, i), b"odd", content(size // 3, i)] for i, size in enumerate(sizes)]

    async def test() -> None:
        async with case.pair.connected() as pair:
            for _ in range(2):
                pair.caller.frames.clear()
                for i, parts in enumerate(sent):
                    pair.peer.send(Kind.CALL, i, b"%d" % i, parts)
                    pair.peer.send(Kind.CALL, 1000 + i, b"small")
                    if i % 3 == 0:
                        pair.peer.flush()
                await until(lambda: len(pair.caller.frames) == 2 * len(sent))
                order = [request for i in range(len(sent)) for request in (i, 1000 + i)]
                assert [frame.request for frame in pair.caller.frames] == order
                for frame in pair.caller.frames:
                    if frame.request < 1000:
                        assert [bytes(part) for part in frame.parts] == sent[frame.request]
                assert pair.peer.transport.get_protocol() is pair.peer
                assert pair.theirs.transport.get_protocol() is pair.theirs

    case.run(test())
    both = {type(protocol._connection) for protocol in case.in_place}
    assert both == {CallerConnection, DoorConnection}


def test_small_frames_are_never_received_in_place(case: Case):
    async def test() -> None:
        async with case.pair.connected() as pair:
            for i in range(2000):
                pair.peer.send(Kind.CALL, i, b"header", [b"x" * (i % 300)])
            await until(lambda: len(pair.caller.frames) == 2000)

    case.run(test())
    assert not case.in_place


def begin_large_body(pair: Pair) -> None:
    """Send a part of a body to the door."""
    size = 16 * MB
    head = struct.pack("<QIIHB", size, 1, 0, 1, Kind.CALL)
    pair.peer.transport.write(head + content(5 * MB))


@pytest.mark.parametrize("how", ["abort", "close"])
@pytest.mark.parametrize("whose", ["sender", "receiver"])
def test_the_end_in_the_middle_of_a_body(case: Case, caplog: pytest.LogCaptureFixture, how: str, whose: str):
    """It is told once, and the memory of the body is free again."""

    async def test() -> None:
        async with case.pair.connected() as pair:
            begin_large_body(pair)
            theirs = pair.theirs
            await until(lambda: theirs.large is not None and theirs.large.missing < 14 * MB)
            assert isinstance(theirs.transport.get_protocol(), InPlace)
            assert memory.idle_bytes() == 0
            getattr(theirs if whose == "receiver" else pair.peer.transport, how)()
            await until(lambda: pair.door.lost and pair.caller.lost)
            await until(lambda: theirs.large is None)
            assert len(pair.door.lost) == len(pair.caller.lost) == 1
            assert pair.door.frames == []

    case.run(test())
    case.in_place.clear()
    gc.collect()
    assert memory.idle_bytes() == 16 * MB
    assert warnings(caplog) == []


def test_time_of_the_last_byte(case: Case):
    """A large body that comes slowly is no silence."""

    async def test() -> None:
        async with case.pair.connected() as pair:
            begin_large_body(pair)
            theirs = pair.theirs
            await until(lambda: theirs.large is not None and theirs.large.missing == 11 * MB)
            before, theirs.heard = time.monotonic(), 0.0
            pair.peer.transport.write(content(MB))
            await until(lambda: theirs.heard >= before)
            assert theirs.large.missing >= 10 * MB
            pair.peer.abort()

    case.run(test())


def test_garbage_behind_a_large_body(case: Case, caplog: pytest.LogCaptureFixture):
    async def test() -> None:
        async with case.pair.connected() as pair:
            good = frame_bytes(Kind.CALL, b"header", (b"p", content(2 * MB)))
            garbage = struct.pack("<QIIHB", 4, 1, 9, 0, Kind.CALL) + b"abcd"
            pair.peer.transport.write(good + garbage + good)
            await until(lambda: pair.door.lost and pair.caller.lost)
            assert len(pair.door.frames) == 1

    case.run(test())
    (message,) = warnings(caplog)
    assert "claims a body of 4 bytes" in message


def test_a_handler_that_raises_at_a_large_frame(case: Case, caplog: pytest.LogCaptureFixture):
    async def test() -> None:
        def on_frame(peer: DoorConnection, frame: Frame) -> None:
            raise ZeroDivisionError("a defect")

        case.pair.door.on_frame = on_frame
        async with case.pair.connected() as pair:
            pair.peer.send(Kind.CALL, 1, b"", [content(2 * MB)])
            pair.peer.send(Kind.CALL, 2, b"", [content(2 * MB)])
            await until(lambda: pair.door.lost and pair.caller.lost)

    case.run(test())
    assert caplog.text.count("ZeroDivisionError: a defect") == 1


def test_a_slow_reader_of_large_payloads(case: Case):
    """What waits is not copied into the transport, nothing overtakes, and each bit that leaves is noted."""

    async def test() -> None:
        case.pair.door.answer = False
        async with case.pair.connected() as pair:
            peer, slow = pair.peer, pair.theirs.transport
            slow.pause_reading()
            payload = content(20 * MB)
            for i in range(3):
                peer.send(Kind.CALL, i, b"%d" % i, [b"p", payload])
                peer.send(Kind.CALL, 10 + i, b"small")
            await until(lambda: peer.paused)
            if peer._piecewise:
                assert peer.unsent < 4 * MB
            drained = peer.drained
            slow.resume_reading()
            await until(lambda: len(pair.door.frames) == 6)
            assert [frame.request for frame in pair.door.frames] == [0, 10, 1, 11, 2, 12]
            assert all(bytes(frame.parts[1]) == payload for frame in pair.door.frames[::2])
            assert peer.drained > drained
            assert not peer.paused
            assert peer._out == []

    case.run(test())


def test_pieces_where_the_transport_copies(case: Case):
    async def test() -> None:
        async with case.pair.connected() as pair:
            peer = pair.peer
            peer.transport = recorder = Recorder(peer.transport)
            peer.send(Kind.CALL, 1, b"", [b"p", content(5 * MB)])
            await until(lambda: pair.caller.frames)
            copies = isinstance(asyncio.get_running_loop(), asyncio.SelectorEventLoop) and sys.version_info < (3, 12)
            largest = connection._PIECE if copies or case.pair.way == "tls" else 5 * MB
            assert max(recorder.writes) == largest

    case.run(test())


def test_close_writes_all_pieces(case: Case):
    async def test() -> None:
        case.pair.door.answer = False
        async with case.pair.connected() as pair:
            pair.theirs.transport.pause_reading()
            payload = content(20 * MB)
            pair.peer.send(Kind.CALL, 1, b"", [b"p", payload])
            pair.peer.send(Kind.CALL, 2, b"last")
            pair.peer.flush()
            assert pair.peer.paused
            pair.peer.close()
            pair.theirs.transport.resume_reading()
            await until(lambda: pair.door.lost and pair.caller.lost)
            assert [frame.request for frame in pair.door.frames] == [1, 2]
            assert bytes(pair.door.frames[0].parts[1]) == payload

    case.run(test())


def test_lost_with_pieces_that_wait(case: Case, caplog: pytest.LogCaptureFixture):
    async def test() -> None:
        async with case.pair.connected() as pair:
            pair.theirs.transport.pause_reading()
            for i in range(3):
                pair.peer.send(Kind.CALL, i, b"", [b"p", content(20 * MB)])
            await until(lambda: pair.peer.paused)
            pair.theirs.abort()
            await until(lambda: pair.caller.lost)
            assert pair.peer._out == []
            pair.peer.send(Kind.CALL, 9, b"", [b"p", content(20 * MB)])

    case.run(test())
    assert warnings(caplog) == []


def test_answers_from_threads_do_not_overtake_pieces(case: Case):
    """A user's thread writes past the loop only while no part of a large answer waits."""
    if case.pair.way == "tls":
        pytest.skip("with TLS only the loop writes")
    large = 1_000_000
    payload = content(6 * MB)

    async def test() -> None:
        async with case.pair.connected() as pair:
            theirs, loop = pair.theirs, asyncio.get_running_loop()
            stop = threading.Event()
            written = [0]

            def answer() -> None:
                while not stop.is_set():
                    frames: list = []
                    size = encode_frame(Kind.RESULT, written[0], b"header", [b"small" * 50], frames)
                    if theirs.write_from_thread(frames, size):
                        written[0] += 1
                    time.sleep(0.0002)

            job = loop.run_in_executor(None, answer)
            for i in range(large, large + 5):
                theirs.send(Kind.RESULT, i, b"large", [b"p", payload])
                await until(lambda i=i: i in [frame.request for frame in pair.caller.frames])
                some = written[0] + 5
                await until(lambda some=some: written[0] > some)
            stop.set()
            await job
            await until(lambda: len(pair.caller.frames) == written[0] + 5)
            numbers = [frame.request for frame in pair.caller.frames]
            assert [number for number in numbers if number < large] == list(range(written[0]))
            assert all(bytes(frame.parts[1]) == payload for frame in pair.caller.frames if frame.request >= large)

    case.run(test())


def test_a_thousand_large_calls_leave_nothing(case: Case):
    process = psutil.Process()

    async def test() -> None:
        async with case.pair.connected() as pair:
            payload, held = content(MB), 0
            for i in range(1000):
                parts = [b"p", memory.copied(payload)]
                pair.peer.send(Kind.CALL, i, b"", parts)
                del parts
                await until(lambda: pair.caller.frames)
                assert bytes(pair.caller.frames.pop().parts[1]) == payload
                pair.door.frames.clear()
                if i == 100:
                    held = process.memory_info().rss
            assert process.memory_info().rss < held + 20 * MB

    case.run(test())
    case.in_place.clear()
    gc.collect()
    # One that leaves, one that the door has, one that comes back.
    assert memory.idle_bytes() < 5 * MB
