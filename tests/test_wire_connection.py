from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import pytest

from dask_serve.wire import auth, connection
from dask_serve.wire.connection import CallerConnection, Connection, DoorConnection
from dask_serve.wire.frames import Frame, encode_frame
from dask_serve.wire.loops import new_event_loop
from dask_serve.wire.mailbox import Mailbox
from dask_serve.wire.messages import Call, Hello, Kind, Proof, decode_hello, encode

SECRET = b"the cluster's secret"
LOGGER = "dask_serve.wire"


@contextlib.contextmanager
def runner(make_loop: Callable[[], asyncio.AbstractEventLoop]) -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    """Run coroutines on a loop; an error that only the loop heard of fails the test."""
    loop = make_loop()
    unheard: list[dict] = []
    loop.set_exception_handler(lambda loop, context: unheard.append(context))
    yield lambda coroutine: loop.run_until_complete(asyncio.wait_for(coroutine, 30))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()
    assert not unheard


@pytest.fixture(params=[asyncio.new_event_loop, new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest):
    """Run a coroutine on a loop of each kind."""
    with runner(request.param) as runs:
        yield runs


async def until(condition: Callable[[], Any]) -> None:
    """Wait for a condition; the runner's deadline ends it."""
    while not condition():
        await asyncio.sleep(0.001)


class Door:
    """A listener that sends every CALL back as a RESULT."""

    def __init__(self, process: str = "incarnation", secret: bytes = SECRET, answer: bool = True) -> None:
        self.process = process
        self.secret = secret
        self.frames: list[Frame] = []
        self.lost: list[Connection] = []
        self.connections: list[DoorConnection] = []
        self.answer = answer

    def on_frame(self, peer: DoorConnection, frame: Frame) -> None:
        self.frames.append(frame)
        if self.answer:
            peer.send(Kind.RESULT, frame.request, frame.header, frame.parts)

    def visit(self) -> DoorConnection:
        made = DoorConnection(self.secret, self.process, self.on_frame, self.lost.append)
        self.connections.append(made)
        return made


class Caller:
    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.lost: list[Connection] = []
        self.ready: list[Connection] = []
        self.connection: CallerConnection

    async def dial(self, port: int, secret: bytes = SECRET, process: str = "incarnation") -> CallerConnection:
        self.connection = CallerConnection(
            secret, process, lambda peer, frame: self.frames.append(frame), self.ready.append, self.lost.append
        )
        await asyncio.get_running_loop().create_connection(lambda: self.connection, "127.0.0.1", port)
        return self.connection


@contextlib.asynccontextmanager
async def listening(door: Any) -> AsyncIterator[int]:
    """Listen with a `Door`, or with any protocol factory."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(door.visit if isinstance(door, Door) else door, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for made in getattr(door, "connections", ()):
            made.abort()
        await asyncio.sleep(0.01)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def frame_bytes(kind: int, header: bytes, parts: tuple = (), request: int = 0) -> bytes:
    out: list = []
    encode_frame(kind, request, header, parts, out)
    return b"".join(out)


# -- the handshake


def test_right_secret(run, caplog):
    async def test() -> None:
        door, caller = Door(), Caller()
        async with listening(door) as port:
            peer = await caller.dial(port)
            await until(lambda: caller.ready)
            assert peer.ready
            peer.send(Kind.CALL, 5, b"header", [b"one", b"two"])
            await until(lambda: caller.frames)
            frame = caller.frames[0]
            assert (frame.kind, frame.request, frame.header) == (Kind.RESULT, 5, b"header")
            assert [bytes(part) for part in frame.parts] == [b"one", b"two"]
            peer.close()
            await until(lambda: door.lost and caller.lost)
            assert len(door.lost) == len(caller.lost) == 1
            assert peer.closed

    run(test())
    assert warnings(caplog) == []


def test_sent_before_the_door_has_proved_itself(run):
    """It waits; and a first call larger than a stranger may send comes in one piece with the proof."""

    async def test() -> None:
        door, caller = Door(), Caller()
        async with listening(door) as port:
            made = CallerConnection(
                SECRET,
                "incarnation",
                lambda _, frame: caller.frames.append(frame),
                caller.ready.append,
                caller.lost.append,
            )
            made.send(Kind.CALL, 1, b"first", [b"x" * 20_000])
            made.send(Kind.CALL, 2, b"second", [b"p", b"y" * 200_000])
            await asyncio.get_running_loop().create_connection(lambda: made, "127.0.0.1", port)
            await until(lambda: len(caller.frames) == 2)
            assert [frame.header for frame in caller.frames] == [b"first", b"second"]
            assert bytes(caller.frames[1].parts[1]) == b"y" * 200_000
            made.close()
            await until(lambda: door.lost)

    run(test())


def test_nothing_leaves_for_an_impostor(run, caplog):
    """What waits for the handshake is not shown to a door that does not know the secret."""

    async def test() -> None:
        received = bytearray()

        class Impostor(asyncio.Protocol):
            def connection_made(self, transport) -> None:
                self.transport = transport

            def data_received(self, data: bytes) -> None:
                if not received:
                    hello = Hello([1], auth.new_nonce(), "incarnation", b"\0" * 32)
                    self.transport.write(frame_bytes(Kind.HELLO, encode(hello)))
                received.extend(data)

        caller = Caller()
        async with listening(Impostor) as port:
            peer = await caller.dial(port)
            peer.send(Kind.CALL, 1, b"confidential", [b"confidential"])
            await until(lambda: caller.lost)
            await asyncio.sleep(0.01)
            assert b"confidential" not in received
            assert SECRET not in received
            assert not caller.ready

    run(test())
    (message,) = warnings(caplog)
    assert "does not know the cluster's secret" in message


@pytest.mark.parametrize(
    ("door_args", "dial_args", "why"),
    [
        ({"secret": b"another"}, {}, "does not know the cluster's secret"),
        ({}, {"secret": b"another"}, "does not know the cluster's secret"),
        ({"process": "another"}, {}, "process 'another' answered where incarnation was expected"),
    ],
    ids=["door's secret", "caller's secret", "process"],
)
def test_refused(run, caplog, door_args, dial_args, why):
    async def test() -> None:
        door, caller = Door(**door_args), Caller()
        async with listening(door) as port:
            peer = await caller.dial(port, **dial_args)
            peer.send(Kind.CALL, 1, b"header")
            await until(lambda: door.lost and caller.lost)
            peer.send(Kind.CALL, 2, b"dropped")
        assert not door.frames
        assert not caller.frames
        assert not caller.ready
        assert len(door.lost) == len(caller.lost) == 1

    run(test())
    (message,) = warnings(caplog)
    assert why in message


def test_wrong_version_of_the_caller(run, caplog, monkeypatch):
    async def test() -> None:
        door = Door()
        async with listening(door) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(frame_bytes(Kind.HELLO, encode(Hello([7, 8], auth.new_nonce()))))
            assert await reader.read() == b""
            writer.close()
            await until(lambda: door.lost)
        assert not door.frames

    run(test())
    (message,) = warnings(caplog)
    assert "it speaks versions [7, 8] of the wire, this side [1]" in message


def test_wrong_version_of_the_door(run, caplog):
    class Newer(asyncio.Protocol):
        def connection_made(self, transport) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            theirs = decode_hello(data[19:])
            nonce = auth.new_nonce()
            proof = auth.door_proof(SECRET, theirs.nonce, nonce, "incarnation")
            self.transport.write(frame_bytes(Kind.HELLO, encode(Hello([9], nonce, "incarnation", proof))))

    async def test() -> None:
        caller = Caller()
        async with listening(Newer) as port:
            await caller.dial(port)
            await until(lambda: caller.lost)
        assert not caller.ready

    run(test())
    (message,) = warnings(caplog)
    assert "it speaks versions [9] of the wire, this side [1]" in message


NESTED = b"\x91" * 3000
STRANGERS = {
    "http": b"GET / HTTP/1.1\r\nHost: localhost:8000\r\nAccept: */*\r\n\r\n",
    "tls": bytes.fromhex("16030100f8010000f40303") + b"\x5a" * 240,
    "claim": struct.pack("<QIIHB", 1 << 35, 1, 0, 1, Kind.CALL),
    "too large": frame_bytes(Kind.HELLO, encode(Hello([1], b"n" * 16)) + b"\0" * 5000),
    "call": frame_bytes(
        Kind.CALL, encode(Call("a/d/1", "__call__", "id", None, False)), (b"cos\nsystem\n(S'id'\ntR.",)
    ),
    "proof first": frame_bytes(Kind.PROOF, encode(Proof(b"\0" * 32))),
    "two hellos": frame_bytes(Kind.HELLO, encode(Hello([1], b"n" * 16))) * 2,
    "short nonce": frame_bytes(Kind.HELLO, encode(Hello([1], b"n"))),
    "no header": frame_bytes(Kind.HELLO, b""),
    "not msgpack": frame_bytes(Kind.HELLO, b"\xc1\xff"),
    "wrong types": frame_bytes(Kind.HELLO, encode(["one", 2])),
    "not utf-8": frame_bytes(Kind.HELLO, b"\x94\x91\x01\xc4\x10" + b"n" * 16 + b"\xa2\xff\xfe\xc4\x00"),
    "deep": frame_bytes(Kind.HELLO, b"\x95\x91\x01\xc4\x10" + b"n" * 16 + b"\xa0\xc4\x00" + NESTED + b"\xc0"),
    "wrong proof, then a call": frame_bytes(Kind.HELLO, encode(Hello([1], b"n" * 16)))
    + frame_bytes(Kind.PROOF, encode(Proof(b"\0" * 32)))
    + frame_bytes(Kind.CALL, encode(Call("a/d/1", "__call__", "id", None, False))),
    "header longer than its body": struct.pack("<QIIHB", 4, 0, 12, 0, Kind.HELLO) + b"\0" * 12,
}


@pytest.mark.parametrize("name", STRANGERS)
@pytest.mark.parametrize("in_pieces", [False, True], ids=["whole", "pieces"])
def test_strangers_at_the_door(run, caplog, monkeypatch, name, in_pieces):
    monkeypatch.setattr("pickle.loads", lambda *args, **kwargs: pytest.fail("unpickled"))

    async def test() -> None:
        door = Door()
        async with listening(door) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            data = STRANGERS[name]
            for piece in [data[:7], data[7:25], data[25:]] if in_pieces else [data]:
                writer.write(piece)
                await asyncio.sleep(0.002)
            with contextlib.suppress(ConnectionError):
                await reader.read()
            writer.close()
            await until(lambda: door.lost)
        assert door.frames == []
        assert len(door.lost) == 1

    run(test())
    (message,) = warnings(caplog)
    assert message.startswith("Closed the connection with ('127.0.0.1', ")
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("name", STRANGERS)
def test_garbage_instead_of_a_door(run, caplog, name):
    class Stranger(asyncio.Protocol):
        def connection_made(self, transport) -> None:
            transport.write(STRANGERS[name])

    async def test() -> None:
        caller = Caller()
        async with listening(Stranger) as port:
            peer = await caller.dial(port)
            peer.send(Kind.CALL, 1, b"header")
            await until(lambda: caller.lost)
        assert not caller.frames
        assert not caller.ready
        assert len(caller.lost) == 1

    run(test())
    assert len(warnings(caplog)) == 1


def test_a_proof_cannot_be_replayed(run, caplog):
    """What one caller sent opens no second connection."""

    async def test() -> None:
        door, caller = Door(), Caller()
        recorded = bytearray()
        async with listening(door) as port:
            loop = asyncio.get_running_loop()
            peer = CallerConnection(SECRET, "incarnation", lambda *_: None, caller.ready.append, caller.lost.append)
            transport, _ = await loop.create_connection(lambda: peer, "127.0.0.1", port)
            await until(lambda: peer.ready)
            recorded += frame_bytes(Kind.HELLO, encode(Hello([1], peer._nonce)))
            nonce = door.connections[0]._nonce
            recorded += frame_bytes(Kind.PROOF, encode(Proof(auth.caller_proof(SECRET, peer._nonce, nonce))))
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(bytes(recorded))
            with contextlib.suppress(ConnectionError):
                await reader.read()
            writer.close()
            await until(lambda: len(door.lost) == 1)
            transport.close()
            await until(lambda: len(door.lost) == 2)

    run(test())
    assert len(warnings(caplog)) == 1


def test_silence(run, caplog, monkeypatch):
    monkeypatch.setattr(connection, "HANDSHAKE_TIMEOUT", 0.02)

    async def test() -> None:
        door, caller = Door(), Caller()
        async with listening(door) as port, listening(asyncio.Protocol) as mute:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            await caller.dial(mute)
            await until(lambda: door.lost and caller.lost)
            writer.close()
        assert not caller.ready

    run(test())
    assert len([message for message in warnings(caplog) if "did not prove itself in time" in message]) == 2


def test_the_time_out_is_over_with_the_handshake(run, caplog, monkeypatch):
    monkeypatch.setattr(connection, "HANDSHAKE_TIMEOUT", 0.1)

    async def test() -> None:
        door, caller = Door(), Caller()
        async with listening(door) as port:
            peer = await caller.dial(port)
            await until(lambda: caller.ready)
            await asyncio.sleep(0.15)
            peer.send(Kind.CALL, 1, b"late")
            await until(lambda: caller.frames)
            peer.close()
            await until(lambda: door.lost)

    run(test())
    assert warnings(caplog) == []


# -- behind the handshake


@pytest.mark.parametrize(
    "garbage",
    [
        struct.pack("<QIIHB", (1 << 36) + 1, 1, 0, 1, Kind.CALL),
        struct.pack("<QIIHB", 4, 1, 9, 0, Kind.CALL) + b"abcd",
        frame_bytes(Kind.CALL, b"\xc1"),
        frame_bytes(Kind.CALL, b"\x95\xa2\xff\xfe"),
    ],
    ids=["claim", "header", "not msgpack", "not utf-8"],
)
def test_malformed_frames_close_the_connection(run, caplog, garbage):
    async def test() -> None:
        door, caller = Door(), Caller()
        from dask_serve.wire.messages import decode_call

        handled = []

        def on_frame(peer: DoorConnection, frame: Frame) -> None:
            decode_call(frame.header)
            handled.append(frame)

        door.on_frame = on_frame
        async with listening(door) as port:
            peer = await caller.dial(port)
            await until(lambda: caller.ready)
            good = frame_bytes(Kind.CALL, encode(Call("a/d/1", "__call__", "id", None, False)))
            peer.transport.write(good + garbage + good)
            await until(lambda: door.lost and caller.lost)
        assert len(handled) == 1

    run(test())
    (message,) = warnings(caplog)
    assert message.startswith("Closed the connection with")


def test_a_handler_that_raises_ends_its_connection(run, caplog):
    async def test() -> None:
        door, caller, other = Door(), Caller(), Caller()
        echo = door.on_frame

        def on_frame(peer: DoorConnection, frame: Frame) -> None:
            if frame.header == b"break":
                raise ZeroDivisionError("a defect")
            echo(peer, frame)

        door.on_frame = on_frame
        async with listening(door) as port:
            peer, unharmed = await caller.dial(port), await other.dial(port)
            await until(lambda: caller.ready and other.ready)
            peer.send(Kind.CALL, 1, b"break")
            peer.send(Kind.CALL, 2, b"never handled")
            await until(lambda: door.lost and caller.lost)
            unharmed.send(Kind.CALL, 1, b"fine")
            await until(lambda: other.frames)
            assert [frame.header for frame in door.frames] == [b"fine"]

    run(test())
    assert "ZeroDivisionError: a defect" in caplog.text


class Recorder:
    """Stands in front of a transport and notes its writes."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.writes: list[int] = []

    def write(self, data: Any) -> None:
        self.writes.append(len(data))
        self.transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)


