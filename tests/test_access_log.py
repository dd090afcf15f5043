"""What a service of real processes writes: the access log, request ids, times on demand, and nothing of any payload."""

from __future__ import annotations

import base64
import contextlib
import functools
import itertools
import json
import re
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from distributed import Client
from helpers import http_client, wait_until
from processes import Processes, free_port

import dask_serve as serve
from dask_serve.cli.logs import Source
from dask_serve.exceptions import ConfigError
from dask_serve.proxy.access import Access, AccessLog, chosen
from dask_serve.records import ACCESS

SECRET = "hunter2-very-secret"


@serve.deployment(log_level="DEBUG", max_ongoing_requests=4)
class Model:
    def __init__(self) -> None:
        import logging

        self.log = logging.getLogger(type(self).__module__)

    async def __call__(self, request):
        import asyncio

        from starlette.responses import Response, StreamingResponse

        path = request.url.path
        self.log.debug("asked for %s", path)
        print("printed", path, sep=": ")
        if path == "/nap":
            await asyncio.sleep(0.25)
        elif path == "/fail":
            raise ValueError("wrong")
        elif path == "/length":
            return Response(b"four", headers={"content-length": "400"})
        elif path == "/stream":

            async def pieces():
                for _ in range(3):
                    await asyncio.sleep(0.1)
                    yield "piece"

            return StreamingResponse(pieces())
        return {"path": path}

    def double(self, x):
        return x * 2

    @serve.batch(max_batch_size=4)
    async def together(self, xs):
        raise KeyError("a batch fails")


class Running:
    def __init__(self, processes: Processes, client: Client) -> None:
        self.processes = processes
        self.client = client
        self.source = Source(client)
        self.records: list[dict[str, Any]] = []
        self.handle = serve.run(Model.bind(), name="shop", client=client)
        self.url = serve.url(client=client)

    def find(self, **wanted: Any) -> list[dict[str, Any]]:
        """Records that match."""
        self.records += self.source.read()
        return [record for record in self.records if all(record.get(key) == wanted[key] for key in wanted)]

    def written(self) -> list[dict[str, Any]]:
        """What the proxy has written to the access log."""
        lines = [line for line in self.processes.log("scheduler").splitlines() if line.startswith('{"time"')]
        return [told for line in lines if (told := json.loads(line))["logger"] == ACCESS]


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Running]:
    processes = Processes(tmp_path_factory.mktemp("logs"))
    address = f"tcp://127.0.0.1:{free_port()}"
    port = address.rpartition(":")[2]
    processes.dask("scheduler", "scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard")
    processes.dask("worker", "worker", address, "--no-dashboard", "--nthreads", "2", "--no-nanny")
    try:
        with Client(address, set_as_default=False, timeout=30) as client:
            client.wait_for_workers(1, timeout=30)
            cors = ("starlette.middleware.cors:CORSMiddleware", {"allow_origins": ["https://a.example"]})
            options = {"access_log": True, "log_format": "json", "log_level": "DEBUG", "middleware": [cors]}
            serve.start(port=0, client=client, **options)
            yield Running(processes, client)
            serve.shutdown(client=client)
    finally:
        processes.close()


def test_each_request_is_a_line(running):
    with http_client(running.url) as http:
        assert http.get("/here", params={"q": SECRET}, headers={"x-request-id": "r-1"}).status_code == 200
        assert http.get("/fail", headers={"x-request-id": "r-2"}).status_code == 500
    (line,) = wait_until(lambda: [told for told in running.written() if told.get("request_id") == "r-1"])
    assert (line["method"], line["path"], line["status"]) == ("GET", "/here", 200)
    assert (line["application"], line["deployment"], line["level"]) == ("shop", "Model", "INFO")
    assert 0 < line["seconds"] < 10
    (line,) = wait_until(lambda: [told for told in running.written() if told.get("request_id") == "r-2"])
    assert line["status"] == 500
    (record,) = wait_until(lambda: running.find(logger=ACCESS, request="r-1"))
    assert re.fullmatch(r'127.0.0.1:\d+ "GET /here HTTP/1.1" 200 \d+\.\d{3}ms shop/Model r-1', record["message"])
    # The deployment's own level lets DEBUG pass, and the record knows its request.
    (record,) = wait_until(lambda: running.find(message="asked for /here"))
    assert (record["level"], record["deployment"], record["request"]) == ("DEBUG", "Model", "r-1")
    (record,) = running.find(message="printed: /here")
    assert (record["logger"], record["deployment"], record["request"]) == ("print", "Model", "r-1")
    assert running.processes.log("worker").count("printed: /here\n") == 1


def silent(heard: Any) -> bool:
    return not heard()


