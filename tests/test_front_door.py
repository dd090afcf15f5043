"""The front door of a service of real processes: who may come in, by which way, and what if parts are away."""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import httpx
import pytest
from certificates import Authority
from distributed import Client, LocalCluster
from distributed.security import Security
from helpers import embedded_client, wait_until
from starlette.requests import Request

import dask_serve as serve
from dask_serve.config import HTTPOptions
from dask_serve.controller.remote import configured_here
from dask_serve.embedded import EmbeddedCluster
from dask_serve.exceptions import ConfigError

ROOT = Path(serve.__file__).parents[1]
TOKEN, OTHER, THIRD = "a" * 20 + "1", "b" * 20 + "2", "c" * 20 + "3"


class Echo:
    async def __call__(self, request: Request) -> Any:
        if request.url.path.endswith("/slow"):
            import asyncio

            await asyncio.sleep(0.05)
        if request.url.path.endswith("/long"):
            return "x" * 10_000
        body = await request.body()
        return {
            "path": request.url.path,
            "root_path": request.scope["root_path"],
            "client": request.client and request.client.host,
            "url": str(request.url),
            "size": len(body),
            "traceparent": request.headers.get("traceparent"),
        }


def get(url: str, **options: Any) -> httpx.Response:
    # The default, to trust all the world's authorities, takes long to load.
    return httpx.get(url, **{"timeout": 20, "verify": False, **options})


def post(url: str, content: bytes = b"") -> httpx.Response:
    return httpx.post(url, content=content, timeout=20, verify=False)


class Service:
    def __init__(self, client: Client, cluster: EmbeddedCluster) -> None:
        self.client = client
        self.cluster = cluster
        self.url = serve.url(client=client)

    @contextlib.contextmanager
    def changed(self, **options: Any) -> Iterator[str]:
        """Change options of the running service for a while."""
        defaults = HTTPOptions()
        self.url = serve.start(client=self.client, **options)
        try:
            yield self.url
        finally:
            before = {name: getattr(defaults, name) for name in options}
            self.url = serve.start(client=self.client, **before)

    def get(self, path: str = "/echo", **options: Any) -> httpx.Response:
        return get(self.url + path, **options)

    def always(self, path: str, token: str) -> set[int]:
        """Return the statuses of so many requests that each proxy hardly can have had none."""
        return {self.get(path, headers=bearer(token)).status_code for _ in range(20)}

    def proxies(self) -> list[dict[str, Any]]:
        rows = serve.status(client=self.client).proxies
        return [row for row in rows if row.state == "ready"]

    def pids(self) -> list[int]:
        return [row.pid for row in self.proxies()]


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    cluster = EmbeddedCluster.start(n_workers=2, nthreads=1, dashboard_address=None)
    with cluster, Client(cluster.scheduler_address, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=30)
        serve.start(port=0, num_proxies=2, client=client)
        echo = serve.deployment(Echo)
        serve.run(echo.bind(), name="echo", route_prefix="/echo", client=client)
        small = echo.options(name="Small", body_limit=10)
        serve.run(small.bind(), name="small", route_prefix="/small", client=client)
        yield (made := Service(client, cluster))
        del made


def write_tokens(path: Path, *tokens: str) -> Path:
    path.touch(mode=0o600)
    path.write_text("# who may come in\n\n" + "\n".join(tokens) + "\n")
    return path


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


# -- errors ------------------------------------------------------------------------------------------------------------


def test_errors_are_json_or_text(service):
    answer = service.get("/nowhere", headers={"X-Request-ID": "mine"})
    assert answer.status_code == 404
    assert answer.json()["type"] == "NotFound"
    assert answer.json()["request_id"] == answer.headers["x-request-id"] == "mine"
    assert set(answer.json()) == {"type", "message", "request_id"}
    for accept in ("text/plain", "text/*", "text/plain, application/json;q=0.5", "text/html, text/plain;q=0.9"):
        answer = service.get("/nowhere", headers={"Accept": accept})
        assert answer.headers["content-type"] == "text/plain; charset=utf-8", accept
        assert "no application answers /nowhere" in answer.text
        assert answer.headers["x-request-id"] in answer.text
    for accept in ("*/*", "application/json", "text/plain;q=0.1, */*", "text/html,application/xml;q=0.9,*/*;q=0.8"):
        assert service.get("/nowhere", headers={"Accept": accept}).json()["type"] == "NotFound"


