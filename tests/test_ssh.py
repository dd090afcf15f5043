"""A service on Dask's SSHCluster: scheduler and workers are started by an sshd."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import Client
from helpers import wait_until
from slurm_site import daemon
from ssh_site import PROGRAMS, ssh_site
from test_leaving import Load

import dask_serve as serve

missing = [name for name in PROGRAMS if daemon(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.ssh,
    pytest.mark.skipif(bool(missing), reason=f"no sshd here ({', '.join(missing)} missing): make clusters"),
]


@serve.deployment(num_replicas=2)
class Model:
    def came_by(self) -> str:
        return os.environ.get("SSH_CONNECTION", "")

    async def nap(self, seconds: float) -> int:
        import asyncio

        await asyncio.sleep(seconds)
        return os.getpid()

    async def __call__(self, request: Any) -> dict[str, Any]:
        return {"label": os.getpid()}


@pytest.fixture
def login(tmp_path: Path) -> Iterator[dict[str, Any]]:
    directory = tmp_path / "sshd"
    directory.mkdir()
    with ssh_site(directory) as login:
        yield login


def test_a_service_on_an_ssh_cluster(login: dict[str, Any], tmp_path: Path) -> None:
    from distributed import SSHCluster

    site = tmp_path / "site"
    site.mkdir()
    (site / "dask_serve").symlink_to(Path(serve.__file__).parent)
    began = time.monotonic()
    with SSHCluster(
        ["127.0.0.1"] * 3,
        connect_options=login,
        worker_options={"nthreads": 1, "memory_limit": "0", "local_directory": str(tmp_path)},
        scheduler_options={"port": 0, "dashboard": False, "host": "127.0.0.1"},
        # As if it were installed there, and nothing else of this checkout.
        remote_python=f"env PYTHONPATH={shlex.quote(str(site))} {shlex.quote(sys.executable)}",
    ) as cluster:
        with Client(cluster) as client:
            handle = serve.run(Model.bind(), client=client, timeout=30)
            print(f"service after {time.monotonic() - began:.1f} s")
            refs = [handle.came_by.remote() for _ in range(20)]
            came_by = {ref.result(timeout=10) for ref in refs}
            # One connection for each worker.
            assert len(came_by) == 2
            assert all(text.split()[::2] == ["127.0.0.1", "127.0.0.1"] for text in came_by)
            url = serve.url(client=client) + "/"
            pids = {json.loads(urllib.request.urlopen(url, timeout=10).read())["label"] for _ in range(10)}
            processes = [psutil.Process(pid) for pid in pids]
            proxies = [psutil.Process(row.pid) for row in serve.status(client=client).proxies]
            victim = serve.status(client=client).applications["default"].deployments["Model"].replicas[0].worker
            with Load(handle, url, threads=2) as load:
                client.retire_workers([victim])
                load.goes_on()
            assert load.errors == []
        # The session's connection is closed; the service is not.
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert answer.status == 200
    wait_until(lambda: not any(process.is_running() for process in processes + proxies))