def test_frames_of_one_tick_leave_together(run):
    async def test() -> None:
        door, caller = Door(), Caller()
        async with listening(door) as port:
            peer = await caller.dial(port)
            await until(lambda: caller.ready)
            peer.transport = recorder = Recorder(peer.transport)
            for i in range(4):
                peer.send(Kind.CALL, i, b"header", [b"small"])
            assert recorder.writes == []
            await until(lambda: len(caller.frames) == 4)
            assert len(recorder.writes) == 1
            peer.send(Kind.CALL, 4, b"header", [b"p", b"l" * 100_000, b"s"])
            peer.send(Kind.CALL, 5, b"header", [b"small"])
            await until(lambda: len(caller.frames) == 6)
            assert 100_000 in recorder.writes[1:]
            assert len(recorder.writes) == 4
            assert [frame.request for frame in caller.frames] == list(range(6))
            peer.close()
            await until(lambda: door.lost)

    run(test())


def test_a_slow_reader_stops_the_writer(run):
    """Nothing is lost and nothing overtakes, whatever is sent while it is stopped."""

    async def test() -> None:
        door, caller = Door(answer=False), Caller()
        async with listening(door) as port:
            peer = await caller.dial(port)
            await until(lambda: caller.ready and door.connections[0].ready)
            slow = door.connections[0].transport
            peer.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
            slow.pause_reading()
            number = 0
            while not peer.paused:
                peer.send(Kind.CALL, number, b"%d" % number, [b"p", b"x" * (number % 70_000 + 30_000)])
                number += 1
                await asyncio.sleep(0)
                assert number < 2000
            peer.transport = recorder = Recorder(peer.transport)
            for _ in range(50):
                peer.send(Kind.CALL, number, b"%d" % number, [b"p", b"x" * (number % 70_000)] if number % 3 else [])
                number += 1
                await asyncio.sleep(0)
            assert recorder.writes == []
            assert peer.transport.get_write_buffer_size() < 1 << 20
            slow.resume_reading()
            await until(lambda: len(door.frames) == number)
            assert [int(frame.header) for frame in door.frames] == list(range(number))
            assert not peer.paused
            assert recorder.writes
            peer.send(Kind.CALL, number, b"after")
            await until(lambda: door.frames[-1].header == b"after")
            peer.close()
            await until(lambda: door.lost)

    run(test())