def test_errors_of_the_protocol_and_of_own_routes_have_the_same_form(service):
    answer = service.get("/echo", headers={"X-Request-ID": "mine", "X-Large": "a" * 100_000})
    assert (answer.status_code, answer.json()["type"]) == (431, "HeadTooLarge")
    assert answer.headers["connection"] == "close"
    assert answer.json()["request_id"] == answer.headers["x-request-id"] == "mine"
    answer = service.get("/-/nothing")
    assert (answer.status_code, answer.json()["type"]) == (404, "NotFound")
    answer = post(service.url + "/-/healthz")
    assert (answer.status_code, answer.json()["type"]) == (405, "MethodNotAllowed")
    assert sorted(answer.headers["allow"].split(", ")) == ["GET", "HEAD"]


def test_a_deployments_own_body_limit(service):
    assert post(service.url + "/small", content=b"x" * 10).json()["size"] == 10
    answer = post(service.url + "/small", content=b"x" * 11)
    assert (answer.status_code, answer.json()["type"]) == (413, "BodyTooLarge")
    assert "10 bytes" in answer.json()["message"]
    assert post(service.url + "/echo", content=b"x" * 11).json()["size"] == 11


def test_traceparent_reaches_the_replica(service):
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    assert service.get(headers={"traceparent": trace}).json()["traceparent"] == trace


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_tokens(service, tmp_path):
    path = write_tokens(tmp_path / "tokens", TOKEN, OTHER)
    own = write_tokens(tmp_path / "own", THIRD)
    with service.changed(tokens_file=str(path), application_tokens={"small": str(own)}):
        for headers in ({}, bearer("wrong"), bearer(THIRD), {"Authorization": f"Basic {TOKEN}"}, bearer(TOKEN[:-1])):
            for route in ("/echo", "/nowhere", "/-/routes", "/-/metrics"):
                answer = service.get(route, headers=headers)
                assert (answer.status_code, answer.json()["type"]) == (401, "Unauthorized"), route
                assert answer.headers["www-authenticate"].startswith("Bearer")
        for token in (TOKEN, OTHER):
            assert service.get(headers=bearer(token)).status_code == 200
            assert service.get("/-/routes", headers=bearer(token)).status_code == 200
        assert service.get("/nowhere", headers=bearer(TOKEN)).status_code == 404
        assert service.get("/small", headers=bearer(TOKEN)).status_code == 401
        assert service.get("/small", headers=bearer(THIRD)).status_code == 200
        assert service.get("/-/healthz").status_code == 200
        assert service.get("/-/readyz").status_code == 200

        pids = service.pids()
        new = write_tokens(tmp_path / "new", THIRD)
        new.replace(path)
        wait_until(lambda: service.always("/echo", THIRD) == {200})
        assert service.get(headers=bearer(TOKEN)).status_code == 401
        # What cannot be used changes nothing; a proxy that has read the other file has seen it.
        path.write_text("short\n")
        own.write_text(f"{TOKEN}\n")
        wait_until(lambda: service.always("/small", TOKEN) == {200})
        assert service.always("/echo", THIRD) == {200}
        assert service.pids() == pids
    with service.changed(application_tokens={"small": str(own)}):
        assert service.get().status_code == 200
        assert service.get("/small").status_code == 401


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        (TOKEN, 0o644, "others may read"),
        ("", 0o600, "holds no token"),
        ("short", 0o600, "at least 16"),
        (None, 0o600, "cannot read"),
    ],
)
def test_a_file_of_tokens_that_cannot_be_used(service, tmp_path, text, mode, said):
    path = tmp_path / "tokens"
    if text is not None:
        path.write_text(text)
        path.chmod(mode)
    pids = service.pids()
    with pytest.raises(ConfigError, match=said):
        serve.start(tokens_file=str(path), client=service.client)
    assert service.get().status_code == 200
    assert service.pids() == pids