def test_levels_change_without_a_restart(running):
    replica = serve.status(client=running.client).applications["shop"].deployments["Model"].replicas[0].id
    for level, told in (("INFO", False), ("DEBUG", True), (None, False), ("DEBUG", True)):
        serve.run(Model.options(log_level=level).bind(), name="shop", client=running.client)
        path = f"/level-{level}-{len(running.records)}"

        def heard(path: str = path) -> bool:
            with http_client(running.url) as http:
                http.get(path)
            return bool(running.find(message=f"asked for {path}"))

        if told:
            wait_until(heard)
        else:
            wait_until(functools.partial(silent, heard), timeout=5)
    again = serve.status(client=running.client).applications["shop"].deployments["Model"].replicas[0].id
    assert again == replica


def test_answers_of_middleware_have_an_id_and_a_line(running):
    with http_client(running.url) as http:
        asked = {"origin": "https://a.example", "access-control-request-method": "GET"}
        preflight = http.options("/here", headers={**asked, "x-request-id": "pre-1"})
        assert (preflight.status_code, preflight.headers["x-request-id"]) == (200, "pre-1")
        assert http.options("/here", headers=asked).headers["x-request-id"]
        answer = http.get("/here", headers={"origin": "https://a.example", "x-request-id": "cors-1"})
        assert answer.headers.get_list("x-request-id") == ["cors-1"]
    lines = wait_until(lambda: [told for told in running.written() if told.get("request_id") == "pre-1"])
    assert [(line["method"], line["status"]) for line in lines] == [("OPTIONS", 200)]
    lines = wait_until(lambda: [told for told in running.written() if told.get("request_id") == "cors-1"])
    assert len(lines) == 1


def test_what_websockets_refuses_has_an_id(running):
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        sock.sendall(
            b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Key: short\r\nSec-WebSocket-Version: 13\r\nX-Request-ID: ws-1\r\n\r\n"
        )
        answer = b""
        while piece := sock.recv(65536):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 4")
    assert b"x-request-id: ws-1\r\n" in answer.lower()


LARGE = "x" * 70_000


@pytest.mark.parametrize(
    ("request_", "line"),
    [
        (f"GET /a?q={SECRET} HTTP/1.1\r\nX-Request-ID: raw-1\r\n\r\n", ("GET", "/a", 400, "raw-1")),
        (f"POST /b HTTP/1.1\r\nHost: a\r\nX-Request-ID: raw-2\r\nX-L: {LARGE}\r\n\r\n", ("POST", "/b", 431, "raw-2")),
        (f"GET /c?q={SECRET}\x01 HTTP/1.1\r\n\r\n", ("-", "-", 400, None)),
        (f"NO HTTP {SECRET}\r\n\r\n", ("-", "-", 400, None)),
        (
            "POST /d HTTP/1.1\r\nHost: a\r\nX-Request-ID: raw-5\r\nTransfer-Encoding: chunked\r\n\r\nno size\r\n",
            ("POST", "/d", 400, "raw-5"),
        ),
    ],
    ids=["host", "large", "target", "method", "chunk"],
)
def test_what_the_parser_refuses_is_a_line(running, request_, line):
    host, port = running.url.removeprefix("http://").split(":")
    seen = len(running.written())
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        sock.sendall(request_.encode("latin-1"))
        answer = sock.recv(65536).decode()
    id = re.search(r"x-request-id: (\S+)", answer)[1]
    assert id == (line[3] or id)
    lines = wait_until(lambda: running.written()[seen:])
    (told,) = [one for one in lines if one["request_id"] == id]
    assert (told["method"], told["path"], told["status"]) == line[:3]
    assert "application" not in told
    (record,) = wait_until(lambda: running.find(logger=ACCESS, request=id))
    assert SECRET not in json.dumps([told, record])


def test_a_wrong_length_is_one_line(running):
    with http_client(running.url) as http, contextlib.suppress(Exception):
        http.get("/length", headers={"x-request-id": "len-1"})
    wait_until(lambda: "len-1" in running.processes.log("scheduler"))
    lines = [line for line in running.processes.log("scheduler").splitlines() if "Content-Length" in line]
    assert len(lines) == 1
    assert "Request len-1: " in lines[0]
    assert "Traceback" not in running.processes.log("scheduler")


def timing(headers: Any) -> dict[str, float]:
    return {
        part.split(";dur=")[0].strip(): float(part.split(";dur=")[1]) for part in headers["server-timing"].split(",")
    }


def test_times_on_demand(running):
    asks = {"x-request-server-timing": "1"}
    with http_client(running.url) as http:
        plain = http.get("/nap")
        assert "server-timing" not in plain.headers
        answer = http.get("/nap", headers=asks)
        assert not [name for name in answer.headers if name.startswith("x-dask-serve")]
        times = timing(answer.headers)
        elapsed = answer.elapsed.total_seconds() * 1e3
        assert 250 <= times["service"] < 250 + 200
        assert times["queue"] + times["service"] <= times["total"] <= elapsed
        stream = timing(http.get("/stream", headers=asks).headers)
        assert stream["service"] <= stream["total"] < 280
        assert timing(http.get("/fail", headers=asks).headers).keys() == {"total"}


