"""WebSockets from the client's socket to an ASGI application in a replica, and back: one service of real processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket as sockets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from distributed import Client
from fastapi import FastAPI
from helpers import embedded_client
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.websockets import WebSocket, WebSocketDisconnect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

import dask_serve as serve
from dask_serve.config import HTTPOptions

MEGABYTE = 2**20


def note(socket: WebSocket, word: str) -> None:
    """Leave a line in the file that the test named."""
    if path := socket.headers.get("x-marker"):
        with Path(path).open("a") as file:
            file.write(word + "\n")


class Sockets:
    """An ASGI application with one method for each path below the prefix."""

    async def __call__(self, scope, receive, send):
        name = scope["path"].rpartition("/")[2]
        if scope["type"] == "websocket":
            await getattr(self, f"on_{name}")(WebSocket(scope, receive, send))
        else:
            await JSONResponse({"http": name})(scope, receive, send)

    async def on_echo(self, socket):
        await socket.accept()
        try:
            while True:
                message = await socket.receive()
                if message["type"] == "websocket.disconnect":
                    note(socket, f"gone {message['code']} {message['reason']}")
                    return
                if message.get("text") is not None:
                    await socket.send_text(message["text"])
                else:
                    await socket.send_bytes(message["bytes"])
        finally:
            note(socket, "ended")

    async def on_scope(self, socket):
        scope = {name: socket.scope[name] for name in ("type", "scheme", "path", "root_path", "subprotocols")}
        await socket.accept("second", [(b"x-own", b"yes")])
        scope["query"] = dict(socket.query_params)
        scope["id"] = serve.get_request_context().request_id
        await socket.send_json(scope)
        await socket.close(4321, "enough")

    async def on_deny(self, socket):
        await socket.send_denial_response(JSONResponse({"why": "no"}, 418, {"x-own": "yes"}))

    async def on_reject(self, socket):
        await socket.close()

    async def on_early_error(self, socket):
        raise ValueError("the secret of the user code")

    async def on_error(self, socket):
        await socket.accept()
        await socket.receive_text()
        raise ValueError("the secret of the user code")

    async def on_silent_end(self, socket):
        await socket.accept()
        await socket.send_text("last")

    async def on_never(self, socket):
        return

    async def on_flood(self, socket):
        """Send until it does not go on any more."""
        await socket.accept()
        made = 0
        try:
            while True:
                await socket.send_bytes(bytes(65536))
                made += 1
                note(socket, f"sent {made}")
        except WebSocketDisconnect:
            note(socket, f"stopped after {made}")

    async def on_deaf(self, socket):
        """Read nothing until it is told."""
        await socket.accept()
        note(socket, f"open {os.getpid()}")
        while not Path(socket.headers["x-marker"] + ".go").exists():
            await asyncio.sleep(0.02)
        size = 0
        try:
            while True:
                size += len(await socket.receive_bytes())
        except WebSocketDisconnect:
            note(socket, f"read {size}")

    async def on_slow(self, socket):
        """Take a while to accept."""
        try:
            note(socket, "asked")
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            note(socket, "cancelled")
            raise

    async def on_pid(self, socket):
        await socket.accept()
        await socket.send_text(str(os.getpid()))
        await socket.receive()

    async def on_twice(self, socket):
        await socket.accept()
        await socket.close(1000)
        try:
            await socket._send({"type": "websocket.send", "text": "too late"})
        except RuntimeError as error:
            note(socket, f"refused: {error}")


fastapi_app = FastAPI()


@serve.ingress(fastapi_app)
class WithFastAPI:
    def __init__(self) -> None:
        self.greeting = "hello"

    @fastapi_app.websocket("/rooms/{room}")
    async def room(self, socket: WebSocket, room: str) -> None:
        await socket.accept()
        await socket.send_text(f"{self.greeting} {room}")
        async for text in socket.iter_text():
            await socket.send_text(text.upper())

    @fastapi_app.post("/files")
    async def upload(self, request: Request) -> dict[str, int]:
        return {"size": sum([len(chunk) async for chunk in request.stream()])}


class Plain:
    async def __call__(self, request: Request) -> str:
        return "plain"


class Service:
    def __init__(self, url: str, client: Client) -> None:
        self.url = url
        self.client = client

    def deploy(self, target: Any, name: str, wait: bool = True, **options: Any) -> None:
        declared = serve.deployment(**options)(target) if options else serve.deployment(target)
        serve.run(declared.bind(), name=name, route_prefix=f"/{name}", client=self.client, wait=wait)

    def open(self, path: str, headers: dict[str, str] | None = None, **options: Any) -> ClientConnection:
        url = self.url.replace("http://", "ws://") + path
        return connect(url, additional_headers=headers, proxy=None, **options)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with embedded_client(2, 1) as client:
        service = Service(serve.start(port=0, client=client), client)
        service.deploy(Sockets, "ws", graceful_shutdown_timeout_s=0.5)
        service.deploy(Plain, "plain")
        yield service


def closed(socket: ClientConnection) -> tuple[int, str]:
    """Read until the other side closes; return its code and reason."""
    with pytest.raises(ConnectionClosed) as caught:
        while True:
            socket.recv(timeout=20)
    received = caught.value.rcvd
    assert received is not None, "the connection broke without a close"
    return received.code, received.reason


def test_text_and_bytes_both_ways(service, mark):
    with service.open("/ws/echo", mark()) as socket:
        for message in ["text äö", "", b"\x00\xff", b"", "x" * 100_000]:
            socket.send(message)
            assert socket.recv(timeout=10) == message
        pong = socket.ping()
        assert pong.wait(10)
        socket.close(4000, "bye")
    assert mark("gone") == "gone 4000 bye"
    mark("ended")


def test_many_messages_keep_their_order(service):
    with service.open("/ws/echo") as socket:
        for number in range(2000):
            socket.send(str(number))
        assert [socket.recv(timeout=10) for _ in range(2000)] == [str(number) for number in range(2000)]


def test_big_messages(service):
    body = os.urandom(10 * MEGABYTE)
    with service.open("/ws/echo", max_size=None) as socket:
        socket.send(body)
        assert socket.recv(timeout=30) == body
        socket.send([body[:MEGABYTE], body[MEGABYTE:]])
        assert socket.recv(timeout=30) == body


def test_a_message_over_the_limit_is_1009(service, mark):
    with service.open("/ws/echo", mark(), max_size=None) as socket:
        socket.send(bytes(17 * MEGABYTE))
        assert closed(socket)[0] == 1009
    assert mark("gone").startswith("gone 1009")


def test_the_head_of_the_request_and_of_the_answer(service):
    headers = {"x-request-id": "my-id"}
    with service.open("/ws/scope?a=1", headers, subprotocols=["first", "second"]) as socket:
        assert socket.subprotocol == "second"
        assert socket.response.headers["x-own"] == "yes"
        assert socket.response.headers["x-request-id"] == "my-id"
        assert json.loads(socket.recv(timeout=10)) == {
            "type": "websocket",
            "scheme": "ws",
            "path": "/ws/scope",
            "root_path": "/ws",
            "subprotocols": ["first", "second"],
            "query": {"a": "1"},
            "id": "my-id",
        }
        assert closed(socket) == (4321, "enough")


def refused(service: Service, path: str, **headers: str) -> httpx.Response | Any:
    with pytest.raises(InvalidStatus) as caught:
        service.open(path, headers)
    return caught.value.response


def test_a_denial_is_the_applications_own_answer(service):
    answer = refused(service, "/ws/deny")
    assert (answer.status_code, answer.body, answer.headers["x-own"]) == (418, b'{"why":"no"}', "yes")
    assert "x-request-id" in answer.headers


def test_a_close_before_the_accept_is_a_403(service):
    assert refused(service, "/ws/reject").status_code == 403


@pytest.mark.parametrize("path", ["/ws/early_error", "/ws/never"])
def test_an_application_that_fails_before_it_accepts_is_a_500(service, path):
    answer = refused(service, path)
    assert answer.status_code == 500
    assert b"InternalServerError" in answer.body
    assert b"secret" not in answer.body


def test_an_unknown_path_is_a_404(service):
    answer = refused(service, "/nowhere")
    assert answer.status_code == 404
    assert b"known route prefixes" in answer.body


def test_a_plain_deployment_says_what_it_would_take(service):
    answer = refused(service, "/plain")
    assert answer.status_code == 403
    assert b"takes no WebSockets" in answer.body


def test_a_deadline_ends_a_socket_that_is_not_accepted(service):
    answer = refused(service, "/ws/slow", **{"x-request-timeout-seconds": "0.3"})
    assert answer.status_code == 504


def test_the_deadline_is_for_the_accept(service):
    with service.open("/ws/echo", {"x-request-timeout-seconds": "0.3"}) as socket:
        time.sleep(0.6)
        socket.send("still")
        assert socket.recv(timeout=10) == "still"


def test_an_exception_is_a_1011(service):
    with service.open("/ws/error", {"x-request-id": "bad-one"}) as socket:
        socket.send("go")
        code, reason = closed(socket)
    assert code == 1011
    assert "bad-one" in reason
    assert "secret" not in reason


def test_an_application_that_just_ends_closes(service):
    with service.open("/ws/silent_end") as socket:
        assert socket.recv(timeout=10) == "last"
        assert closed(socket)[0] == 1000


def test_what_asgi_forbids_is_an_error_in_user_code(service, mark):
    with service.open("/ws/twice", mark()) as socket:
        assert closed(socket)[0] == 1000
    assert "closed" in mark("refused")


def test_a_client_that_breaks_off_is_a_disconnect(service, mark):
    with service.open("/ws/echo", mark()) as socket:
        socket.socket.shutdown(sockets.SHUT_RDWR)
        mark("gone 1005")


def test_a_client_that_goes_away_before_the_accept_cancels(service, mark):
    url = httpx.URL(service.url)
    with sockets.create_connection((url.host, url.port)) as raw:
        raw.sendall(
            b"GET /ws/slow HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
            b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            + f"x-marker: {mark()['x-marker']}\r\n\r\n".encode()
        )
        mark("asked")
    mark("cancelled")


def test_a_client_that_does_not_read_holds_up_user_code(service, mark):
    with service.open("/ws/flood", mark(), max_queue=1, compression=None) as socket:
        mark("sent 1")
        path = Path(mark()["x-marker"])
        before, steady = -1, 0
        end = time.monotonic() + 20
        while steady < 10:
            now = path.read_text().count("\n")
            steady = steady + 1 if now == before else 0
            before = now
            assert time.monotonic() < end
            time.sleep(0.05)
        # The window, what uvicorn and the kernel hold on both ends.
        assert before * 65536 < 16 * MEGABYTE
        socket.socket.close()
    mark("stopped after")


def test_user_code_that_does_not_read_holds_up_the_client(service, mark):
    sent = 0
    with service.open("/ws/deaf", mark(), compression=None) as socket:
        mark("open")
        socket.socket.settimeout(1.0)
        try:
            while sent < 100 * MEGABYTE:
                socket.send(bytes(65536))
                sent += 65536
        except (TimeoutError, ConnectionClosed):
            pass
        assert 0 < sent < 16 * MEGABYTE
        Path(mark()["x-marker"] + ".go").touch()
    mark("read")


def test_a_replica_that_dies_is_a_1011(service):
    service.deploy(Sockets, "victim")
    with service.open("/victim/pid") as socket:
        os.kill(int(socket.recv(timeout=10)), signal.SIGKILL)
        code, reason = closed(socket)
    assert code == 1011
    assert "ReplicaLostError" in reason
    service.client.wait_for_workers(2, timeout=30)


def test_a_replica_that_is_stopped_is_a_1012(service):
    service.deploy(Sockets, "short", graceful_shutdown_timeout_s=0.3)
    with service.open("/short/echo") as socket:
        socket.send("here")
        assert socket.recv(timeout=10) == "here"
        serve.delete("short", client=service.client)
        assert closed(socket)[0] == 1012


def test_fastapi(service):
    service.deploy(WithFastAPI, "fast")
    with service.open("/fast/rooms/7") as socket:
        assert socket.recv(timeout=10) == "hello 7"
        socket.send("abc")
        assert socket.recv(timeout=10) == "ABC"
    assert refused(service, "/fast/nowhere").status_code == 403
    with httpx.Client(trust_env=False, timeout=30) as http:
        answer = http.post(f"{service.url}/fast/files", content=bytes(3 * MEGABYTE))
        assert answer.json() == {"size": 3 * MEGABYTE}


@contextlib.contextmanager
def changed(service: Service, **options: Any) -> Iterator[None]:
    """Change options of the running service for a while."""
    service.url = serve.start(client=service.client, **options)
    try:
        yield
    finally:
        before = {name: getattr(HTTPOptions(), name) for name in options}
        service.url = serve.start(client=service.client, **before)


def test_tokens_hold_for_websockets(service, tmp_path):
    path = tmp_path / "tokens"
    path.touch(mode=0o600)
    path.write_text("a" * 20 + "\n")
    with changed(service, tokens_file=str(path)):
        assert refused(service, "/ws/echo").status_code == 403
        assert refused(service, "/ws/echo", authorization="Bearer " + "b" * 20).status_code == 403
        with service.open("/ws/echo", {"authorization": "Bearer " + "a" * 20}) as socket:
            socket.send("let in")
            assert socket.recv(timeout=10) == "let in"


def test_websockets_and_uploads_behind_middleware_and_trusted_proxies(service):
    service.deploy(WithFastAPI, "fast")
    gzip = "starlette.middleware.gzip:GZipMiddleware"
    with changed(service, middleware=[gzip], trusted_proxies=["127.0.0.1"]):
        with service.open("/ws/scope", {"x-forwarded-proto": "https"}, subprotocols=["second"]) as socket:
            assert json.loads(socket.recv(timeout=10))["scheme"] == "wss"
        with httpx.Client(trust_env=False, timeout=30) as http:
            answer = http.post(f"{service.url}/fast/files", content=bytes(3 * MEGABYTE))
            assert answer.json() == {"size": 3 * MEGABYTE}
            # Nobody reads it: the client is told, and not left to send it all.
            answer = http.post(f"{service.url}/ws/other", content=bytes(30 * MEGABYTE))
            assert answer.json() == {"http": "other"}


def test_a_proxy_that_stops_is_a_1012(service, mark):
    below = psutil.Process().children(recursive=True)
    proxies = [process for process in below if "dask_serve.proxy" in " ".join(process.cmdline())]
    with service.open("/ws/echo", mark()) as socket:
        socket.send("here")
        assert socket.recv(timeout=10) == "here"
        for proxy in proxies:
            proxy.terminate()
        assert closed(socket)[0] == 1012
    mark("gone 1012")


def test_http_of_the_same_application(service):
    with httpx.Client(trust_env=False, timeout=30) as http:
        assert http.get(f"{service.url}/ws/other").json() == {"http": "other"}


def test_a_reason_that_is_no_text_breaks_nothing() -> None:
    """FastAPI closes a WebSocket whose parameters are not valid with a list as the reason."""

    @serve.deployment
    class Odd:
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await receive()
            await send({"type": "websocket.accept"})
            await send({"type": "websocket.close", "code": 1008, "reason": [{"loc": ["query", "x" * 200]}]})

    with serve.testing.run(Odd.bind()) as service, service.client.websocket_connect("/") as websocket:
        with pytest.raises(WebSocketDisconnect) as closed:
            websocket.receive_text()
        assert closed.value.code == 1008
        assert closed.value.reason.startswith('[{"loc"')
        assert len(closed.value.reason) == 123