# -- TLS ---------------------------------------------------------------------------------------------------------------


def context(authority: Authority, pair: tuple[Path, Path] | None = None) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=str(authority.path))
    if pair is not None:
        made.load_cert_chain(*pair)
    return made


def test_tls_with_reload(service, tmp_path):
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    (tmp_path / "password").touch(mode=0o600)
    (tmp_path / "password").write_text("secret\n")
    certificate, key = old.issue("server", b"secret")
    files = {
        "tls_certificate": str(certificate),
        "tls_key": str(key),
        "tls_key_password_file": str(tmp_path / "password"),
        "tls_client_ca": str(old.path),
    }
    mine, theirs = old.issue("mine"), new.issue("theirs")
    with service.changed(**files) as url:
        assert url.startswith("https://")
        assert serve.url(client=service.client) == url
        answer = service.get(verify=context(old, mine))
        assert answer.json()["url"].startswith("https://")
        for refused in (context(old), context(old, theirs), context(new, mine)):
            with pytest.raises(httpx.TransportError):
                service.get(verify=refused)
        pids = service.pids()
        again, key_again = new.issue("again", b"secret")
        again.replace(certificate)
        key_again.replace(key)
        (tmp_path / "new.pem").replace(tmp_path / "old.pem")
        new.path = old.path

        def is_new() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return all(service.get(verify=context(new, theirs)).status_code == 200 for _ in range(8))
            return False

        wait_until(is_new)
        with pytest.raises(httpx.TransportError):
            service.get(verify=context(new, mine))
        assert service.pids() == pids
    assert service.url.startswith("http://")
    assert service.get().status_code == 200


def test_certificates_that_cannot_be_used(service, tmp_path):
    certificate, key = Authority(tmp_path, "ca").issue("server", b"secret")
    with pytest.raises(ConfigError, match="belong together"):
        serve.start(tls_key=str(key), client=service.client)
    with pytest.raises(ConfigError, match="tls_key_password_file"):
        serve.start(tls_certificate=str(certificate), tls_key=str(key), client=service.client)
    with pytest.raises(ConfigError, match=r"tls_certificate=.*No such file"):
        serve.start(tls_certificate="/nothing", tls_key=str(key), client=service.client)
    assert service.get().status_code == 200


# -- ways in -----------------------------------------------------------------------------------------------------------


def test_a_unix_socket(service, tmp_path):
    path = tmp_path / "socket"
    with service.changed(unix_socket=str(path)) as url:
        assert url == f"unix:{path}"
        assert path.stat().st_mode & 0o777 == 0o660
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://here") as http:
            answers = [http.get("/echo").json() for _ in range(5)]
            assert answers[0]["url"] == "http://here/echo"
            assert "/echo" in http.get("/-/routes").json()
        victim = service.pids()[0]
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: len(service.pids()) == 2 and victim not in service.pids())
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://here") as http:
            assert http.get("/echo").status_code == 200
    assert not path.exists()
    assert service.get().status_code == 200
    path.write_text("a file")
    with pytest.raises(ConfigError, match="not a socket"):
        serve.start(unix_socket=str(path), client=service.client)


def test_behind_a_reverse_proxy(service):
    forwarded = {
        "X-Forwarded-For": "198.51.100.7, 203.0.113.9, 10.0.0.1",
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Host": "models.example",
    }
    seen = service.get(headers=forwarded).json()
    assert (seen["client"], seen["url"]) == ("127.0.0.1", f"{service.url}/echo")
    with service.changed(root_path="/models", trusted_proxies=["127.0.0.0/8", "10.0.0.1"]):
        seen = service.get("/echo/x", headers=forwarded).json()
        assert seen["client"] == "203.0.113.9"
        assert seen["url"] == "https://models.example/models/echo/x"
        assert (seen["path"], seen["root_path"]) == ("/models/echo/x", "/models/echo")
        # Routes and metrics are not for those who come through it.
        for path in ("/-/routes", "/-/metrics"):
            assert service.get(path, headers=forwarded).status_code == 404
            assert service.get(path).status_code == 200
        assert "/small" not in service.get("/nowhere", headers=forwarded).text
        assert "/small" in service.get("/nowhere").text
        assert service.get("/-/readyz", headers=forwarded).status_code == 200
        assert service.get(headers={"X-Forwarded-For": "no address", "X-Forwarded-Proto": "gopher"}).json()["url"]