def test_close_writes_what_was_queued(run):
    async def test() -> None:
        door, caller = Door(answer=False), Caller()
        async with listening(door) as port:
            peer = await caller.dial(port)
            await until(lambda: caller.ready and door.connections[0].ready)
            door.connections[0].transport.pause_reading()
            while not peer.paused:
                peer.send(Kind.CALL, 0, b"", [b"x" * 500_000])
                await asyncio.sleep(0)
            peer.send(Kind.CALL, 1, b"last")
            peer.close()
            door.connections[0].transport.resume_reading()
            await until(lambda: door.lost and caller.lost)
            assert door.frames[-1].header == b"last"

    run(test())


def test_abort_drops_what_was_queued(run):
    async def test() -> None:
        door, caller = Door(), Caller()
        async with listening(door) as port:
            peer = await caller.dial(port)
            await until(lambda: caller.ready)
            peer.send(Kind.CALL, 1, b"dropped")
            peer.abort()
            assert caller.lost == [peer]
            peer.abort()
            peer.close()
            peer.send(Kind.CALL, 2, b"dropped")
            await until(lambda: door.lost)
            assert door.frames == []
            assert caller.lost == [peer]

    run(test())


def test_large_payloads_both_ways(run):
    async def test() -> None:
        door, caller = Door(), Caller()
        async with listening(door) as port:
            peer = await caller.dial(port)
            await until(lambda: caller.ready)
            sent = {i: bytes([i]) * (8 << 20) for i in range(4)}
            for i, payload in sent.items():
                peer.send(Kind.CALL, i, b"header", [b"p", payload])
                peer.send(Kind.CALL, 100 + i, b"small")
            await until(lambda: len(caller.frames) == 8)
            received = {frame.request: frame for frame in caller.frames}
            for i, payload in sent.items():
                assert received[i].parts[1] == payload
                assert not memoryview(received[i].parts[1]).readonly
                assert received[100 + i].header == b"small"
            peer.close()
            await until(lambda: door.lost)

    run(test())


