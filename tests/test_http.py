"""HTTP from the client's socket to user code and back: one service of real processes for the whole module."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import re
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from distributed import Client
from helpers import http_client, wait_until
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import (
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)

import dask_serve as serve
from dask_serve.embedded import EmbeddedCluster

BODY_LIMIT = 2 * 2**20
MEGABYTE = bytes(range(256)) * 4096


# -- what is served ------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Point:
    x: int
    y: float


def marker(request: Request, word: str) -> None:
    """Leave a line in the file that the test named: a side effect that it can see."""
    if path := request.headers.get("x-marker"):
        with Path(path).open("a") as file:
            file.write(word + "\n")


class Answers:
    """One method for each path below the prefix."""

    async def __call__(self, request: Request) -> Any:
        name = request.url.path.removeprefix(request.scope["root_path"]).strip("/").replace("/", "_") or "root"
        return await getattr(self, f"on_{name}")(request)

    async def on_root(self, request):
        return "root"

    async def on_scope(self, request):
        scope = {name: request.scope[name] for name in ("method", "path", "root_path", "http_version", "scheme")}
        return {**scope, "query": dict(request.query_params), "url": str(request.url), "client": request.client.host}

    async def on_str(self, request):
        return "text äö"

    async def on_bytes(self, request):
        return b"\x00\xff"

    async def on_dict(self, request):
        return {"a": [1, 2.5, None, "ä"]}

    async def on_list(self, request):
        return [1, "two"]

    async def on_none(self, request):
        return None

    async def on_dataclass(self, request):
        return [Point(1, 2.0)]

    async def on_numpy(self, request):
        import numpy as np

        return {"array": np.arange(4).reshape(2, 2), "scalar": np.float32(0.5), "flag": np.bool_(True)}

    async def on_response(self, request):
        return Response(b"raw", 201, {"x-own": "yes"}, media_type="application/x-own")

    async def on_json(self, request):
        response = JSONResponse({"ok": True}, headers={"x-one": "1"})
        response.set_cookie("first", "1")
        response.set_cookie("second", "2", httponly=True)
        return response

    async def on_redirect(self, request):
        return RedirectResponse("/answers/str")

    async def on_own_id(self, request):
        return PlainTextResponse("x", headers={"X-Request-ID": "chosen-by-user"})

    async def on_no_content(self, request):
        return Response(status_code=204)

    async def on_teapot(self, request):
        raise HTTPException(418, "short and stout", {"x-tea": "green"})

    async def on_not_modified(self, request):
        raise HTTPException(304)

    async def on_unrenderable(self, request):
        return object()

    async def on_bad_header(self, request):
        return PlainTextResponse("x", headers={"x-bad": "a\r\nset-cookie: b"})

    async def on_error(self, request):
        raise ValueError("the secret of the user code")

    async def on_gives_up(self, request):
        raise asyncio.CancelledError

    async def on_request_id(self, request):
        return serve.get_request_context().request_id

    async def on_echo(self, request):
        return Response(await request.body(), media_type=request.headers.get("content-type"))

    async def on_form(self, request):
        from urllib.parse import parse_qsl

        return dict(parse_qsl((await request.body()).decode()))

    async def on_as_json(self, request):
        return {"got": await request.json()}

    async def on_size(self, request):
        marker(request, "ran")
        return {"size": sum([len(chunk) async for chunk in request.stream()])}

    async def on_drip(self, request):
        try:
            async for _ in request.stream():
                marker(request, "began")
        except asyncio.CancelledError:
            marker(request, "cancelled")
            raise

    async def on_sleep(self, request):
        try:
            marker(request, "began")
            await asyncio.sleep(float(request.query_params.get("s", 60)))
        except asyncio.CancelledError:
            marker(request, "cancelled")
            raise
        return "slept"

    async def on_agen(self, request):
        return self.numbers(request)

    async def numbers(self, request):
        try:
            for number in range(int(request.query_params.get("n", 3))):
                yield f"{number}\n"
                marker(request, f"yielded {number}")
                if "pause" in request.query_params:
                    await asyncio.sleep(float(request.query_params["pause"]))
        finally:
            marker(request, "closed")

    async def on_gen(self, request):
        return self.flood(request)

    def flood(self, request):
        """Yield pieces of 64 KiB; `made` in the marker file is how many."""
        made = 0
        try:
            for _ in range(int(request.query_params.get("n", 2000))):
                made += 1
                yield b"x" * 65536
        finally:
            marker(request, f"closed after {made}")

    async def on_slow_gen(self, request):
        def generate():
            yield "first"
            time.sleep(float(request.query_params["pause"]))
            yield "second"

        return generate()

    async def on_thread(self, request):
        def generate():
            yield threading.current_thread().name
            yield "|" + threading.current_thread().name

        return generate()

    async def on_aflood(self, request):
        async def generate():
            made = 0
            try:
                while True:
                    made += 1
                    yield b"x" * 65536
            finally:
                marker(request, f"closed after {made}")

        return generate()

    async def on_streaming(self, request):
        return StreamingResponse(self.numbers(request), 206, {"x-own": "1"}, media_type="text/event-stream")

    async def on_blocking_streaming(self, request):
        return StreamingResponse(iter(["a", "b"]), media_type="text/plain")

    async def on_bad_chunk(self, request):
        async def generate():
            yield {"not": "bytes"}

        return generate()

    async def on_early_error(self, request):
        async def generate():
            raise HTTPException(409, "before the first chunk")
            yield ""

        return generate()

    async def on_late_error(self, request):
        async def generate():
            yield "good"
            await asyncio.sleep(0.05)
            raise RuntimeError("the secret of the stream")

        return generate()

    async def on_late_http_error(self, request):
        async def generate():
            yield "good"
            await asyncio.sleep(0.05)
            raise HTTPException(409, "too late")

        return generate()

    async def on_background(self, request):
        async def work():
            await asyncio.sleep(0.3)
            marker(request, "done")

        return PlainTextResponse("at once", background=BackgroundTask(work))

    async def on_env(self, request):
        return {"pid": os.getpid()}


class Blocking:
    """A ``def``."""

    def __call__(self, request: Request) -> Any:
        name = request.url.path.rpartition("/")[2]
        if name == "teapot":
            raise HTTPException(418, "sync tea")
        if name == "error":
            raise KeyError("the secret of the def")
        if name == "numbers":
            return (f"{number}\n" for number in range(3))
        return {"thread": threading.current_thread().name, "id": serve.get_request_context().request_id}


class NoParameter:
    def __call__(self) -> str:
        return "nothing asked"


class AsyncGenerator:
    async def __call__(self, request: Request):
        yield "a"
        yield "b"


class Deeper:
    async def __call__(self, request: Request) -> Any:
        return {"deeper": request.url.path, "root_path": request.scope["root_path"]}


async def function(request: Request) -> str:
    return f"function {request.method}"


def plain_function(request: Request) -> str:
    return "plain function"


class One:
    """Runs one request at a time, for as long as the request says."""

    async def __call__(self, request: Request) -> str:
        marker(request, "began")
        await asyncio.sleep(float(request.query_params.get("s", 0)))
        return "done"


class Mute:
    def predict(self, x: Any) -> Any:
        return x


class Victim:
    """Tells its process, then waits, so that the test can kill it."""

    async def __call__(self, request: Request) -> Any:
        path = request.headers["x-marker"]
        with Path(path).open("a") as file:
            file.write(f"{os.getpid()}\n")
        if len(Path(path).read_text().split()) == 1:
            if "stream" in request.query_params:
                return self.stream()
            await asyncio.sleep(60)
        return "survived"

    async def stream(self):
        yield "first"
        await asyncio.sleep(60)


class Doubler:
    async def double(self, x: int) -> int:
        return 2 * x

    def request_id(self) -> str:
        return serve.get_request_context().request_id

    async def fail(self) -> None:
        raise ValueError("the secret of the second step")


class Ingress:
    def __init__(self, doubler: Any) -> None:
        self.doubler = doubler

    async def __call__(self, request: Request) -> Any:
        if "fail" in request.query_params:
            await self.doubler.fail.remote()
        x = int(request.query_params["x"])
        return {"double": await self.doubler.double.remote(x), "id": await self.doubler.request_id.remote()}


# -- the service ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Service:
    url: str
    log: Path
    client: Client

    def http(self, **options: Any) -> httpx.Client:
        return http_client(self.url, **options)

    def deploy(self, target: Any, name: str, *args: Any, wait: bool = True, **options: Any) -> None:
        declared = serve.deployment(**options)(target) if options else serve.deployment(target)
        serve.run(
            declared.bind(*args), name=name.replace("/", "-"), route_prefix=f"/{name}", client=self.client, wait=wait
        )

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=20)

    @property
    def address(self) -> tuple[str, int]:
        url = httpx.URL(self.url)
        return url.host, url.port


@contextlib.contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Point this process's standard error at a file, for the processes that are started meanwhile."""
    sys.stderr.flush()
    before = os.dup(2)
    with path.open("ab") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    log = tmp_path_factory.mktemp("service") / "log"
    with logged_to(log):
        cluster = EmbeddedCluster.start(n_workers=2, nthreads=1, dashboard_address=None)
    with cluster, Client(cluster.scheduler_address, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=30)
        with logged_to(log):
            url = serve.start(port=0, num_proxies=2, body_limit=BODY_LIMIT, client=client)
        yield (made := Service(url, log, client))
        del made