def test_listings_are_hidden_from_the_clients_of_a_proxy_that_is_not_trusted(service):
    for name in ("X-Forwarded-For", "Forwarded", "X-Real-IP", "Via"):
        assert service.get("/-/routes", headers={name: "127.0.0.1"}).status_code == 404
        assert "/small" not in service.get("/nowhere", headers={name: "127.0.0.1"}).text


def test_listings_are_hidden_off_the_loopback_interface(service):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("there is no other interface")
        address = probe.getsockname()[0]
    if address.startswith("127."):
        pytest.skip("there is no other interface")
    with service.changed(host="0.0.0.0"):
        there = service.url.replace("127.0.0.1", address)
        assert get(there + "/echo").status_code == 200
        assert get(there + "/-/routes").status_code == 404
        assert "/small" not in get(there + "/nowhere").text
        assert service.get("/-/routes").status_code == 200


def test_admin_ports(service):
    with service.changed(admin_port=0):
        rows = service.proxies()
        admins = [row.admin for row in rows]
        assert len(set(admins)) == 2
        for admin in admins:
            assert get(admin + "/-/routes").json()["/echo"] == "echo/Echo"
            assert "dask_serve_http_connections" in get(admin + "/-/metrics").text
            assert get(admin + "/-/healthz").text == "ok"
            assert get(admin + "/echo").status_code == 404
        assert service.get("/-/routes").status_code == 404
        assert service.get("/-/metrics").status_code == 404
        assert "/small" not in service.get("/nowhere").text
        assert service.get("/-/readyz").text == "ready"
        os.kill(rows[0].pid, signal.SIGKILL)
        assert get(admins[0] + "/-/routes", timeout=10).status_code == 200
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"admin port {port}"):
            serve.start(admin_port=port, client=service.client)
    assert service.get().status_code == 200
    assert service.get("/-/routes").status_code == 200


def test_middleware(service):
    cors = {"allow_origins": ["https://page.example"], "allow_methods": ["GET", "POST"]}
    middleware = [
        ["starlette.middleware.cors:CORSMiddleware", cors],
        ["starlette.middleware.gzip:GZipMiddleware", {"minimum_size": 500}],
    ]
    with service.changed(middleware=middleware):
        with httpx.Client(base_url=service.url) as http:
            answer = http.get("/echo/long", headers={"Origin": "https://page.example"})
            assert answer.headers["content-encoding"] == "gzip"
            assert answer.headers["access-control-allow-origin"] == "https://page.example"
            assert answer.text == "x" * 10_000
            with http.stream("GET", "/echo/long") as raw:
                assert gzip.decompress(b"".join(raw.iter_raw())) == b"x" * 10_000
            assert http.post("/echo", content=b"y" * 100_000).json()["size"] == 100_000
            preflight = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
            answer = http.options("/echo", headers=preflight)
            assert (answer.status_code, answer.headers["access-control-allow-methods"]) == (200, "GET, POST")
            assert http.get("/nowhere").json()["type"] == "NotFound"
            assert http.head("/echo/long").content == b""
    for path, said in [
        ("no.such.module:Thing", "No module named 'no'"),
        ("starlette.middleware.gzip:Nothing", "no attribute 'Nothing'"),
        (["starlette.middleware.gzip:GZipMiddleware", {"size": 1}], "unexpected keyword argument 'size'"),
    ]:
        with pytest.raises(ConfigError, match=said):
            serve.start(middleware=[path], client=service.client)
    assert service.get().status_code == 200


# -- readiness ---------------------------------------------------------------------------------------------------------


def test_ready(service):
    assert service.get("/-/healthz").text == "ok"
    assert service.get("/-/readyz").text == "ready"


# -- parts that are away -----------------------------------------------------------------------------------------------