def test_answers_from_another_thread(run):
    """Written past the loop only while nothing else waits; whatever the way, every answer comes once and whole."""

    async def test() -> None:
        door, caller = Door(answer=False), Caller()
        async with listening(door) as port:
            peer = await caller.dial(port)
            await until(lambda: caller.ready and door.connections[0].ready)
            theirs = door.connections[0]
            loop = asyncio.get_running_loop()
            direct = []

            def answer(number: int) -> None:
                for i in range(number, number + 200):
                    parts = [b"%d" % i * (i % 97), b"x" * (i % 3) * 1000]
                    frames: list[bytes] = []
                    if theirs.write_from_thread(frames, encode_frame(Kind.RESULT, i, b"header", parts, frames)):
                        direct.append(i)
                    else:
                        loop.call_soon_threadsafe(theirs.send, Kind.RESULT, i, b"header", parts)

            await asyncio.gather(*(loop.run_in_executor(None, answer, start) for start in range(0, 1000, 200)))
            await until(lambda: len(caller.frames) == 1000)
            assert direct
            assert sorted(frame.request for frame in caller.frames) == list(range(1000))
            for frame in caller.frames:
                assert bytes(frame.parts[0]) == b"%d" % frame.request * (frame.request % 97)
            peer.close()
            await until(lambda: door.lost)
            assert theirs.write_from_thread([b"late"], 4) in (True, False)

    run(test())