@pytest.fixture(scope="module")
def apps(service: Service) -> Service:
    """Most of the applications, deployed side by side."""
    one = {"max_ongoing_requests": 1, "max_queued_requests": 2}
    for target, name, options in [
        (Answers, "answers", {}),
        (Deeper, "answers/deeper", {}),
        (Blocking, "blocking", {}),
        (NoParameter, "no-parameter", {}),
        (AsyncGenerator, "agen", {}),
        (function, "function", {}),
        (plain_function, "plain-function", {}),
        (One, "one", one),
        (Mute, "mute", {}),
    ]:
        service.deploy(target, name, wait=False, **options)
    ingress = serve.deployment(Ingress).bind(serve.deployment(Doubler).bind())
    serve.run(ingress, name="pipe", route_prefix="/pipe", client=service.client)
    wait_until(
        lambda: all(app.status == "running" for app in serve.status(client=service.client).applications.values())
    )
    return service


@pytest.fixture
def http(apps: Service) -> Iterator[httpx.Client]:
    with apps.http() as client:
        yield client


def words(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def mark(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A file for side effects, and the header that tells user code of it."""
    path = tmp_path / "marker"
    return path, {"x-marker": str(path)}


def metric(http: httpx.Client, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", http.get("/-/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def ask(path: str, *headers: str, method: str = "GET", body: bytes = b"") -> bytes:
    length = [f"content-length: {len(body)}"] if body else []
    return "\r\n".join([f"{method} {path} HTTP/1.1", "host: x", *length, *headers, "", ""]).encode() + body


def read_answer(file: Any) -> tuple[int, dict[str, str], bytes]:
    """Read one answer with a Content-Length from a socket's file."""
    status = int(file.readline().split()[1])
    headers = {}
    while line := file.readline().strip():
        name, _, value = line.decode().partition(": ")
        headers[name] = value
    return status, headers, file.read(int(headers.get("content-length", 0)))


# -- routes --------------------------------------------------------------------------------------------------


def test_the_longest_prefix_answers_and_the_rest_of_the_path_is_the_applications(http):
    scope = http.get("/answers/scope", params={"a": "ä b"}).json()
    assert scope["root_path"] == "/answers"
    assert scope["path"] == "/answers/scope"
    assert scope["query"] == {"a": "ä b"}
    assert scope["client"] == "127.0.0.1"
    assert httpx.URL(scope["url"]).path == "/answers/scope"
    assert http.get("/answers").text == http.get("/answers/").text == "root"
    assert http.get("/answers/deeper/x").json() == {"deeper": "/answers/deeper/x", "root_path": "/answers/deeper"}
    assert http.get("/answersx").status_code == 404


def test_an_unknown_path_is_answered_with_the_known_ones(http):
    answer = http.get("/nowhere")
    assert answer.status_code == 404
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    for prefix in ("/answers", "/blocking", "/pipe"):
        assert prefix in answer.json()["message"]


@pytest.mark.parametrize("path", ["/function", "/plain-function", "/no-parameter", "/agen", "/blocking"])
def test_every_kind_of_call(http, path):
    answer = http.get(path)
    assert answer.status_code == 200
    expected = {
        "/function": "function GET",
        "/plain-function": "plain function",
        "/no-parameter": "nothing asked",
        "/agen": "ab",
    }
    if path in expected:
        assert answer.text == expected[path]
    else:
        assert answer.json()["id"] == answer.headers["x-request-id"]
        assert "def" in answer.json()["thread"]


# -- answers -------------------------------------------------------------------------------------------------


def test_what_user_code_returns_becomes_a_response(http):
    answer = http.get("/answers/str")
    assert (answer.text, answer.headers["content-type"]) == ("text äö", "text/plain; charset=utf-8")
    answer = http.get("/answers/bytes")
    assert (answer.content, answer.headers["content-type"]) == (b"\x00\xff", "application/octet-stream")
    for path, value in {
        "dict": {"a": [1, 2.5, None, "ä"]},
        "list": [1, "two"],
        "none": None,
        "dataclass": [{"x": 1, "y": 2.0}],
        "numpy": {"array": [[0, 1], [2, 3]], "scalar": 0.5, "flag": True},
    }.items():
        answer = http.get(f"/answers/{path}")
        assert answer.json() == value
        assert answer.headers["content-type"] == "application/json"


def test_responses_keep_their_status_headers_and_cookies(http):
    answer = http.get("/answers/response")
    assert (answer.status_code, answer.content) == (201, b"raw")
    assert (answer.headers["x-own"], answer.headers["content-type"]) == ("yes", "application/x-own")
    answer = http.get("/answers/json")
    assert answer.json() == {"ok": True}
    assert [cookie.partition("=")[0] for cookie in answer.headers.get_list("set-cookie")] == ["first", "second"]
    answer = http.get("/answers/redirect")
    assert (answer.status_code, answer.headers["location"]) == (307, "/answers/str")
    assert http.get("/answers/no/content").status_code == 204
    assert http.get("/answers/own/id").headers.get_list("x-request-id") == ["chosen-by-user"]


def test_http_exceptions_are_answers(http):
    answer = http.get("/answers/teapot")
    assert (answer.status_code, answer.text, answer.headers["x-tea"]) == (418, "short and stout", "green")
    assert http.get("/blocking/teapot").text == "sync tea"
    answer = http.get("/answers/not/modified")
    assert (answer.status_code, answer.content) == (304, b"")


def test_head_has_the_head_only(http, mark):
    path, headers = mark
    answer = http.head("/answers/str")
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-length"] == str(len("text äö".encode()))
    # A stream without end is not run for its own sake.
    assert http.head("/answers/aflood", headers=headers).status_code == 200
    wait_until(lambda: words(path))
    assert http.get("/answers/str").text == "text äö"


# -- streams -------------------------------------------------------------------------------------------------


def test_short_streams_are_whole(http):
    for _ in range(20):
        assert http.get("/answers/agen").text == "0\n1\n2\n"
    assert http.get("/blocking/numbers").text == "0\n1\n2\n"
    assert http.get("/answers/agen?n=0").text == ""
    assert http.get("/answers/blocking/streaming").text == "ab"
    answer = http.get("/answers/streaming")
    assert (answer.status_code, answer.headers["x-own"], answer.text) == (206, "1", "0\n1\n2\n")
    assert answer.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize("path", ["agen?n=2&pause=0.5", "slow/gen?pause=0.5"])
def test_the_first_chunk_arrives_before_the_generator_ends(http, path):
    with http.stream("GET", f"/answers/{path}") as answer:
        began = time.monotonic()
        chunks = answer.iter_raw()
        assert next(chunks).decode().strip() in ("0", "first")
        assert time.monotonic() - began < 0.4
        assert next(chunks).decode().strip() in ("1", "second")


def test_a_plain_generator_runs_on_the_replicas_own_pool(http):
    first, second = http.get("/answers/thread").text.split("|")
    assert first == second
    assert "def" in first


@pytest.mark.parametrize("path", ["gen", "aflood"])
def test_a_client_that_does_not_read_stops_the_generator(apps, mark, path):
    marked, headers = mark
    with apps.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        sock.sendall(ask(f"/answers/{path}?n=100000", f"x-marker: {headers['x-marker']}"))
        assert sock.recv(1000).startswith(b"HTTP/1.1 200")
        # While it is stalled the deployment serves others.
        with apps.http() as http:
            for _ in range(20):
                assert http.get("/answers/str").status_code == 200
        assert not words(marked)
    wait_until(lambda: words(marked))
    # Window, the proxy's buffer and the kernel's: far less than the 6 GB that were offered.
    assert int(words(marked)[0].split()[-1]) * 65536 < 20 * 2**20


def test_a_large_stream_arrives_whole(http, mark):
    path, headers = mark
    with http.stream("GET", "/answers/gen?n=320", headers=headers) as answer:
        assert sum(len(chunk) for chunk in answer.iter_raw()) == 320 * 65536
    assert words(path) == ["closed after 320"]


@pytest.mark.parametrize("path", ["agen?n=1000&pause=0.05", "streaming?n=1000&pause=0.05", "gen?n=100000"])
def test_an_early_disconnect_runs_the_generators_finally(http, mark, path):
    marked, headers = mark
    with http.stream("GET", f"/answers/{path}", headers=headers) as answer:
        next(answer.iter_raw())
    wait_until(lambda: any(word.startswith("closed") for word in words(marked)))


def test_errors_before_the_first_chunk_have_their_status(http):
    answer = http.get("/answers/early/error")
    assert (answer.status_code, answer.text) == (409, "before the first chunk")
    assert http.get("/answers/bad/chunk").status_code == 500


@pytest.mark.parametrize("path", ["late/error", "late/http/error"])
def test_errors_after_the_first_chunk_cut_the_stream_off(http, path):
    with pytest.raises(httpx.RemoteProtocolError), http.stream("GET", f"/answers/{path}") as answer:
        assert answer.status_code == 200
        got = b""
        for chunk in answer.iter_raw():
            got += chunk
    assert got == b"good"


def test_background_tasks_run_after_the_answer(http, mark):
    path, headers = mark
    began = time.monotonic()
    assert http.get("/answers/background", headers=headers).text == "at once"
    assert http.get("/answers/str").status_code == 200
    assert time.monotonic() - began < 0.29
    wait_until(lambda: words(path) == ["done"])


# -- bodies --------------------------------------------------------------------------------------------------


def test_bodies_arrive_as_they_were_sent(http):
    assert http.post("/answers/as/json", json={"x": [1]}).json() == {"got": {"x": [1]}}
    assert http.post("/answers/form", data={"name": "ä&b", "x": "1"}).json() == {"name": "ä&b", "x": "1"}
    answer = http.post("/answers/echo", content=MEGABYTE, headers={"content-type": "application/x-mine"})
    assert answer.content == MEGABYTE
    assert answer.headers["content-type"] == "application/x-mine"
    pieces = [MEGABYTE[start : start + 100_000] for start in range(0, len(MEGABYTE), 100_000)]
    assert http.put("/answers/size", content=iter(pieces)).json() == {"size": len(MEGABYTE)}
    assert http.post("/answers/size", content=b"x" * BODY_LIMIT).json() == {"size": BODY_LIMIT}


def test_a_body_over_the_limit_is_refused_and_the_connection_lives(http):
    for content in (b"x" * (BODY_LIMIT + 1), iter([b"x" * 2**20] * 12)):
        answer = http.post("/answers/size", content=content)
        assert answer.status_code == 413
        assert str(BODY_LIMIT) in answer.json()["message"]
        assert http.get("/answers/str").status_code == 200


def test_a_declared_body_over_the_limit_is_refused_unread(apps):
    for expect in ([], ["expect: 100-continue"]):
        with apps.connect() as sock:
            sock.sendall(ask("/answers/size", f"content-length: {2 * BODY_LIMIT}", *expect, method="POST"))
            answer = b""
            while more := sock.recv(65536):
                answer += more
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"connection: close\r\n" in answer


def test_a_body_that_grows_over_the_limit_cancels_user_code(apps, mark):
    path, _ = mark
    with apps.connect() as sock:
        sock.sendall(ask("/answers/drip", f"x-marker: {path}", "transfer-encoding: chunked", method="POST"))
        sock.sendall(b"3\r\nabc\r\n")
        wait_until(lambda: "began" in words(path))
        piece = b"10000\r\n" + bytes(65536) + b"\r\n"
        with contextlib.suppress(ConnectionError):
            for _ in range(BODY_LIMIT // 65536 + 16):
                sock.sendall(piece)
        assert sock.recv(100).startswith(b"HTTP/1.1 413 ")
    wait_until(lambda: "cancelled" in words(path))


def test_a_client_that_goes_away_within_its_body_is_not_served(apps, http, mark):
    path, _ = mark
    with apps.connect() as sock:
        sock.sendall(ask("/answers/size", f"x-marker: {path}", "content-length: 100", method="POST") + b"half")
    assert http.post("/answers/size", content=b"12").json() == {"size": 2}
    assert not words(path)


# -- request ids and deadlines -------------------------------------------------------------------------------


def test_request_ids_are_taken_over_or_made(http):
    answer = http.get("/answers/request/id", headers={"X-Request-ID": "mine-1"})
    assert answer.text == answer.headers["x-request-id"] == "mine-1"
    made = {http.get("/answers/request/id", headers={"X-Request-ID": bad}).text for bad in ("", "a b", "x" * 129)}
    assert len(made) == 3
    assert all(re.fullmatch(r"[0-9a-f-]+", one) for one in made)
    assert http.get("/blocking", headers={"X-Request-ID": "mine-2"}).json()["id"] == "mine-2"


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf", ""])
def test_a_bad_deadline_is_refused(http, value):
    answer = http.get("/answers/str", headers={"X-Request-Timeout-Seconds": value, "X-Request-ID": "me"})
    assert answer.status_code == 400
    assert "X-Request-Timeout-Seconds" in answer.json()["message"]
    assert answer.headers["x-request-id"] == "me"


def test_a_deadline_ends_a_request_that_runs(http, mark):
    path, headers = mark
    began = time.monotonic()
    answer = http.get("/answers/sleep", headers={**headers, "X-Request-Timeout-Seconds": "0.3"})
    assert 0.2 < time.monotonic() - began < 3
    assert answer.status_code == 504
    assert "in replica answers/Answers/" in answer.json()["message"]
    wait_until(lambda: words(path) == ["began", "cancelled"])
    assert http.get("/answers/str", headers={"X-Request-Timeout-Seconds": "1e300"}).status_code == 200


def test_a_deadline_ends_a_request_that_waits(apps, http, mark):
    path, headers = mark
    with ThreadPoolExecutor(3) as pool:
        running = pool.submit(http.get, "/one?s=1.5", headers=headers)
        wait_until(lambda: words(path))
        answers = [
            pool.submit(http.get, "/one", headers={**headers, "X-Request-Timeout-Seconds": "0.4"}) for _ in range(2)
        ]
        assert [answer.result().status_code for answer in answers] == [504, 504]
        messages = [answer.result().json()["message"] for answer in answers]
        assert any("waiting at the router" in message for message in messages), messages
        assert running.result().status_code == 200
    assert words(path) == ["began"]
    assert http.get("/one").status_code == 200


def test_the_deadline_is_for_the_first_byte(http):
    answer = http.get("/answers/agen?n=3&pause=0.25", headers={"X-Request-Timeout-Seconds": "0.5"})
    assert answer.text == "0\n1\n2\n"


# -- clients that go away ------------------------------------------------------------------------------------


def test_a_client_that_goes_away_cancels_user_code(apps, mark):
    path, _ = mark
    with apps.connect() as sock:
        sock.sendall(ask("/answers/sleep", f"x-marker: {path}"))
        wait_until(lambda: words(path) == ["began"])
    wait_until(lambda: words(path) == ["began", "cancelled"])


def test_a_client_that_goes_away_leaves_the_queue(apps, http, mark, tmp_path):
    path, headers = mark
    never = tmp_path / "never"
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(http.get, "/one?s=0.7", headers=headers)
        wait_until(lambda: words(path))
        for _ in range(3):
            with apps.connect() as sock:
                sock.sendall(ask("/one", f"x-marker: {never}"))
        assert running.result().status_code == 200
    assert http.get("/one").status_code == 200
    assert not words(never)


# -- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "secret"),
    [
        ("/answers/error", "the secret of the user code"),
        ("/blocking/error", "the secret of the def"),
        ("/pipe?fail", "the secret of the second step"),
        ("/answers/unrenderable", "cannot be rendered as JSON"),
    ],
)
def test_an_exception_is_a_500_and_its_traceback_stays_inside(apps, http, path, secret):
    request_id = uuid.uuid4().hex
    answer = http.get(path, headers={"X-Request-ID": request_id})
    assert answer.status_code == 500
    assert answer.json()["request_id"] == answer.headers["x-request-id"] == request_id
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    wait_until(lambda: request_id in apps.log.read_text() and secret in apps.log.read_text().partition(request_id)[2])
    assert "Traceback" in apps.log.read_text().partition(request_id)[2]


def test_cancelled_by_itself_is_an_error_of_the_server(http):
    assert http.get("/answers/gives/up").status_code in (500, 502)


def test_a_header_that_http_forbids_is_an_error_of_user_code(http):
    answer = http.get("/answers/bad/header")
    assert answer.status_code == 500
    assert "set-cookie" not in answer.headers


def test_a_class_without_call_says_how_to_repair_it(http):
    answer = http.get("/mute")
    assert answer.status_code == 404
    assert "async def __call__(self, request" in answer.json()["message"]


def test_a_deleted_application_is_unknown(apps, http):
    apps.deploy(function, "short-lived")
    assert http.get("/short-lived").status_code == 200
    serve.delete("short-lived", client=apps.client)
    wait_until(lambda: http.get("/short-lived").status_code == 404)


def test_a_deployment_that_failed_is_unavailable(apps, http):
    class Broken:
        def __init__(self) -> None:
            raise ValueError("this model does not load")

        async def __call__(self, request: Request) -> None: ...

    with pytest.raises(serve.DeploymentFailedError):
        apps.deploy(Broken, "broken")
    answer = http.get("/broken")
    assert answer.status_code == 503
    assert "broken/Broken" in answer.json()["message"]
    assert "retry-after" in answer.headers
    serve.delete("broken", client=apps.client)


def test_too_many_waiting_requests_are_refused_at_once(apps, mark):
    path, headers = mark
    with apps.http() as http, ThreadPoolExecutor(12) as pool:
        running = pool.submit(http.get, "/one?s=1", headers=headers)
        wait_until(lambda: words(path))
        answers = [answer.result() for answer in [pool.submit(http.get, "/one") for _ in range(11)]]
        assert running.result().status_code == 200
    refused = [answer for answer in answers if answer.status_code == 503]
    # One in the replica ahead of a slot at most, and two at each of the two proxies.
    assert len(refused) >= 11 - 1 - 2 * 2
    assert {answer.status_code for answer in answers} == {200, 503}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert "max_queued_requests" in refused[0].json()["message"]
    assert all(answer.elapsed.total_seconds() < 0.8 for answer in refused)


# -- more than one step --------------------------------------------------------------------------------------


def test_a_handle_bound_into_the_ingress(http):
    answer = http.get("/pipe?x=21", headers={"X-Request-ID": "chain"})
    assert answer.json() == {"double": 42, "id": "chain"}


# -- the protocol --------------------------------------------------------------------------------------------


def test_a_websocket_is_refused_and_the_server_lives(apps, http):
    with apps.connect() as sock:
        upgrade = [
            "connection: upgrade",
            "upgrade: websocket",
            "sec-websocket-version: 13",
            "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==",
        ]
        sock.sendall(ask("/answers", *upgrade))
        assert sock.recv(100).split()[1] == b"403"
    assert http.get("/answers/str").status_code == 200


def test_many_requests_on_one_connection(apps):
    with apps.connect() as sock, sock.makefile("rb") as file:
        for number in range(300):
            sock.sendall(ask("/answers/request/id", f"x-request-id: n{number}"))
            status, headers, body = read_answer(file)
            assert (status, body.decode(), headers["x-request-id"]) == (200, f"n{number}", f"n{number}")


def test_pipelined_requests_are_answered_in_their_order(apps):
    paths = ["/answers/sleep?s=0.2", "/answers/request/id", "/nowhere", "/blocking", "/answers/request/id"]
    with apps.connect() as sock, sock.makefile("rb") as file:
        sock.sendall(b"".join(ask(path, f"x-request-id: p{number}") for number, path in enumerate(paths)))
        answers = [read_answer(file) for _ in paths]
    assert [status for status, _, _ in answers] == [200, 200, 404, 200, 200]
    assert [headers["x-request-id"] for _, headers, _ in answers] == ["p0", "p1", "p2", "p3", "p4"]
    assert [body for _, _, body in answers][::4] == [b"slept", b"p4"]


def test_the_proxies_own_routes(http):
    assert http.get("/-/healthz").text == "ok"
    assert http.get("/-/readyz").text == "ready"
    routes = http.get("/-/routes").json()
    assert routes["/answers"] == "answers/Answers"
    assert http.get("/-/nothing").status_code == 404
    answers = 'application="answers",deployment="Answers"'
    counted = f'dask_serve_http_requests_total{{{answers},status="200"}}'
    before = metric(http, counted)
    sent = f"dask_serve_router_sent_total{{{answers}}}"
    router_before = metric(http, sent)
    for _ in range(5):
        http.get("/answers/str")
    assert metric(http, counted) == before + 5
    assert metric(http, sent) == router_before + 5
    assert metric(http, f"dask_serve_http_request_seconds_count{{{answers}}}") >= 5


def test_two_proxies_share_the_port(apps):
    seen = set()
    for _ in range(40):
        with apps.http() as http:
            seen.add(http.get("/nowhere").json()["request_id"].partition("-")[0])
    assert len(seen) == 2


# -- a replica's death ---------------------------------------------------------------------------------------


def kill(path: Path) -> None:
    """Kill the replica's process that left its number in a file."""
    wait_until(lambda: words(path))
    os.kill(int(words(path)[0]), signal.SIGKILL)


def kill_during(service: Service, path: Path, method: str) -> tuple[httpx.Response, float]:
    """Kill the replica's process while a request runs there; return the answer, and how long it took to come."""
    with service.http() as http, ThreadPoolExecutor(1) as pool:
        running = pool.submit(http.request, method, "/victim", headers={"x-marker": str(path)})
        kill(path)
        began = time.monotonic()
        return running.result(), time.monotonic() - began


def test_a_replica_that_dies(apps, tmp_path):
    apps.deploy(Victim, "victim", num_replicas=2, max_replicas_per_worker=1)

    seen: set[str] = set()

    def replaced():
        """Both are ready, and the killed one is not among them any more."""
        replicas = serve.status(client=apps.client).applications["victim"].deployments["Victim"].replicas
        ready = {replica.id for replica in replicas if replica.state == "ready"}
        if len(ready) < 2 or ready == seen:
            return False
        seen.clear()
        seen.update(ready)
        return True

    wait_until(replaced)
    # What may not run twice is answered at once.
    answer, seconds = kill_during(apps, tmp_path / "post", "POST")
    assert answer.status_code == 502
    assert "was lost" in answer.json()["message"]
    assert seconds < 1
    # What may is sent to the other replica.
    wait_until(replaced)
    answer, seconds = kill_during(apps, tmp_path / "get", "GET")
    assert (answer.status_code, answer.text) == (200, "survived")
    assert seconds < 1
    # Unless the client has got a part of the answer.
    wait_until(replaced)
    stream = tmp_path / "stream"
    with apps.http() as http, http.stream("GET", "/victim?stream", headers={"x-marker": str(stream)}) as answer:
        chunks = answer.iter_raw()
        assert next(chunks) == b"first"
        kill(stream)
        with pytest.raises(httpx.RemoteProtocolError):
            next(chunks)
    assert len(words(stream)) == 1


def test_nothing_of_the_proxies_own_went_wrong(apps):
    """Runs last: no traceback of the server in the log, only those of user code."""
    text = apps.log.read_text()
    assert "Exception in ASGI application" not in text
    assert "without completing" not in text