class Load:
    """Keep-alive clients in threads, that heed ``Connection: close``; counts what failed."""

    def __init__(self, url: str, path: bytes = b"/echo", connections: int = 8) -> None:
        self.answered = 0
        self.failed: list[Any] = []
        self.slowest = 0.0
        self._address = (httpx.URL(url).host, httpx.URL(url).port)
        self._request = b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n"
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(connections)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with socket.create_connection(self._address, timeout=20) as sock, sock.makefile("rb") as file:
                    while not self._stop.is_set():
                        began = time.monotonic()
                        sock.sendall(self._request)
                        if self._read(file):
                            break
                        self.slowest = max(self.slowest, time.monotonic() - began)
            except (OSError, ValueError) as error:
                self.failed.append(repr(error))

    def _read(self, file: Any) -> bool:
        """Read an answer; return whether the connection ends with it."""
        line = file.readline()
        if not line.startswith(b"HTTP/1.1 200"):
            raise ValueError(f"answered {line!r}")
        length, closing = 0, False
        while (line := file.readline().lower()) != b"\r\n":
            if not line:
                raise ValueError("cut off in the head")
            if line.startswith(b"content-length:"):
                length = int(line.split()[1])
            closing = closing or line == b"connection: close\r\n"
        if len(file.read(length)) < length:
            raise ValueError("cut off in the body")
        self.answered += 1
        return closing

    def goes_on(self, count: int) -> None:
        wanted = self.answered + count
        wait_until(lambda: self.answered >= wanted or not any(thread.is_alive() for thread in self._threads), 30)
        assert self.answered >= wanted

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()


def test_options_and_number_of_proxies_change_under_load_without_a_failed_request(service):
    load = Load(service.url, b"/echo/slow")
    try:
        load.goes_on(50)
        for options in ({"body_limit": 10**6}, {"num_proxies": 3}, {"max_headers": 50}, {"num_proxies": 1}):
            before = service.pids()
            assert serve.start(client=service.client, **options) == service.url
            if "num_proxies" in options:
                assert len(service.pids()) == options["num_proxies"]
            else:
                assert not set(before) & set(service.pids())
            load.goes_on(50)
    finally:
        load.stop()
        defaults = HTTPOptions()
        serve.start(
            num_proxies=2, body_limit=defaults.body_limit, max_headers=defaults.max_headers, client=service.client
        )
    assert load.failed == []


def test_a_killed_proxy_is_back_soon(service):
    load = Load(service.url, connections=8)
    load.goes_on(100)
    rows = service.proxies()
    began = time.monotonic()
    os.kill(rows[0].pid, signal.SIGKILL)
    wait_until(lambda: len(service.pids()) == 2 and rows[0].pid not in service.pids())
    seconds = time.monotonic() - began
    load.goes_on(100)
    load.stop()
    assert len(load.failed) <= 8  # one for each connection, at most
    assert seconds < 5  # about half a second on a machine that has nothing else to do
    print(f"back after {seconds:.2f} s, {len(load.failed)} failed")


def scheduler_pid(service: Service) -> int:
    return service.client.run_on_scheduler(os.getpid)


def a_busy_scheduler_is_not_noticed(service: Service, other: str) -> None:
    """Neither by the service's proxies nor by others."""
    pid = scheduler_pid(service)
    load = Load(service.url)
    urls = service.url, other
    try:
        load.goes_on(100)
        load.slowest = 0.0
        os.kill(pid, signal.SIGSTOP)
        try:
            load.goes_on(200)
            for url in urls:
                wait_until(lambda url=url: "the controller is away" in get(url + "/-/readyz").text)
                assert get(url + "/-/readyz").status_code == 200
                assert get(url + "/echo").status_code == 200
            load.goes_on(200)
        finally:
            os.kill(pid, signal.SIGCONT)
        for url in urls:
            wait_until(lambda url=url: get(url + "/-/readyz").text == "ready", 30)
        load.goes_on(100)
    finally:
        load.stop()
    assert load.failed == []
    assert load.slowest < 2


