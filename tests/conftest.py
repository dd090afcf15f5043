"""Fixtures: those of distributed's own test suite that ours need, and a cluster that a module's tests share."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client
from distributed.utils_test import (  # noqa: F401
    a,
    b,
    cleanup,
    cluster_fixture,
    loop,
    loop_in_thread,
    s,
    security,
    tls_client,
    tls_cluster,
)

from dask_serve import records
from dask_serve.embedded import EmbeddedCluster
from dask_serve.session.waiting import call_back


@pytest.fixture(scope="session", autouse=True)
def quick_collections():
    """What was imported stays: no garbage collection has to look at it, of which there are thousands."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory):
    """Schedulers that tests start save their state here, and not in the home of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session", autouse=True)
def callback_thread():
    """Dask's thread for callbacks stays; it is there before a test counts threads."""
    call_back(lambda ref: None, None)


@pytest.fixture(scope="module")
def shared_cluster() -> Iterator[str]:
    """Two worker processes with one thread each, for all tests of a module: starting them takes 2 to 3 s."""
    with EmbeddedCluster.start(n_workers=2, nthreads=1, dashboard_address=None) as cluster:
        # It is closed before others look for clients that are left.
        with Client(cluster.scheduler_address, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=30)
        yield cluster.scheduler_address


@pytest.fixture
def client(shared_cluster: str, loop) -> Iterator[Client]:  # noqa: F811
    """A synchronous client of the shared cluster. What a test leaves on the cluster, the next one finds."""
    with Client(shared_cluster, loop=loop) as client:
        yield client


@pytest.fixture
def own_client(cluster_fixture, loop) -> Iterator[Client]:  # noqa: F811
    """A synchronous client of a cluster that the test may harm."""
    with Client(cluster_fixture[0]["address"], loop=loop) as client:
        yield client


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[records.Records]:
    """Log records of this process, from now on and until the test's end."""
    before = logging.getLogRecordFactory()
    monkeypatch.setattr(records, "_records", None)
    yield records.keep_records()
    logging.setLogRecordFactory(before)


@pytest.fixture
def mark(tmp_path: Path) -> Callable[..., Any]:
    """Return headers that name a marker file, or wait until a line stands in it."""
    path = tmp_path / "marker"

    def mark(until: str | None = None, deadline: float = 15.0) -> Any:
        if until is None:
            return {"x-marker": str(path)}
        end = time.monotonic() + deadline
        lines: list[str] = []
        while time.monotonic() < end:
            lines = path.read_text().splitlines() if path.exists() else []
            for line in lines:
                if line.startswith(until):
                    return line
            time.sleep(0.01)
        raise AssertionError(f"no {until!r} in {lines[-20:]}")

    return mark
