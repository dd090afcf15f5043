"""Request bodies that stream from the client's socket to user code: one service of real processes for the module."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from distributed import Client
from helpers import embedded_client, http_client
from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse

import dask_serve as serve

MEGABYTE = 2**20
LIMIT = 3 * 2**30


def marker(request: Request, word: str) -> None:
    """Leave a line in the file that the test named."""
    if path := request.headers.get("x-marker"):
        with Path(path).open("a") as file:
            file.write(word + "\n")


class Uploads:
    """One method for each path below the prefix."""

    async def __call__(self, request: Request) -> Any:
        return await getattr(self, f"on_{request.url.path.rpartition('/')[2]}")(request)

    async def on_count(self, request):
        size = pieces = 0
        digest = hashlib.sha256()
        async for chunk in request.stream():
            size += len(chunk)
            pieces += 1
            if "digest" in request.query_params:
                digest.update(chunk)
        return {"size": size, "pieces": pieces, "digest": digest.hexdigest(), "pid": os.getpid()}

    async def on_body(self, request):
        return {"size": len(await request.body()), "digest": hashlib.sha256(await request.body()).hexdigest()}

    async def on_json(self, request):
        return {"items": len(await request.json())}

    async def on_headers(self, request):
        await request.body()
        return {name: value for name, value in request.headers.items() if name.startswith("x-")}

    async def on_first(self, request):
        """Answer after the first piece, or none."""
        if "read" in request.query_params:
            async for chunk in request.stream():
                if chunk:
                    break
        marker(request, "answered")
        return "enough"

    async def on_refuse(self, request):
        from starlette.exceptions import HTTPException

        raise HTTPException(422, "not wanted")

    async def on_stall(self, request):
        """Read a piece, then nothing for long."""
        try:
            async for chunk in request.stream():
                if chunk:
                    break
            marker(request, f"began {os.getpid()}")
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            marker(request, "cancelled")
            raise

    async def on_wait(self, request):
        """Read until the client goes away; or hold the loop meanwhile, and read on."""
        marker(request, "began")
        try:
            async for _ in request.stream():
                time.sleep(float(request.query_params.get("hold", 0)))
        except asyncio.CancelledError:
            marker(request, "cancelled")
            raise
        except ClientDisconnect:
            marker(request, "disconnected")
            raise
        return "whole"

    async def on_echo(self, request):
        """Both ways at once."""
        return StreamingResponse(request.stream(), media_type="application/octet-stream")

    async def on_late(self, request):
        """Read the body, and then take as long as the request says."""
        await request.body()
        await asyncio.sleep(float(request.query_params["s"]))
        return {"deadline": serve.get_request_context().deadline is not None}


class One:
    """Takes one request at a time."""

    async def __call__(self, request: Request) -> Any:
        marker(request, "began")
        await asyncio.sleep(float(request.query_params.get("s", 0)))
        return {"size": len(await request.body())}


class Raw:
    """An ASGI application as a deployment."""

    async def __call__(self, scope, receive, send):
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size += len(message["body"])
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"%d" % size})


class Last:
    """The end of a chain of handles."""

    async def items(self, path: str):
        try:
            for number in range(1000):
                yield number
                await asyncio.sleep(0.02)
        finally:
            with Path(path).open("a") as file:
                file.write("last ended\n")

    async def hold(self, path: str) -> None:
        try:
            with Path(path).open("a") as file:
                file.write("last began\n")
            await asyncio.sleep(60)
        finally:
            with Path(path).open("a") as file:
                file.write("last ended\n")


class Middle:
    def __init__(self, last: Any) -> None:
        self.last = last

    async def items(self, path: str):
        try:
            async for number in self.last.options(stream=True).items.remote(path):
                yield number
        finally:
            with Path(path).open("a") as file:
                file.write("middle ended\n")

    async def hold(self, path: str) -> None:
        try:
            await self.last.hold.remote(path)
        finally:
            with Path(path).open("a") as file:
                file.write("middle ended\n")


class First:
    def __init__(self, middle: Any) -> None:
        self.middle = middle

    async def __call__(self, request: Request) -> Any:
        path = request.headers["x-marker"]
        if "stream" in request.query_params:
            return self.stream(path)
        await self.middle.hold.remote(path)
        return "held"

    async def stream(self, path: str):
        async for number in self.middle.options(stream=True).items.remote(path):
            yield f"{number}\n"


# -- the service ---------------------------------------------------------------------------------------------


class Service:
    def __init__(self, url: str, client: Client) -> None:
        self.url = url
        self.client = client

    def http(self, **options: Any) -> httpx.Client:
        return http_client(self.url, **{"timeout": 60, **options})

    def deploy(self, target: Any, name: str, **options: Any) -> None:
        declared = serve.deployment(**options)(target) if options else serve.deployment(target)
        serve.run(declared.bind(), name=name, route_prefix=f"/{name}", client=self.client)

    def connect(self) -> socket.socket:
        url = httpx.URL(self.url)
        return socket.create_connection((url.host, url.port), timeout=20)

    def proxies(self) -> list[psutil.Process]:
        """Processes of proxies among all that this session started."""
        below = psutil.Process().children(recursive=True)
        return [process for process in below if "dask_serve.proxy" in " ".join(process.cmdline())]


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with embedded_client(2, 1) as client:
        url = serve.start(port=0, body_limit=LIMIT, client=client)
        service = Service(url, client)
        service.deploy(Uploads, "up")
        service.deploy(One, "one", max_ongoing_requests=1)
        service.deploy(Raw, "raw")
        chain = serve.deployment(First).bind(serve.deployment(Middle).bind(serve.deployment(Last).bind()))
        serve.run(chain, name="chain", route_prefix="/chain", client=client)
        yield service


@pytest.fixture
def http(service: Service) -> Iterator[httpx.Client]:
    with service.http() as client:
        yield client


def pieces(total: int, size: int = 256 * 1024) -> Iterator[bytes]:
    piece = os.urandom(size)
    for _ in range(total // size):
        yield piece
    if total % size:
        yield piece[: total % size]


def head(path: str, *headers: str, method: str = "POST") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "host: x", *headers, "", ""]).encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def read_answer(sock: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Read one answer that has a length."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = sock.recv(65536)
        if not more:
            raise AssertionError(f"the connection closed after {data!r}")
        data += more
    top, _, body = data.partition(b"\r\n\r\n")
    lines = top.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
    while len(body) < int(headers.get("content-length", 0)):
        body += sock.recv(65536)
    return int(lines[0].split()[1]), headers, body


def is_closed(sock: socket.socket) -> bool:
    sock.settimeout(10)
    try:
        return sock.recv(1) == b""
    except ConnectionError:
        return True


# -- bodies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, 300_000, 5 * MEGABYTE])
@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_of_any_size_and_framing_arrive_as_they_were_sent(http, size, chunked):
    body = os.urandom(size)
    content = iter([body[at : at + 100_000] for at in range(0, size, 100_000)]) if chunked else body
    answer = http.post("/up/body", content=content)
    assert answer.json() == {"size": size, "digest": hashlib.sha256(body).hexdigest()}


def test_a_large_json_body_is_parsed(http):
    assert http.post("/up/json", json=list(range(200_000))).json() == {"items": 200_000}


def test_user_code_reads_a_body_while_it_still_comes(service, mark):
    with service.connect() as sock:
        sock.sendall(head("/up/stall", "transfer-encoding: chunked", f"x-marker: {mark()['x-marker']}"))
        sock.sendall(chunk(b"first"))
        mark("began")


def test_an_asgi_application_receives_the_pieces(http):
    assert http.post("/raw", content=pieces(3 * MEGABYTE)).text == str(3 * MEGABYTE)


def test_both_ways_at_once(http):
    """What was read goes out before the rest has come."""
    total = 4 * MEGABYTE
    with http.stream("POST", "/up/echo", content=pieces(total)) as answer:
        assert sum(len(part) for part in answer.iter_bytes()) == total


def memory(processes: list[psutil.Process]) -> dict[int, int]:
    return {process.pid: process.memory_info().rss for process in processes}


def upload_and_measure(service: Service, total: int) -> None:
    """Upload so many bytes, which user code reads piece by piece; no process may grow by more than 32 MiB."""
    with service.http() as http:
        pid = http.post("/up/count", content=pieces(20 * MEGABYTE)).json()["pid"]
        watched = [*service.proxies(), psutil.Process(pid)]
        assert len(watched) == 2
        before, most = memory(watched), memory(watched)

        def content() -> Iterator[bytes]:
            for number, piece in enumerate(pieces(total)):
                if number % 32 == 0:
                    for process, size in memory(watched).items():
                        most[process] = max(most[process], size)
                yield piece

        began = time.monotonic()
        answer = http.post("/up/count", content=content(), headers={"content-length": str(total)}).json()
        seconds = time.monotonic() - began
    assert answer["size"] == total
    growth = {process: (most[process] - before[process]) / MEGABYTE for process in most}
    speed = total / MEGABYTE / seconds
    print(f"{total / MEGABYTE:.0f} MiB in {seconds:.2f} s, {speed:.0f} MiB/s; grew by MiB: {growth}")
    assert all(value < 32 for value in growth.values()), growth


def test_200_megabytes_never_lie_in_memory(service):
    upload_and_measure(service, 200 * MEGABYTE)


@pytest.mark.slow
def test_2_gigabytes_never_lie_in_memory(service):
    upload_and_measure(service, 2 * 2**30)


def test_user_code_that_does_not_read_holds_up_the_client(service, mark):
    with service.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        sock.sendall(head("/up/stall", f"content-length: {200 * MEGABYTE}", f"x-marker: {mark()['x-marker']}"))
        sent = sock.send(bytes(65536))
        mark("began")
        sock.settimeout(1.0)
        with contextlib.suppress(TimeoutError):
            while sent < 200 * MEGABYTE:
                sent += sock.send(bytes(65536))
    # The window, what uvicorn and the kernel hold on both ends.
    assert sent < 16 * MEGABYTE


# -- answers before the body ---------------------------------------------------------------------------------


@pytest.mark.parametrize("read", ["", "?read"])
def test_an_early_answer_reaches_a_client_that_still_sends(service, mark, read):
    with service.connect() as sock:
        sock.sendall(head(f"/up/first{read}", f"content-length: {64 * MEGABYTE}", f"x-marker: {mark()['x-marker']}"))
        sock.sendall(bytes(100_000))
        mark("answered")
        with contextlib.suppress(ConnectionError):
            for _ in range(32):
                sock.sendall(bytes(MEGABYTE // 8))
        status, headers, body = read_answer(sock)
        assert (status, body, headers["connection"]) == (200, b"enough", "close")
        assert is_closed(sock)


def test_an_early_answer_leaves_the_connection_open_when_little_is_to_come(service):
    with service.connect() as sock:
        sock.sendall(head("/up/refuse", "content-length: 200000") + bytes(100_000))
        assert read_answer(sock)[0] == 422
        sock.sendall(bytes(100_000) + head("/up/count", "content-length: 3") + b"abc")
        status, _, body = read_answer(sock)
        assert status == 200
        assert b'"size":3' in body


def test_an_unknown_path_is_answered_without_its_body(service):
    with service.connect() as sock:
        sock.sendall(head("/nowhere", f"content-length: {64 * MEGABYTE}"))
        status, headers, _ = read_answer(sock)
        assert (status, headers["connection"]) == (404, "close")


# -- clients and replicas that go away -----------------------------------------------------------------------


@pytest.mark.parametrize("query", ["", "?hold=0.3"])
def test_a_client_that_goes_away_within_its_upload_cancels_the_request(service, mark, query):
    with service.connect() as sock:
        sock.sendall(head(f"/up/wait{query}", f"content-length: {MEGABYTE}", f"x-marker: {mark()['x-marker']}"))
        sock.sendall(bytes(70_000))
        mark("began")
    mark("cancelled")


def test_a_replica_that_dies_within_an_upload_is_a_502(service, mark):
    service.deploy(Uploads, "victim")
    with service.connect() as sock:
        sock.sendall(head("/victim/stall", f"content-length: {MEGABYTE}", f"x-marker: {mark()['x-marker']}"))
        sock.sendall(bytes(70_000))
        pid = int(mark("began").split()[1])
        os.kill(pid, signal.SIGKILL)
        status, headers, body = read_answer(sock)
    assert status == 502
    assert b"ReplicaLostError" in body
    assert headers["content-type"] == "application/json"
    # What shared the process comes back.
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with service.http() as http:
            if http.post("/up/count", content=b"x").status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError("the service did not come back")


def test_uploads_wait_for_a_slot_and_arrive_whole(service, mark):
    """Refused by a full replica they are sent again, with the same body."""
    total = 2 * MEGABYTE

    async def main() -> list[dict[str, int]]:
        async with httpx.AsyncClient(base_url=service.url, timeout=60, trust_env=False) as http:

            async def content():
                for piece in pieces(total):
                    yield piece

            posts = [http.post("/one?s=0.05", content=content()) for _ in range(8)]
            return [answer.json() for answer in await asyncio.gather(*posts)]

    assert asyncio.run(main()) == [{"size": total}] * 8


# -- Expect, HEAD, trailers ----------------------------------------------------------------------------------


def test_leave_to_send_comes_when_the_body_is_read(service):
    with service.connect() as sock:
        sock.sendall(head("/up/count", "content-length: 5", "expect: 100-continue"))
        assert sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"12345")
        status, headers, body = read_answer(sock)
        assert status == 200
        assert b'"size":5' in body
        assert "connection" not in headers


@pytest.mark.parametrize("path", ["/up/refuse", "/nowhere"])
def test_leave_to_send_is_not_given_where_nobody_reads(service, path):
    with service.connect() as sock:
        sock.sendall(head(path, "content-length: 5", "expect: 100-continue"))
        status, headers, _ = read_answer(sock)
        assert status in {422, 404}
        assert headers["connection"] == "close"


def test_a_client_that_does_not_wait_for_leave(service):
    with service.connect() as sock:
        sock.sendall(head("/up/count", "content-length: 5", "expect: 100-continue") + b"12345")
        status, _, body = read_answer(sock)
        assert status == 200
        assert b'"size":5' in body


def test_trailers_are_ignored(service):
    with service.connect() as sock:
        body = chunk(b"abc") + b"0\r\nx-trailer: smuggled\r\nx-marker: /tmp/x\r\n\r\n"
        sock.sendall(head("/up/headers", "transfer-encoding: chunked", "x-real: 1") + body)
        status, _, answer = read_answer(sock)
        assert (status, answer) == (200, b'{"x-real":"1"}')
        # In a read of their own, behind a pause.
        sock.sendall(head("/up/headers", "transfer-encoding: chunked", "x-real: 2") + chunk(b"abc"))
        sock.sendall(b"0\r\nx-trailer: ")
        sock.sendall(b"smuggled\r\n\r\n")
        assert read_answer(sock)[2] == b'{"x-real":"2"}'
        sock.sendall(head("/up/headers", "content-length: 1") + b"x")
        assert read_answer(sock)[2] == b"{}"


# -- cancellation and deadlines ------------------------------------------------------------------------------


@pytest.mark.parametrize("query", ["", "?stream"])
def test_a_client_that_goes_away_cancels_the_whole_chain(service, mark, query):
    with service.connect() as sock:
        sock.sendall(head(f"/chain{query}", f"x-marker: {mark()['x-marker']}", method="GET"))
        if query:
            assert sock.recv(1000)
        else:
            mark("last began")
    mark("middle ended")
    mark("last ended")


def test_the_time_that_a_body_takes_is_its_clients_own(service):
    """A slow upload may take longer than the deadline, which counts from its last piece."""
    with service.connect() as sock:
        sock.sendall(head("/up/late?s=0.1", "transfer-encoding: chunked", "x-request-timeout-seconds: 1"))
        for _ in range(8):
            sock.sendall(chunk(b"piece"))
            time.sleep(0.2)
        sock.sendall(b"0\r\n\r\n")
        status, _, body = read_answer(sock)
        assert (status, body) == (200, b'{"deadline":true}')


@pytest.mark.parametrize(("path", "said"), [("/up/late?s=30", "in replica"), ("/up/stall", "in replica")])
def test_the_deadline_holds_for_uploads(service, path, said):
    with service.connect() as sock:
        sock.sendall(head(path, "transfer-encoding: chunked", "x-request-timeout-seconds: 0.5"))
        sock.sendall(chunk(bytes(100_000)))
        if "late" in path:
            sock.sendall(b"0\r\n\r\n")
        began = time.monotonic()
        status, _, body = read_answer(sock)
        assert status == 504
        assert said.encode() in body
        assert time.monotonic() - began < 5


def test_a_deployments_deadline_holds_over_http(service):
    service.deploy(One, "hurried", request_timeout_s=0.3)
    with service.http() as http:
        answer = http.get("/hurried?s=30")
        assert answer.status_code == 504
        assert answer.json()["type"] == "RequestTimeoutError"
        # The request's own goes first.
        assert http.get("/hurried?s=0.6", headers={"x-request-timeout-seconds": "10"}).status_code == 200
