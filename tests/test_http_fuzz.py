"""A raw socket that sends what no client should, cut and delayed anywhere: the next good request is answered.

The application behind the connection is one of the test's own, which reads whole bodies and tells what it got; what is
put to the test is the protocol, and nothing behind it.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dask_serve.config import HTTPOptions
from dask_serve.proxy.protocol import limited
from dask_serve.proxy.server import ProxyServer, make_config

#: Small limits, so that it takes little to exceed them.
OPTIONS = HTTPOptions(
    head_limit=2048,
    max_headers=20,
    head_timeout_s=0.2,
    body_timeout_s=0.2,
    keep_alive_timeout_s=0.2,
    max_connections=64,
)
#: Whatever happens, a connection is answered or closed within this many seconds.
PATIENCE = 5.0
GOOD = b"POST /good HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\ngood"
CHUNKED = b"POST /chunked HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"


async def app(scope, receive, send):
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body += message["body"]
        more = message["more_body"]
    answer = json.dumps([scope["method"], scope["path"], body.decode("latin-1")]).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


class Server:
    """Runs in a thread with a loop of its own."""

    def __init__(self) -> None:
        self.errors: list[dict] = []
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self._thread.start()
        assert self._started.wait(10)

    async def _main(self) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: self.errors.append(context))
        sock = socket.create_server(("127.0.0.1", 0))
        self.port = sock.getsockname()[1]
        config = make_config(app, protocol=limited(OPTIONS), lifespan="off", keep_alive=OPTIONS.keep_alive_timeout_s)
        self.server = ProxyServer(config, drain_timeout=1, on_started=self._started.set)
        await self.server.serve(sockets=[sock])

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(10)

    def connect(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def exchange(self, *pieces: bytes, pause: float = 0.0) -> bytes:
        """Send pieces on one connection and return all that comes back until it closes; it must close."""
        with self.connect() as sock:
            try:
                for piece in pieces:
                    sock.sendall(piece)
                    if pause:
                        time.sleep(pause)
            except (BrokenPipeError, ConnectionResetError):
                pass  # it had enough
            return read_all(sock)

    def is_well(self) -> None:
        """Check that a good request on a new connection is answered, and that nothing went wrong inside."""
        with self.connect() as sock:
            sock.sendall(GOOD)
            answers = parse(read_one(sock))
        assert answers == [(200, ["POST", "/good", "good"])]
        assert self.errors == []


def read_all(sock: socket.socket) -> bytes:
    data = b""
    try:
        while piece := sock.recv(65536):
            data += piece
    except ConnectionResetError:
        pass
    return data


def read_one(sock: socket.socket) -> bytes:
    """Read one answer with a body, and no more."""
    with sock.makefile("rb") as file:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line = file.readline()
            assert line, head
            head += line
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length: "))
        return head + file.read(int(length.split()[1]))


def parse(data: bytes) -> list[tuple[int, object]]:
    """Split what a server sent into answers; anything else in it is a failure."""
    assert b"Traceback" not in data
    answers = []
    while data:
        head, separator, rest = data.partition(b"\r\n\r\n")
        assert separator, data
        status, *lines = head.decode("ascii").split("\r\n")
        version, code, *_ = status.split(" ")
        assert version == "HTTP/1.1", data
        if code == "100":
            data = rest
            continue
        headers = dict(line.lower().split(": ", 1) for line in lines)
        length = int(headers["content-length"])
        assert len(rest) >= length, data
        body, data = json.loads(rest[:length]), rest[length:]
        if code != "200":
            assert set(body) == {"type", "message", "request_id"}
            assert headers["x-request-id"] == body["request_id"]
            assert headers["connection"] == "close"
            assert not data
        answers.append((int(code), body))
    return answers


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


def quickly(examples: int):
    return settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("request_", [GOOD, CHUNKED], ids=["length", "chunked"])
def test_cut_at_every_byte_and_ended(server, request_):
    """The client goes away, or only stops to send, after each byte."""
    for cut in range(len(request_)):
        with server.connect() as sock:
            sock.sendall(request_[:cut])
            if cut % 2:
                sock.shutdown(socket.SHUT_WR)
                assert {status for status, _ in parse(read_all(sock))} <= {400, 408}
    server.is_well()


@pytest.mark.parametrize("request_", [GOOD, CHUNKED], ids=["length", "chunked"])
def test_cut_at_every_byte_and_silent(server, request_):
    """Nobody waits for ever for the rest: each connection is answered with 408, or closed, by itself."""
    for begin in range(0, len(request_), 40):  # not more at a time than there may be connections
        sockets = []
        for cut in range(begin, min(begin + 40, len(request_))):
            sock = server.connect()
            sock.sendall(request_[:cut])
            sockets.append((cut, sock))
        for cut, sock in sockets:
            with sock:
                answers = parse(read_all(sock))
            assert [status for status, _ in answers] == ([408] if cut else []), cut
    server.is_well()


@pytest.mark.parametrize("request_", [GOOD, CHUNKED], ids=["length", "chunked"])
def test_in_two_pieces_at_every_byte(server, request_):
    expected = {GOOD: ["POST", "/good", "good"], CHUNKED: ["POST", "/chunked", "abcde"]}[request_]
    for cut in range(1, len(request_)):
        with server.connect() as sock:
            sock.sendall(request_[:cut])
            time.sleep(0.001)
            sock.sendall(request_[cut:])
            assert parse(read_one(sock)) == [(200, expected)], cut
    server.is_well()


@quickly(30)
@given(data=st.data())
def test_pipelined_requests_in_any_pieces(server, data):
    count = data.draw(st.integers(1, 8))
    requests = [data.draw(st.sampled_from([GOOD, CHUNKED])) for _ in range(count)]
    stream = b"".join(requests)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(stream) - 1), max_size=6)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    answers = parse(server.exchange(*pieces, pause=0.001))
    assert [status for status, _ in answers] == [200] * count
    assert [body[1] for _, body in answers] == ["/good" if one is GOOD else "/chunked" for one in requests]
    server.is_well()


@quickly(150)
@given(garbage=st.binary(min_size=1, max_size=300), behind_good=st.booleans())
def test_garbage(server, garbage, behind_good):
    answers = parse(server.exchange(GOOD * behind_good + garbage))
    if behind_good:
        assert answers[0] == (200, ["POST", "/good", "good"])
    server.is_well()


@quickly(100)
@given(
    position=st.integers(0, len(GOOD) - 1),
    byte=st.integers(0, 255),
    request_=st.sampled_from([GOOD, CHUNKED]),
)
def test_one_byte_changed(server, position, byte, request_):
    changed = request_[:position] + bytes([byte]) + request_[position + 1 :]
    parse(server.exchange(changed + GOOD))
    server.is_well()


CHUNKS = [
    b"g\r\nabc\r\n0\r\n\r\n",
    b"-1\r\nabc\r\n0\r\n\r\n",
    b"3;\x00\r\nabc\r\n0\r\n\r\n",
    b"3\r\nabcd\r\n0\r\n\r\n",
    b"ffffffffffffffffff\r\nabc",
    b"0x3\r\nabc\r\n0\r\n\r\n",
    b"\r\n\r\n",
    b" 3\r\nabc\r\n0\r\n\r\n",
]


@pytest.mark.parametrize("chunks", CHUNKS)
def test_bad_chunks(server, chunks):
    head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    for pause in (0.0, 0.02):
        answers = parse(server.exchange(head, chunks, pause=pause))
        assert [status for status, _ in answers] == [400], chunks
    server.is_well()


@pytest.mark.parametrize("trailer", [b"X-Sum: 1\r\n", b"A: b\r\nC: d\r\n"])
def test_trailers_are_ignored(server, trailer):
    body = b"3\r\nabc\r\n0\r\n" + trailer + b"\r\n"
    head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    answers = parse(server.exchange(head + body + GOOD))
    assert answers == [(200, ["POST", "/", "abc"]), (200, ["POST", "/good", "good"])]


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 6\r\n",
        b"Content-Length: 6\r\nContent-Length: 7\r\n",
        b"Content-Length: 6, 7\r\n",
        b"Content-Length: -6\r\n",
        b"Content-Length: +6\r\n",
        b"Content-Length: 0x6\r\n",
        b"Content-Length: 99999999999999999999999999\r\n",
        b"Content-Length: \r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
        b"Transfer-Encoding : chunked\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        b" Content-Length: 6\r\n",
        b"Content-Length\x00: 6\r\n",
        b"X: a\rb\r\n",
        b"X: a\x00b\r\n",
    ],
)
def test_smuggling(server, headers):
    """Where two readers could disagree about the end of a request nothing behind it is taken for a second one."""
    smuggled = b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
    answers = parse(server.exchange(b"POST / HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n" + smuggled))
    assert [status for status, _ in answers] == [400], answers
    server.is_well()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /" + b"a" * 4000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 4000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 30 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"a" * 4000, 431),
        (b"G" * 4000, 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"GET \xff HTTP/1.1\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    ],
)
def test_oversized_and_odd(server, request_, status):
    for pieces in ([request_], [request_[i : i + 700] for i in range(0, len(request_), 700)]):
        answers = parse(server.exchange(*pieces, pause=0.001))
        assert [found for found, _ in answers] == [status]
    server.is_well()


def test_an_unknown_upgrade_is_answered_and_the_connection_closed(server):
    upgrade = b"GET /up HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    assert parse(server.exchange(upgrade)) == [(200, ["GET", "/up", ""])]
    server.is_well()


def test_a_body_that_trickles_is_too_slow(server):
    with server.connect() as sock:
        sock.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
        began = time.monotonic()
        sock.settimeout(0.05)
        data = b""
        while not data:
            sock.sendall(b"x")
            try:
                data = sock.recv(65536)
            except TimeoutError:
                assert time.monotonic() - began < PATIENCE
        ((status, body),) = parse(data + read_all(sock))
    assert status == 408
    assert body["type"] == "BodyTooSlow"
    server.is_well()


def test_more_connections_than_may_be(server):
    server.is_well()
    deadline = time.monotonic() + PATIENCE
    while server.server.server_state.connections:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    held = [server.connect() for _ in range(OPTIONS.max_connections)]
    try:
        with server.connect() as sock:
            answers = read_all(sock)
        ((status, body),) = parse(answers)
        assert (status, body["type"]) == (503, "TooManyConnections")
        assert b"retry-after: 1\r\n" in answers
    finally:
        for sock in held:
            sock.close()
    while server.server.server_state.connections:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    server.is_well()


def test_a_flood_of_bad_clients_at_once(server):
    """Good requests between bad ones are answered all the while."""
    stop = threading.Event()
    bad = [GOOD[:30], b"\x00" * 100, CHUNKED[:-8] + b"zz\r\n", b"GET / HTTP/1.1\r\n" + b"x" * 5000]

    def flood(number: int) -> None:
        while not stop.is_set():
            server.exchange(bad[number % len(bad)])

    threads = [threading.Thread(target=flood, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(100):
            server.is_well()
    finally:
        stop.set()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
