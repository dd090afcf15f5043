"""What people use to speak HTTP, against a service of real processes. Browsers are in test_browser.py."""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import aiohttp
import httpx
import pytest
from http_clients import CLIENTS, Curl
from web_service import LONG, MESSAGE_LIMIT, Context, WebService, running, wait_until
from websockets.exceptions import ConnectionClosedError
from websockets.sync.client import connect

import dask_serve as serve

MEGABYTE = bytes(range(256)) * 4096
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def service() -> Iterator[WebService]:
    with running() as service:
        yield service


@pytest.fixture(scope="module")
def with_middleware(service: WebService) -> WebService:
    """The same service from here on, with gzip and CORS in the proxies."""
    service.start(
        middleware=[
            "starlette.middleware.gzip:GZipMiddleware",
            [
                "starlette.middleware.cors:CORSMiddleware",
                {"allow_origins": ["https://page.example"], "allow_methods": ["*"]},
            ],
        ]
    )
    return service


@pytest.fixture(params=CLIENTS)
def http(request: Any, service: WebService) -> Iterator[Any]:
    client = CLIENTS[request.param](service.url)
    try:
        yield client
    finally:
        client.close()


# -- requests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_methods(http, method):
    body = None if method in {"GET", "OPTIONS"} else b"some words"
    answer = http.request(method, "/web/echo?a=%C3%A4&b=1+2", body=body, headers={"X-Request-ID": "mine"})
    assert answer.status == 200
    assert answer.headers["x-request-id"] == "mine"
    assert answer.headers["x-own"] == "yes"
    told = answer.json()
    assert told["method"] == method
    assert (told["path"], told["query"]) == ("/web/echo", {"a": "ä", "b": "1 2"})
    assert told["size"] == len(body or b"")


def test_head(http):
    whole = http.request("GET", "/web/long")
    head = http.request("HEAD", "/web/long")
    assert (head.status, head.body) == (200, b"")
    assert head.headers["content-length"] == whole.headers["content-length"] == str(len(LONG))
    assert http.request("HEAD", "/plain").status == 200
    assert http.request("HEAD", "/nowhere").status == 404
    assert http.request("GET", "/plain").json()["method"] == "GET"


def test_large_bodies(http):
    answer = http.request("POST", "/web/echo", body=MEGABYTE * 3)
    assert answer.json()["size"] == len(MEGABYTE) * 3
    assert answer.json()["sha256"] == hashlib.sha256(MEGABYTE * 3).hexdigest()
    assert http.request("POST", "/plain", body=MEGABYTE * 3).json()["size"] == len(MEGABYTE) * 3


def test_chunked_bodies(http):
    sizes = [1, 65536, 3, 100_000, 2**20]
    answer = http.request("POST", "/web/echo", body=(b"x" * size for size in sizes))
    told = answer.json()
    assert told["headers"]["transfer-encoding"] == "chunked"
    assert (told["size"], told["sha256"]) == (sum(sizes), hashlib.sha256(b"x" * sum(sizes)).hexdigest())


def test_one_connection_for_many_requests(http, service):
    if isinstance(http, Curl):
        urls = [service.url + path for path in ("/web/echo", "/web/echo", "/nowhere", "/web/echo")]
        done = subprocess.run(
            http.command("--write-out", "\n%{num_connects}\n", *urls), capture_output=True, text=True, timeout=30
        )
        connects = done.stdout.splitlines()[1::2]
        assert connects == ["1", "0", "0", "0"]
        return
    ports = {http.request("POST", "/web/echo", body=b"abc").json()["port"] for _ in range(3)}
    # Refusals keep it too, and what is left of a small body does not harm.
    assert http.request("POST", "/nowhere", body=b"abc").status == 404
    assert http.request("POST", "/small", body=b"x" * 2000).status == 413
    assert http.request("HEAD", "/web/echo").status == 200
    ports.add(http.request("GET", "/web/echo").json()["port"])
    assert len(ports) == 1


def test_redirected_slashes(http):
    assert http.request("GET", "/web/slashed").json()["path"] == "/web/slashed/"
    assert http.request("POST", "/web/slashed", body=b"kept").json() == {"path": "/web/slashed/", "body": "kept"}
    # A prefix is a prefix with its slash and without.
    assert http.request("GET", "/plain").json()["path"] == "/plain"
    assert http.request("GET", "/plain/").json()["path"] == "/plain/"
    assert http.request("GET", "/plainer").status == 404