def test_times_tell_of_the_queue(running):
    from concurrent.futures import ThreadPoolExecutor

    def ask(_: int) -> dict[str, float]:
        with http_client(running.url) as http:
            return timing(http.get("/nap", headers={"x-request-server-timing": "1"}).headers)

    with ThreadPoolExecutor(8) as pool:
        found = sorted(pool.map(ask, range(8)), key=lambda times: times["queue"])
    # Four at a time: the other four waited for as long as those took.
    assert all(times["queue"] < 200 for times in found[:4])
    assert all(200 <= times["queue"] <= times["total"] - 240 for times in found[4:])


def test_nothing_of_a_payload_is_logged(running):
    from dask_serve.exceptions import RequestError

    header = {"x-private": SECRET, "authorization": f"Bearer {SECRET}", "cookie": f"a={SECRET}"}
    with http_client(running.url) as http:
        for path, more in (("/ok", {}), ("/fail", {}), ("/nap", {"x-request-timeout-seconds": "0.05"})):
            http.post(path, content=SECRET, params={"q": SECRET}, headers={**header, **more, "x-request-id": "last"})
        http.post("/ok", content=SECRET, headers={**header, "x-request-timeout-seconds": SECRET})
    calls = [running.handle.double.remote(SECRET), running.handle.together.remote(SECRET)]
    calls += [running.handle.double.remote(SECRET, SECRET, key=SECRET), running.handle.missing.remote(SECRET)]
    calls.append(running.handle.double.options(request_timeout_s=1e-4).remote(SECRET))
    for call in calls:
        with contextlib.suppress(RequestError, KeyError, TypeError):
            call.result(timeout=10)
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        sock.sendall(f"NO HTTP {SECRET}\r\n\r\n".encode())
        sock.recv(1000)
    wait_until(lambda: len([1 for told in running.written() if told.get("request_id") == "last"]) == 3)
    running.find()
    forms = (SECRET, base64.b64encode(SECRET.encode()).decode()[:12])
    told = [json.dumps(running.records), *(running.processes.log(name) for name in ("scheduler", "worker"))]
    assert "a batch fails" in "".join(told), "errors are logged"
    for form in forms:
        assert not [line for text in told for line in text.splitlines() if form in line]


# -- the parts ---------------------------------------------------------------------------------------------------------


def access(status: int = 200, path: bytes = b"/", **changes: Any) -> Access:
    fields = (1.5, ("1.2.3.4", 5), "GET", path, "1.1", status, 0.25, "shop/Model", "id-1")
    return Access(*fields)._replace(**changes)


def test_too_many_are_sampled_and_told():
    lines: list[str] = []
    log = AccessLog(10, "text", lines.append)
    log.accesses += [access(status=200 if number % 100 else 503) for number in range(1000)]
    log.flush()
    told = lines[0].splitlines()
    assert len(told) == 11
    assert sum('" 503 ' in line for line in told) == 10
    assert re.search(r"990 of 1000 requests of 0\.\d s are left out \(access_log_limit=10\)", told[-1])
    assert log.accesses == []
    log.flush()
    assert len(lines) == 1


@pytest.mark.parametrize("most", [1, 7, 10, 99, 100, 200])
def test_a_sample_is_spread_evenly(most):
    accesses = [access(time=float(number)) for number in range(100)]
    found = [entry[0] for entry in chosen(accesses, most)]
    assert found == sorted(set(found))
    assert len(found) == min(most, 100)
    if 1 < most < 100:
        assert max(b - a for a, b in itertools.pairwise(found)) <= 100 // most + 1


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_path_cannot_look_like_another_line(form):
    lines: list[str] = []
    log = AccessLog(10, form, lines.append)
    log.accesses.append(access(path=b"/a\xe9\n\x1b[2J", client=None, deployment=""))
    log.flush()
    assert lines[0].count("\n") == 1
    assert lines[0].isascii()
    if form == "json":
        assert "application" not in json.loads(lines[0])


def test_options_are_checked():
    with pytest.raises(ConfigError, match='option log_level = \'LOUD\' is not valid: it is "DEBUG", "INFO"'):
        Model.options(log_level="LOUD")
    assert Model.options(logging_config={"log_level": "ERROR"}).all_options.log_level == "ERROR"
    with pytest.raises(ConfigError, match="logging_config\\['encoding'\\] has no counterpart"):
        Model.options(logging_config={"encoding": "JSON"})
