"""Requests whose replica is lost while it runs: sent again as the caller says, else as the deployment declares."""

from __future__ import annotations

import asyncio
import sys
import threading
import types
from typing import Any

import httpx
import pytest
from distributed.utils_test import gen_cluster
from starlette.requests import Request

import dask_serve as serve
from dask_serve.exceptions import ReplicaLostError
from dask_serve.replica.process import ServeProcess

TWO = [("127.0.0.1", 1)] * 2

#: What replicas and tests share: this module travels to replicas by value, though they run in this process.
sys.modules["dask_serve_retries"] = types.SimpleNamespace(runs=[], gate=threading.Event())


def shared() -> Any:
    return sys.modules["dask_serve_retries"]


@serve.deployment(num_replicas=2, max_replicas_per_worker=1)
class Mortal:
    """The first to run a request is ended by the test; the second one answers."""

    async def __call__(self, request: Request | None = None) -> str:
        shared().runs.append(serve.get_replica_context().replica_id)
        if len(shared().runs) == 1:
            await asyncio.sleep(30)
        return shared().runs[-1]


async def end_the_first(*workers: Any) -> str:
    while not shared().runs:
        await asyncio.sleep(0.01)
    (unit,) = [unit for worker in workers for unit in ServeProcess.units_of(worker) if unit.id == shared().runs[0]]
    unit.end()
    return str(unit.id)


@pytest.mark.parametrize(
    ("declared", "given", "runs"),
    [(None, None, 1), (None, 1, 2), (1, None, 2), (1, 0, 1), (0, 1, 2)],
)
def test_calls(declared, given, runs):
    @gen_cluster(client=True, nthreads=TWO)
    async def check(c, s, a, b):
        shared().runs.clear()
        app = Mortal.options(retries_on_loss=declared).bind()
        handle = await serve.run(app, route_prefix=None, client=c)
        ref = (handle if given is None else handle.options(retries_on_loss=given)).remote()
        first = await end_the_first(a, b)
        if runs == 1:
            with pytest.raises(ReplicaLostError):
                await ref
        else:
            assert await ref not in ("", first)
        assert len(shared().runs) == runs

    check()


@gen_cluster(client=True, nthreads=TWO, timeout=60)
async def test_http(c, s, a, b):
    await serve.start(port=0, client=c)
    for declared, method, status in [
        (None, "GET", 200),
        (None, "POST", 502),
        (0, "GET", 502),
        (1, "POST", 200),
    ]:
        shared().runs.clear()
        app = Mortal.options(retries_on_loss=declared).bind()
        await serve.run(app, client=c)
        url = await serve.url(client=c)
        async with httpx.AsyncClient() as http:
            answer = asyncio.ensure_future(http.request(method, f"{url}/", content=b"x" * (method == "POST")))
            await end_the_first(a, b)
            assert (await answer).status_code == status, (declared, method)
        assert len(shared().runs) == 1 + (status == 200)
        await serve.delete("default", client=c)
