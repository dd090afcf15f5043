"""A service on a cluster of dask-gateway: the server with its local backend, and sessions that reach only its port."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import pytest
from far_side import FarSide, possible
from helpers import wait_until
from processes import free_port

import dask_serve as serve

missing = [
    name for name in ("dask_gateway", "dask_gateway_server", "sqlalchemy") if importlib.util.find_spec(name) is None
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.gateway,
    pytest.mark.skipif(bool(missing), reason=f"no dask-gateway here ({', '.join(missing)} missing)"),
]

CONFIGURATION = """\
c.DaskGateway.backend_class = "dask_gateway_server.backends.local.UnsafeLocalBackend"
c.DaskGateway.authenticator_class = "dask_gateway_server.auth.SimpleAuthenticator"
c.DaskGateway.address = "127.0.0.1:{api}"
c.Proxy.address = "127.0.0.1:{port}"
c.UnsafeLocalBackend.clusters_directory = "{directory}"
c.ClusterConfig.scheduler_cmd = ["{python}", "-m", "distributed.cli.dask_scheduler"]
c.ClusterConfig.worker_cmd = ["{python}", "-m", "distributed.cli.dask_worker"]
c.ClusterConfig.worker_cores = 1
c.ClusterConfig.worker_memory = "1 G"
"""


@pytest.fixture(autouse=True, scope="module")
def sent_by_value() -> Iterator[None]:
    """Neither the cluster nor the far side has this module."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[int]:
    """Start a gateway's server, and give its port: HTTP and the way to schedulers are one."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "dask_serve").symlink_to(Path(serve.__file__).parent)
    fields = {"api": free_port(), "port": free_port(), "directory": tmp_path, "python": sys.executable}
    file = tmp_path / "gateway.py"
    file.write_text(CONFIGURATION.format(**fields))
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "dask_gateway_server", "-f", str(file)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(site)},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def healthy() -> bool:
        assert process.poll() is None, (tmp_path / "log").read_text()
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{fields['port']}/api/health", timeout=2) as answer,
        ):
            return answer.status == 200
        return False

    children: list[psutil.Process] = []
    try:
        wait_until(healthy)
        yield fields["port"]
        children = psutil.Process(process.pid).children(recursive=True)
    finally:
        # It ends its clusters.
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        finally:
            process.kill()
    wait_until(lambda: not any(child.is_running() for child in children))


def connect(port: int) -> Any:
    """Make a cluster through the gateway, and a client of it."""
    import contextlib

    from dask_gateway import Gateway

    @contextlib.contextmanager
    def session() -> Iterator[Any]:
        with Gateway(f"http://127.0.0.1:{port}", proxy_address=f"gateway://127.0.0.1:{port}", auth="basic") as gateway:
            with gateway.new_cluster() as cluster:
                cluster.adapt(minimum=1, maximum=2)
                with cluster.get_client() as client:
                    yield client

    return session()


@serve.deployment(num_replicas=2)
class Model:
    def pid(self) -> int:
        return os.getpid()

    def size(self, data: bytes) -> int:
        return len(data)

    async def __call__(self, request: Any) -> dict[str, Any]:
        return {"pid": os.getpid()}


def deploy(client: Any) -> tuple[float, str]:
    began = time.monotonic()
    serve.run(Model.bind(), client=client, timeout=60)
    return time.monotonic() - began, serve.url(client=client)


def call(client: Any) -> tuple[set[int], int, float]:
    handle = serve.get_app_handle(client=client)
    refs = [handle.pid.remote() for _ in range(100)]
    pids = {ref.result(timeout=20) for ref in refs}
    began = time.monotonic()
    for _ in range(100):
        handle.pid.remote().result(timeout=20)
    took = (time.monotonic() - began) / 100
    return pids, handle.size.remote(bytes(5_000_000)).result(timeout=20), took


def tunnels(client: Any) -> int:
    return client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.plugins["dask-serve"].tunnels))


def get(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return json.loads(answer.read())


def test_a_session_next_to_the_workers(gateway: int) -> None:
    with connect(gateway) as client:
        took, url = deploy(client)
        pids, size, each = call(client)
        print(f"service after {took:.1f} s, a call takes {each * 1e3:.2f} ms directly")
        assert size == 5_000_000
        assert get(url)["pid"] in pids
        # Adapting, the cluster had one worker when the service came.
        wait_until(lambda: len(call(client)[0]) == 2, timeout=40)
        assert tunnels(client) == 0


@pytest.mark.skipif(not possible(), reason="network namespaces cannot be made here (unshare --net)")
def test_a_session_that_reaches_the_gateway_only(gateway: int, tmp_path: Path) -> None:
    side = FarSide(f"tcp://127.0.0.1:{gateway}", tmp_path, connect)
    try:
        side.start(deploy)
        took, url = side.answer(90)
        side.start(call)
        pids, size, each = side.answer(60)
        print(f"service after {took:.1f} s, a call takes {each * 1e3:.2f} ms through gateway and scheduler")
        assert size == 5_000_000
        assert side.run(tunnels) >= 1
        # The proxy is beside the scheduler.
        assert get(url)["pid"] in pids | side.run(call)[0]
    finally:
        side.end(30)