# -- the way into a loop from other threads


def test_a_mailbox_keeps_order_and_loses_nothing():
    loop = new_event_loop()
    received: list[int] = []
    mailbox = Mailbox(loop, received.append)

    async def test() -> None:
        await loop.run_in_executor(None, lambda: [mailbox.put(i) for i in range(2000)])
        await until(lambda: len(received) == 2000)

    loop.run_until_complete(asyncio.wait_for(test(), 30))
    loop.close()
    assert received == list(range(2000))


def test_what_raises_in_a_mailbox_holds_up_nothing():
    loop = new_event_loop()
    received: list[int] = []
    unheard: list[dict] = []
    loop.set_exception_handler(lambda loop, context: unheard.append(context))

    def handle(item: int) -> None:
        if item == 1:
            raise ZeroDivisionError
        received.append(item)

    mailbox = Mailbox(loop, handle)

    async def test() -> None:
        mailbox.put_all(range(4))
        await until(lambda: len(received) == 3)

    loop.run_until_complete(asyncio.wait_for(test(), 30))
    loop.close()
    assert received == [0, 2, 3]
    assert len(unheard) == 1


def test_a_mailbox_of_a_closed_loop_says_so_each_time():
    loop = new_event_loop()
    loop.close()
    mailbox = Mailbox(loop, print)
    for put in (mailbox.put, mailbox.put, lambda item: mailbox.put_all([item])):
        with pytest.raises(RuntimeError):
            put(1)