def test_curl_waits_for_its_leave(service):
    curl = Curl(service.url)
    command = curl.command("--verbose", "--data-binary", "@-", "--max-time", "20", service.url + "/web/echo")
    done = subprocess.run(command, input=MEGABYTE * 2, capture_output=True, timeout=30)
    assert b"> Expect: 100-continue" in done.stderr
    assert b"< HTTP/1.1 100 Continue" in done.stderr
    assert json.loads(done.stdout)["size"] == len(MEGABYTE) * 2
    # Nobody has to read what is refused.
    command = curl.command("--verbose", "--data-binary", "@-", "--max-time", "20", service.url + "/small")
    done = subprocess.run(command, input=MEGABYTE * 2, capture_output=True, timeout=30)
    assert b"< HTTP/1.1 100 Continue" not in done.stderr
    assert b"< HTTP/1.1 413" in done.stderr
    assert json.loads(done.stdout)["type"] == "BodyTooLarge"


# -- errors ------------------------------------------------------------------------------------------------------------


def test_not_found(http):
    answer = http.request("GET", "/nowhere", headers={"X-Request-ID": "mine"})
    assert (answer.status, answer.json()["type"]) == (404, "NotFound")
    assert answer.json()["request_id"] == answer.headers["x-request-id"] == "mine"
    answer = http.request("GET", "/nowhere", headers={"Accept": "text/plain"})
    assert answer.headers["content-type"].startswith("text/plain")
    assert b"no application answers /nowhere" in answer.body
    # The application's own.
    assert http.request("GET", "/web/nowhere").body == b"Not Found"


def test_too_large(http):
    for body in (b"x" * 5000, MEGABYTE * 2, (b"x" * 500 for _ in range(10))):
        answer = http.request("POST", "/small", body=body)
        assert (answer.status, answer.json()["type"]) == (413, "BodyTooLarge")
    assert http.request("POST", "/small", body=b"x" * 1000).json()["size"] == 1000


def test_overload(http, service):
    """One runs, one waits, the others are told to come again."""
    enough = threading.Event()

    def fill() -> None:
        with httpx.Client(base_url=service.url, timeout=30) as client:
            while not enough.is_set():
                client.get("/busy?s=0.1")

    filling = [threading.Thread(target=fill) for _ in range(3)]
    answers = []
    try:
        for thread in filling:
            thread.start()
        wait_until(lambda: answers.append(http.request("GET", "/busy?s=0")) or answers[-1].status == 503)
    finally:
        enough.set()
        for thread in filling:
            thread.join()
    assert answers[-1].json()["type"] == "BackPressureError"
    assert int(answers[-1].headers["retry-after"]) >= 1
    assert http.request("GET", "/busy?s=0").status == 200


# -- streams -----------------------------------------------------------------------------------------------------------


def test_streams(http, service):
    name = uuid.uuid4().hex
    with http.stream(f"/web/stream?name={name}") as pieces:
        assert next(pieces) == b"first\n"
        # The rest is not even made yet.
        assert httpx.get(f"{service.url}/web/note/{name}?word=got it").json() == ["got it"]
        assert b"".join(pieces) == b"last\n"


def test_server_sent_events(http):
    with http.stream("/web/events") as pieces:
        text = b"".join(pieces).decode()
    assert text.count("event: count") == 3
    assert text.endswith("id: 3\nevent: count\ndata: 3\ndata: ä\n\n")


def test_a_client_that_leaves_a_stream_ends_it(http, service):
    name = uuid.uuid4().hex
    with http.stream(f"/web/stream?name={name}") as pieces:
        assert next(pieces) == b"first\n"
    if not isinstance(http, Curl):
        http.close()
    wait_until(lambda: httpx.get(f"{service.url}/web/note/{name}").json() == ["ended"])
    if not isinstance(http, Curl):
        http.__init__(service.url)


def test_a_client_that_gives_up_cancels_its_request(http, service):
    name = uuid.uuid4().hex
    http.give_up(f"/web/silence?name={name}", 0.5)
    wait_until(lambda: httpx.get(f"{service.url}/web/note/{name}").json() == ["began", "cancelled"])


def test_http_10(service):
    """No chunks, no leave to go on: what has no length ends with the connection."""
    curl = Curl(service.url)
    for options in ((), ("--header", "Connection: keep-alive")):
        command = curl.command("--http1.0", "--include", "--raw", *options, service.url + "/web/events")
        done = subprocess.run(command, capture_output=True, timeout=30)
        head, _, body = done.stdout.partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head.lower()
        assert b"connection: close" in head.lower()
        assert body.startswith(b"retry: 20\n\nid: 1\n")
        assert body.endswith("id: 3\nevent: count\ndata: 3\ndata: ä\n\n".encode())
    command = curl.command("--http1.0", "--include", "--data-binary", "@-", service.url + "/web/echo")
    command += ["--header", "Expect: 100-continue", "--expect100-timeout", "0.1"]
    done = subprocess.run(command, input=MEGABYTE * 2, capture_output=True, timeout=30)
    assert done.stdout.startswith(b"HTTP/1.1 200")
    assert f'"size":{len(MEGABYTE) * 2}'.encode() in done.stdout
    assert b"content-length" in done.stdout


# -- WebSockets --------------------------------------------------------------------------------------------------------


