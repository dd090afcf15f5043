"""Two clusters behind one balancer: the second one takes over, the first one ends, and no request fails."""

from __future__ import annotations

import http.client
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from distributed import Client
from helpers import Going, http_client, wait_until
from processes import Processes, free_port

import dask_serve as serve

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
PAGE = Path(serve.__file__).parents[1] / "docs" / "clusters" / "upgrades.md"
CLIENTS = 8


def configuration(directory: Path, **ports: int) -> Path:
    """Write the configuration of the documentation, with other ports and another file to look for."""
    [text] = re.findall(r"```nginx\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for name, old in (("blue", 8001), ("green", 8002), ("public", 8000)):
        assert text.count(f"127.0.0.1:{old};") == 1
        text = text.replace(f"127.0.0.1:{old};", f"127.0.0.1:{ports[name]};")
    assert "/etc/nginx/green" in text
    text = text.replace("/etc/nginx/green", str(directory / "green"))
    user = "user root;\n" if os.geteuid() == 0 else ""
    places = "".join(
        f"{kind}_temp_path {directory};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    text = text.replace("http {\n", f"http {{\naccess_log off;\n{places}", 1)
    path = directory / "nginx.conf"
    path.write_text(f"{user}daemon off;\npid {directory}/nginx.pid;\nerror_log {directory}/error.log;\n{text}")
    return path


class Cluster:
    """A scheduler and a worker."""

    def __init__(self, processes: Processes, name: str) -> None:
        self.processes, self.name = processes, name
        self.port, self.http = free_port(), free_port()
        self.address = f"tcp://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.processes.dask(
            *(self.name, "scheduler", "--host", "127.0.0.1", "--port", str(self.port), "--dashboard-address", ":0"),
            *("--preload", "dask_serve.preload", "--serve-port", str(self.http)),
        )
        self.processes.dask(
            *(f"{self.name}-worker", "worker", self.address, "--nthreads", "2", "--no-nanny", "--no-dashboard"),
            *("--memory-limit", "0"),
        )
        name = self.name

        @serve.deployment
        class App:
            async def __call__(self, request: Any) -> str:
                import asyncio

                await request.body()
                if "mark" in request.query_params:
                    Path(request.query_params["mark"]).touch()
                    await asyncio.sleep(3)
                return name

        with Client(self.address, set_as_default=False, timeout=30) as client:
            serve.run(App.bind(), client=client, timeout=60)

    def end(self) -> None:
        assert self.processes.serve("shutdown", "shutdown", "--scheduler", self.address).wait(60) == 0
        self.processes.end(f"{self.name}-worker")
        self.processes.end(self.name)


class Load(Going):
    """Clients that keep their connections, and send one request after the other."""

    def __init__(self, port: int) -> None:
        super().__init__(CLIENTS)
        self.port = port
        self.answers: Counter[bytes] = Counter()
        self.failed: list[Any] = []

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        number = 0
        while not self.ended.is_set():
            number += 1
            try:
                connection.request(*(("POST", "/", b"x" * 100) if number % 2 else ("GET", "/")))
                answer = connection.getresponse()
                body = answer.read()
            except (OSError, http.client.HTTPException) as error:
                self.failed.append(repr(error))
                connection.close()
            else:
                self.answers[body] += 1
                if answer.status != 200:
                    self.failed.append((answer.status, body))
        connection.close()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.slow
@pytest.mark.skipif(NGINX is None, reason="needs nginx: apt install nginx-light")
def test_another_cluster_takes_over(processes: Processes, tmp_path: Path) -> None:
    blue, green, public = Cluster(processes, "blue"), Cluster(processes, "green"), free_port()
    blue.start()
    assert NGINX is not None
    path = configuration(tmp_path, blue=blue.http, green=green.http, public=public)
    processes.start("nginx", NGINX, "-p", str(tmp_path), "-c", str(path))
    wait_until(lambda: (tmp_path / "nginx.pid").exists())
    with (
        http_client(f"http://127.0.0.1:{public}", timeout=30) as http,
        ThreadPoolExecutor(1) as pool,
        Load(public) as load,
    ):
        green.start()
        assert http.get("/").text == "blue"
        # It is under way while the balancer switches, and blue begins to end.
        late = pool.submit(http.get, "/", params={"mark": str(tmp_path / "mark")})
        wait_until(lambda: (tmp_path / "mark").exists())
        (tmp_path / "green").touch()
        wait_until(lambda: load.answers[b"green"] > 100)
        blue.end()
        assert late.result().text == "blue"
        seen = load.answers[b"green"]
        wait_until(lambda: load.answers[b"green"] > seen + 100)
    assert load.failed == []
    assert set(load.answers) == {b"blue", b"green"}
    print(f"{load.answers.total()} requests, none failed")