@contextlib.contextmanager
def proxy_command(service: Service, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run ``dask serve proxy`` and give its process and URL."""
    command = [sys.executable, "-m", "dask", "serve", "proxy", "--scheduler", service.cluster.scheduler_address]
    code = "import sys; from dask_serve.cli import serve; serve(sys.argv[1:])"
    command = [sys.executable, "-c", code, *command[4:], "--port", "0", *options]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    try:
        line = process.stdout.readline()
        assert line.startswith("serving at "), line
        yield process, line.split()[-1]
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


def test_where_dask_serve_proxy_listens_may_be_configured():
    """The rest is the service's, whatever this node's configuration says."""
    here = {"serve.http.host": "::1", "serve.http.port": 9000, "serve.http.body_limit": 5}
    with dask.config.set(here):
        assert configured_here() == {"host": "::1", "port": 9000}
    assert configured_here() == {}


def test_dask_serve_proxy(service):
    with proxy_command(service, "--num-proxies", "2", "--http", "max_headers=40") as (process, url):
        assert url != service.url
        # The status of the service knows them.
        wait_until(lambda: [row.url for row in service.proxies()].count(url) == 2)
        assert f"url {url}" in str(serve.status(client=service.client))
        assert get(url + "/echo/x").json()["path"] == "/echo/x"
        assert get(url + "/-/readyz").text == "ready"
        # It follows the table and the options of the service.
        late = serve.deployment(Echo).options(name="Late")
        serve.run(late.bind(), name="late", route_prefix="/late", client=service.client)
        wait_until(lambda: get(url + "/late").status_code == 200)
        with service.changed(body_limit=5):
            wait_until(lambda: post(url + "/echo", content=b"123456").status_code == 413)
        assert get(url + "/echo", headers={f"X-{n}": "x" for n in range(50)}).status_code == 431
        serve.delete("late", client=service.client)
        wait_until(lambda: get(url + "/late").status_code == 404)
        a_busy_scheduler_is_not_noticed(service, url)
        # It drains.
        load = Load(url, b"/echo/slow", connections=4)
        load.goes_on(20)
        process.terminate()
        assert process.wait(30) == 0
        wait_until(lambda: not [row for row in service.proxies() if row.url])
        load._stop.set()
        load.stop()
    assert all("refused" in failure.lower() for failure in load.failed), load.failed


def test_dask_serve_proxy_without_a_service(tmp_path):
    code = "import sys; from dask_serve.cli import serve; serve(sys.argv[1:])"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with socket.socket() as sock:
        # Taken, and nobody listens.
        sock.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{sock.getsockname()[1]}"
        command = [sys.executable, "-c", code, "proxy", "--scheduler", address, "--port", "0"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert re.search(r"Error: no scheduler answers at tcp://\S+: \S", done.stderr)
    assert "Traceback" not in done.stderr


def test_when_the_scheduler_dies_requests_are_held_until_their_deadline():
    """Its workers leave with it; what waits then is told so at its deadline, or when the proxies end."""
    with embedded_client(1, 1) as client:
        url = serve.start(port=0, client=client)
        serve.run(serve.deployment(Echo).bind(), name="echo", route_prefix="/echo", client=client)
        with httpx.Client(base_url=url, timeout=20) as http:
            assert http.get("/echo").status_code == 200
            os.kill(client.run_on_scheduler(os.getpid), signal.SIGKILL)
            statuses = set()
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                try:
                    began = time.monotonic()
                    answer = http.get("/echo", headers={"X-Request-Timeout-Seconds": "1"})
                except httpx.TransportError:
                    break
                statuses.add(answer.status_code)
                if answer.status_code == 504:
                    assert time.monotonic() - began > 0.9
            assert statuses <= {200, 502, 503, 504}


def test_http_on_a_cluster_with_tls():
    """The doors have TLS there, with Dask's certificates."""
    security = Security.temporary()
    options = {"n_workers": 1, "threads_per_worker": 1, "protocol": "tls://", "dashboard_address": ":0"}
    with LocalCluster(security=security, **options) as cluster, Client(cluster, set_as_default=False) as client:
        url = serve.start(port=0, client=client)
        serve.run(serve.deployment(Echo).bind(), client=client)
        assert get(url + "/x").json()["path"] == "/x"
        assert get(url + "/-/readyz").text == "ready"
        serve.shutdown(client=client)