def test_websockets_of_aiohttp(service):
    name = uuid.uuid4().hex

    async def main() -> None:
        async with aiohttp.ClientSession() as session:
            async with session.ws_connect(f"{service.url}/web/socket?name={name}", protocols=("one", "two")) as ws:
                assert ws.protocol == "two"
                await ws.send_str("hällo")
                assert await ws.receive_str() == "HÄLLO"
                await ws.send_bytes(MEGABYTE)
                assert await ws.receive_bytes() == MEGABYTE[::-1]
                await ws.close(code=4001, message=b"enough")
            async with session.ws_connect(f"{service.url}/web/socket") as ws:
                await ws.send_str("close 4321 see you")
                message = await ws.receive()
                assert (message.type, message.data, message.extra) == (aiohttp.WSMsgType.CLOSE, 4321, "see you")
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await session.ws_connect(f"{service.url}/nowhere")
            assert refused.value.status == 404
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await session.ws_connect(f"{service.url}/plain")
            assert refused.value.status == 403

    asyncio.run(main())
    wait_until(lambda: httpx.get(f"{service.url}/web/note/{name}").json() == [[4001, "enough"]])


def test_websockets_with_large_heads(service):
    url = f"{service.url.replace('http', 'ws')}/web/socket"
    with connect(url, additional_headers={"Cookie": "x" * 40_000}) as socket:
        socket.send("hello")
        assert socket.recv(timeout=20) == "HELLO"


@pytest.mark.parametrize("kind", [bytes, str])
def test_messages_that_are_too_large(service, kind):
    name = uuid.uuid4().hex
    url = f"{service.url.replace('http', 'ws')}/web/socket?name={name}"
    fitting = b"x" * MESSAGE_LIMIT if kind is bytes else "ä" * (MESSAGE_LIMIT // 2)
    with connect(url, max_size=None, compression=None) as socket:
        socket.send(fitting)
        assert socket.recv(timeout=20) == (fitting if kind is bytes else fitting.upper())
        socket.send(fitting + kind(fitting[:1]))
        with pytest.raises(ConnectionClosedError) as closed:
            socket.recv(timeout=20)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1009
    wait_until(lambda: httpx.get(f"{service.url}/web/note/{name}").json())
    # In pieces, and compressed, it is as large.
    for compression in (None, "deflate"):
        with (
            connect(url, max_size=None, compression=compression) as socket,
            pytest.raises(ConnectionClosedError) as closed,
        ):
            socket.send(kind(fitting[:1]) * 70_000 for _ in range(20)) if compression is None else socket.send(
                fitting * 2
            )
            socket.recv(timeout=20)
        assert closed.value.rcvd.code == 1009


# -- traces ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def traced(service):
    last = serve.deployment(Context).options(name="Last").bind()
    first = serve.deployment(Context).options(name="First").bind(last)
    return serve.run(first, name="traced", route_prefix="/traced", client=service.client)


def test_traces_go_on_with_calls(http, service, traced):
    answer = http.request("GET", "/traced", headers={"traceparent": TRACE, "tracestate": "a=1,b=2"}).json()
    assert answer == {"header": TRACE, "told": [[TRACE, "a=1,b=2"]] * 3}
    answer = http.request("GET", "/traced").json()
    assert answer == {"header": None, "told": [["", ""]] * 3}
    # What is no trace is a header like any other.
    bad = TRACE.replace("0af7651916cd43dd8448eb211c80319c", "0" * 32)
    answer = http.request("GET", "/traced", headers={"traceparent": bad, "tracestate": "a=1"}).json()
    assert answer == {"header": bad, "told": [["", ""]] * 3}


def test_calls_from_a_session_have_no_trace(traced):
    assert traced.tell.remote().result(timeout=20) == [["", ""]] * 3


# -- middleware in the proxies: from here on the service has it --------------------------------------------------------


def test_gzip(with_middleware, http):
    answer = http.request("GET", "/web/long", headers={"Accept-Encoding": "gzip"})
    assert answer.headers["content-encoding"] == "gzip"
    assert answer.body.decode() == LONG
    assert "content-encoding" not in http.request("GET", "/web/page").headers
    assert http.request("HEAD", "/web/long").body == b""
    assert http.request("POST", "/web/echo", body=MEGABYTE * 2).json()["size"] == len(MEGABYTE) * 2
    assert http.request("GET", "/nowhere").json()["type"] == "NotFound"


def test_streams_behind_middleware(with_middleware, http, service):
    test_server_sent_events(http)
    test_a_client_that_gives_up_cancels_its_request(http, service)


def test_preflights(with_middleware, http):
    asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    answer = http.request("OPTIONS", "/web/echo", headers=asked)
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, "https://page.example")
    assert http.request("OPTIONS", "/web/echo", headers={**asked, "Origin": "https://other.example"}).status == 400
