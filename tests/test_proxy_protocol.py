"""One connection of a proxy: limits of the head, disconnects, draining; and the frames of the lifeline."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_serve.proxy import complaints
from dask_serve.proxy import lifeline as wire
from dask_serve.proxy.protocol import CONNECTION, ProxyProtocol
from dask_serve.proxy.server import ProxyServer, make_config

try:
    import uvloop
except ImportError:
    uvloop = None

LOOPS = ["asyncio", pytest.param("uvloop", marks=pytest.mark.skipif(uvloop is None, reason="needs uvloop"))]
GET = b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n"


class QuickProtocol(ProxyProtocol):
    __slots__ = ()
    head_timeout = 0.2


class App:
    """Answers "ok"; on /hold it waits for `release`, on /started it waits with the head of its answer sent."""

    def __init__(self):
        self.release = asyncio.Event()
        self.entered = asyncio.Event()
        self.disconnects = []
        self.connection = None
        self.bodies = []
        self.nodelay = None

    async def __call__(self, scope, receive, send):
        if scope["type"] == "websocket":
            await send({"type": "websocket.accept"})
            self.entered.set()
            while (await receive())["type"] != "websocket.disconnect":
                pass
            return
        path, self.connection = scope["path"], scope[CONNECTION]
        sock = self.connection.transport.get_extra_info("socket")
        self.nodelay = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        self.connection.on_disconnect = lambda: self.disconnects.append(path)
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.bodies.append(body)
        start = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]}
        if path == "/hold":
            self.entered.set()
            await self.release.wait()
        await send(start)
        if path == "/started":
            self.entered.set()
            await self.release.wait()
        await send({"type": "http.response.body", "body": b"ok"})


class Bench:
    """A server of `App` in the running loop, and clients of it."""

    def __init__(self, server, port, app):
        self.server = server
        self.port = port
        self.app = app

    async def connect(self):
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def until(self, condition):
        deadline = time.monotonic() + 5
        while not condition():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def serving(protocol=ProxyProtocol, **options):
    app = App()
    started = asyncio.Event()
    # asyncio sets TCP_NODELAY only where the protocol is named, as it is in the sockets that the controller makes.
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    port = sock.getsockname()[1]
    config = make_config(app, protocol=protocol, lifespan="off")
    server = ProxyServer(config, on_started=started.set, **{"idle_grace": 0.2, "drain_timeout": 5, **options})
    task = asyncio.ensure_future(server.serve(sockets=[sock]))
    await asyncio.wait_for(started.wait(), 5)
    try:
        yield Bench(server, port, app)
    finally:
        app.release.set()
        server.should_exit = True
        await asyncio.wait_for(task, 10)


@pytest.fixture(params=LOOPS)
def run(request):
    def run(main):
        loop = asyncio.new_event_loop() if request.param == "asyncio" else uvloop.new_event_loop()
        asyncio.set_event_loop(loop)
        try:
            return loop.run_until_complete(asyncio.wait_for(main(), 20))
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            asyncio.set_event_loop(None)
            loop.close()

    return run


async def answer(reader):
    """Read one answer: its status, its headers in lower case, its body."""
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).decode().lower()
    status, *lines = head.strip().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    return int(status.split()[1]), headers, await reader.readexactly(int(headers["content-length"]))


# --- Ordinary requests


def test_many_requests_on_one_connection_and_nodelay(run):
    async def main():
        async with serving() as bench:
            reader, writer = await bench.connect()
            for _ in range(5):
                writer.write(GET % b"/")
                status, headers, body = await answer(reader)
                assert (status, body) == (200, b"ok")
                assert "connection" not in headers
            assert bench.app.nodelay
            writer.close()

    run(main)


def test_head_that_comes_byte_by_byte(run):
    async def main():
        async with serving() as bench:
            reader, writer = await bench.connect()
            for _ in range(2):
                for byte in GET % b"/":
                    writer.write(bytes([byte]))
                    await asyncio.sleep(0)
                assert (await answer(reader))[0] == 200
            writer.close()

    run(main)


def test_a_body_does_not_count_as_head(run):
    async def main():
        async with serving() as bench:
            reader, writer = await bench.connect()
            body = b"x" * 300_000
            request = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            # Pipelined, so that heads begin in the middle of a read.
            writer.write(request + request + GET % b"/")
            assert [(await answer(reader))[0] for _ in range(3)] == [200, 200, 200]
            assert [len(body) for body in bench.app.bodies] == [300_000, 300_000, 0]
            writer.close()

    run(main)


# --- Limits of the head


def test_a_complete_head_that_is_too_large(run):
    async def main():
        async with serving() as bench:
            for size, expected in ((60_000, 200), (70_000, 431), (400_000, 431)):
                reader, writer = await bench.connect()
                writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nBig: %s\r\n\r\n" % (b"x" * size))
                assert (await answer(reader))[0] == expected
                if expected == 431:
                    assert await reader.read() == b""
                writer.close()

    run(main)


def test_a_head_without_end(run):
    async def main():
        async with serving() as bench:
            for prefix in (b"GET /", b"GET / HTTP/1.1\r\nBig: "):
                reader, writer = await bench.connect()
                writer.write(prefix + b"x" * 70_000)
                status, headers, _ = await answer(reader)
                assert (status, headers["connection"]) == (431, "close")
                writer.close()

    run(main)


def test_a_second_head_without_end(run):
    async def main():
        async with serving() as bench:
            reader, writer = await bench.connect()
            writer.write(GET % b"/")
            assert (await answer(reader))[0] == 200
            writer.write(b"GET / HTTP/1.1\r\nBig: ")
            with contextlib.suppress(OSError):
                for _ in range(100):
                    writer.write(b"x" * 10_000)
                    await writer.drain()
            assert (await answer(reader))[0] == 431
            writer.close()

    run(main)


def test_too_many_headers(run):
    async def main():
        async with serving() as bench:
            for count, expected in ((127, 200), (128, 431)):
                reader, writer = await bench.connect()
                writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * count + b"\r\n")
                assert (await answer(reader))[0] == expected
                writer.close()

    run(main)


GOOD_HOSTS = [b"x", b"x:80", b"a_b.c-d.example:", b"127.0.0.1:8000", b"[::1]:8000", b"", b"ex%41mple"]
BAD_HOSTS = [b"a b", b"a/b", b"a@b", b"x:port", b"x:80:80", b"::1", b"[::1", b"<x>", b"a,b?", b"\xe4"]


@pytest.mark.parametrize("host", [*GOOD_HOSTS, *BAD_HOSTS])
def test_hosts(run, host):
    expected = 200 if host in GOOD_HOSTS else 400

    async def main():
        async with serving() as bench:
            reader, writer = await bench.connect()
            writer.write(GET % b"/")
            assert (await answer(reader))[0] == 200
            writer.write(b"GET / HTTP/1.1\r\nHost: %s\r\n\r\n" % host)
            status, headers, body = await answer(reader)
            assert status == expected
            if expected == 400:
                assert headers["connection"] == "close"
                assert b"BadRequest" in body
                assert b"Host" in body
                assert await reader.read() == b""
            assert len(bench.app.bodies) == (2 if expected == 200 else 1)
            writer.close()

    run(main)


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"GET / HTTP/1.1\r\n", 400),
        (b"GET / HTTP/1.0\r\n", 200),
        (b"GET / HTTP/1.1\r\nHost: x\r\nHost: x\r\n", 400),
        (b"GET / HTTP/1.0\r\nhost: x\r\nA: b\r\nHOST: y\r\n", 400),
        (b"GET / HTTP/1.1\r\nUpgrade: websocket\r\nConnection: upgrade\r\n", 400),
    ],
)
def test_one_host_header(run, head, expected):
    async def main():
        async with serving() as bench:
            reader, writer = await bench.connect()
            writer.write(head + b"\r\n")
            assert (await answer(reader))[0] == expected
            writer.close()

    run(main)


def test_strangers_do_not_fill_the_log(run, caplog, monkeypatch):
    monkeypatch.setattr(complaints, "INTERVAL", 0.3)
    upgrade = b"Host: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    bad = [
        b"secret nonsense\r\n\r\n",
        b"GET /secret HTTP/1.1\r\n\r\n",
        # Without a key, and with a frame of an unknown kind, and text that is none.
        b"GET / HTTP/1.1\r\n" + upgrade + b"\r\n",
        b"GET / HTTP/1.1\r\n" + upgrade + b"Sec-WebSocket-Key: c2VjcmV0IHNlY3JldCBzZQ==\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + upgrade + b"Sec-WebSocket-Key: c2VjcmV0IHNlY3JldCBzZQ==\r\n\r\n",
    ]
    frames = [b"", b"", b"", b"\x8f\x80\0\0\0\0", b"\x81\x81\0\0\0\0\xff"]

    async def main():
        async with serving() as bench:
            for _ in range(10):
                for head, frame in zip(bad, frames, strict=True):
                    reader, writer = await bench.connect()
                    writer.write(head)
                    await reader.readuntil(b"\r\n\r\n")
                    writer.write(frame)
                    await asyncio.wait_for(reader.read(), 5)
                    writer.close()
            await bench.until(lambda: total() == 30)

    def total():
        return sum(record.args[0] for record in caplog.records if record.name == "dask_serve.proxy")

    began = time.monotonic()
    run(main)
    assert {record.name for record in caplog.records} == {"dask_serve.proxy"}
    assert len(caplog.records) <= 2 + (time.monotonic() - began) / 0.3
    assert "127.0.0.1" in caplog.text
    assert "secret" not in caplog.text


UPGRADE = (
    b"Host: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: c2VjcmV0IHNlY3JldCBzZQ==\r\n"
)


@pytest.mark.parametrize(
    "head",
    [
        b"POST / HTTP/1.1\r\n" + UPGRADE,
        b"POST / HTTP/1.1\r\nContent-Length: 3\r\n" + UPGRADE,
        b"GET / HTTP/1.1\r\nContent-Length: 3\r\n" + UPGRADE,
        b"GET / HTTP/1.1\r\nBig: %s\r\n" % (b"x" * 9000) + UPGRADE,
    ],
)
def test_what_websockets_cannot_read_is_answered(run, head):
    async def main():
        async with serving() as bench:
            reader, writer = await bench.connect()
            writer.write(head + b"\r\nabc")
            status, headers, body = await answer(reader)
            # Some of them websockets answers itself.
            assert status in {400, 405}
            assert headers["connection"] == "close"
            assert b"WebSocket" in body
            assert await reader.read() == b""
            writer.close()
            await bench.until(lambda: not bench.server.server_state.connections)

    run(main)


def test_a_slow_head_gets_408_and_silence_gets_nothing(run):
    async def main():
        async with serving(QuickProtocol) as bench:
            silent, quiet_writer = await bench.connect()
            slow, writer = await bench.connect()
            writer.write(b"GET / HT")
            assert (await answer(slow))[0] == 408
            assert await slow.read() == b""
            assert await asyncio.wait_for(silent.read(), 5) == b""
            again, third = await bench.connect()
            third.write(GET % b"/")
            assert (await answer(again))[0] == 200
            third.write(b"GET / HT")
            assert (await answer(again))[0] == 408
            for each in (quiet_writer, writer, third):
                each.close()

    run(main)


def test_a_slow_head_behind_a_running_request_does_not_spoil_its_answer(run):
    async def main():
        async with serving(QuickProtocol) as bench:
            reader, writer = await bench.connect()
            writer.write(GET % b"/hold" + b"GET / HT")
            await bench.app.entered.wait()
            await bench.until(lambda: not bench.app.connection.cycle.keep_alive)
            bench.app.release.set()
            status, headers, body = await answer(reader)
            assert (status, headers["connection"], body) == (200, "close", b"ok")
            assert await reader.read() == b""
            writer.close()

    run(main)


def test_garbage_gets_400(run):
    async def main():
        async with serving() as bench:
            reader, writer = await bench.connect()
            writer.write(b"\x16\x03\x01 hello\r\n\r\n")
            assert (await answer(reader))[0] == 400
            assert await reader.read() == b""
            writer.close()
            await bench.until(lambda: not bench.server.server_state.connections)

    run(main)


# --- Disconnects


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_that_goes_away_in_a_request(run, how):
    async def main():
        async with serving() as bench:
            _, writer = await bench.connect()
            writer.write(GET % b"/hold")
            await bench.app.entered.wait()
            connection = bench.app.connection
            if how == "close":
                writer.close()
            else:
                writer.transport.abort()
            await bench.until(lambda: bench.app.disconnects)
            assert bench.app.disconnects == ["/hold"]
            assert connection.cycle is None
            bench.app.release.set()

    run(main)


def test_a_client_that_goes_away_between_requests(run):
    async def main():
        async with serving() as bench:
            reader, writer = await bench.connect()
            writer.write(GET % b"/")
            await answer(reader)
            writer.close()
            await bench.until(lambda: not bench.server.server_state.connections)
            assert bench.app.disconnects == []

    run(main)


# --- Draining


def test_draining_tells_requests_in_flight_and_closes_idle_connections(run):
    async def main():
        async with serving() as bench:
            idle, idle_writer = await bench.connect()
            idle_writer.write(GET % b"/")
            await answer(idle)
            busy, busy_writer = await bench.connect()
            busy_writer.write(GET % b"/hold")
            await bench.app.entered.wait()
            bench.server.drain()
            assert await asyncio.wait_for(idle.read(), 5) == b""
            bench.app.release.set()
            status, headers, _ = await answer(busy)
            assert (status, headers["connection"]) == (200, "close")
            assert await busy.read() == b""
            idle_writer.close()
            busy_writer.close()

    run(main)


def test_draining_serves_what_idle_connections_still_send(run):
    async def main():
        async with serving(idle_grace=3) as bench:
            reader, writer = await bench.connect()
            writer.write(GET % b"/")
            await answer(reader)
            bench.server.drain()
            await bench.until(lambda: bench.server.server_state.draining)
            writer.write(GET % b"/")
            status, headers, _ = await answer(reader)
            assert (status, headers["connection"]) == (200, "close")
            writer.close()

    run(main)


def test_draining_keeps_a_connection_whose_answer_had_begun(run):
    async def main():
        async with serving(idle_grace=3) as bench:
            reader, writer = await bench.connect()
            writer.write(GET % b"/started")
            await bench.app.entered.wait()
            bench.server.drain()
            await bench.until(lambda: bench.server.server_state.draining)
            bench.app.release.set()
            _, headers, _ = await answer(reader)
            assert "connection" not in headers
            writer.write(GET % b"/")
            _, headers, _ = await answer(reader)
            assert headers["connection"] == "close"
            writer.close()

    run(main)


def test_requests_that_outlast_the_drain_are_cut_off(run):
    async def main():
        async with serving(drain_timeout=0.2) as bench:
            reader, writer = await bench.connect()
            writer.write(GET % b"/hold")
            await bench.app.entered.wait()
            bench.server.drain()
            with contextlib.suppress(ConnectionError):
                await asyncio.wait_for(reader.read(), 5)
            await bench.until(lambda: not bench.server.server_state.tasks)
            writer.close()

    run(main)


def test_draining_says_service_restart_to_websockets(run):
    websockets = pytest.importorskip("websockets")

    async def main():
        async with serving() as bench, websockets.connect(f"ws://127.0.0.1:{bench.port}/") as client:
            await bench.app.entered.wait()
            bench.server.drain()
            with pytest.raises(websockets.ConnectionClosed):
                await asyncio.wait_for(client.recv(), 5)
            assert client.close_code == 1012

    run(main)


# --- Frames of the lifeline


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([wire.TABLE, wire.STATS, wire.DRAIN]), st.binary(max_size=40)), max_size=5),
    st.integers(1, 9),
)
def test_frames_survive_any_cut(frames, step):
    stream = b"".join(wire.encode(kind, payload) for kind, payload in frames)
    reader = wire.Frames()
    seen = [frame for i in range(0, len(stream), step) for frame in reader.feed(stream[i : i + step])]
    assert seen == frames


def test_an_absurd_length_is_an_error():
    with pytest.raises(ValueError, match="bytes on the lifeline"):
        list(wire.Frames().feed(b"\xff\xff\xff\xffT"))


def test_a_slow_reader_gets_the_latest_table_only(run):
    async def main():
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        lifeline = await wire.connect(ours, lambda kind, payload: None, lambda: None)
        await asyncio.sleep(0)
        last = 200
        for number in range(last + 1):
            lifeline.send_latest(wire.TABLE, b"%d:" % number + b"x" * 100_000)
        reader, seen = wire.Frames(), []
        loop = asyncio.get_running_loop()
        while not seen or seen[-1] != last:
            data = await asyncio.wait_for(loop.sock_recv(theirs, 1 << 20), 5)
            seen += [int(payload.split(b":")[0]) for _, payload in reader.feed(data)]
        assert len(seen) < 20
        assert seen == sorted(seen)
        lifeline.close()
        assert await asyncio.wait_for(loop.sock_recv(theirs, 1), 5) == b""
        theirs.close()

    run(main)
