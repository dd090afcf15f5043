"""Each decision of the controller is told with its reason, in the status and in Dask's own log of events."""

from __future__ import annotations

import os
import signal
from typing import Any

import msgspec
from distributed import Worker
from distributed.utils_test import gen_cluster
from helpers import until
from test_controller import TWO, FakeReplica, Service, fake_replicas, replicas, service, spec  # noqa: F401

from dask_serve.config import HTTPOptions
from dask_serve.controller.events import KEPT, KINDS, TOLD, Events, brief
from dask_serve.controller.pulse import Pulse


def told(scheduler: Any, kind: str) -> list[tuple[str, str]]:
    """Return subject and text of all events of a kind in Dask's log."""
    events = [event for _, event in scheduler.get_events("dask-serve")]
    return [(event["subject"], event["text"]) for event in events if event["action"] == kind]


async def deployed(client: Any, **options: Any) -> Service:
    serve = await service(client)
    await serve.deploy(spec(**options))
    await serve.running()
    return serve


@gen_cluster(client=True, nthreads=TWO)
async def test_rollouts(c, s, a, b):
    serve = await deployed(c, num_replicas=2)
    ((subject, text),) = told(s, "deployed")
    assert subject == "app"
    assert text.startswith("version 1, deployed by ")
    assert told(s, "started") == [("app/d", "2 replicas started, as 2 of revision r1 are wanted")]
    assert told(s, "status") == [("app", "new → deploying"), ("app", "deploying → running")]
    await serve.deploy(spec("r2", num_replicas=2))
    await until(lambda: len(told(s, "stopped")) == 2)
    assert told(s, "stopped")[0] == ("app/d", "1 replica drained, as 2 of revision r2 are wanted")
    await serve.rpc.serve_rollback(app="app", owner="ann@here")
    assert told(s, "rolled_back") == [("app", "version 3, rolled back to 1 by ann@here")]
    await serve.rpc.serve_delete(app="app", owner="ann@here")
    assert told(s, "deleted") == [("app", "deleted by ann@here")]
    assert told(s, "stopped")[-1][1].endswith("drained, as the deployment is no longer wanted")
    status = await serve.status()
    assert [event.kind for event in status.events][:2] == ["deployed", "status"]
    # The same again is no news.
    assert len(told(s, "deployed")) == 2


@gen_cluster(client=True, nthreads=TWO)
async def test_an_update_that_fails(c, s, a, b):
    serve = await deployed(c)
    await serve.deploy(spec("r2"), b"fail here")
    await until(lambda: told(s, "taken_back"))
    failed = told(s, "start_failed")
    assert len(failed) == 3
    assert failed[0][0] == "app/d"
    assert failed[0][1].endswith("failed: Traceback (most recent call last): ... ValueError: fail here")
    ((subject, text),) = told(s, "taken_back")
    assert subject == "app"
    assert text.endswith("ValueError: fail here")
    await until(lambda: told(s, "status")[-1][1].startswith("deploying → failed: "))


@gen_cluster(client=True, nthreads=TWO)
async def test_no_place(c, s, a, b):
    serve = await service(c)
    await serve.deploy(spec(resources={"GPU": 1}))
    await until(lambda: told(s, "unplaced"))
    ((subject, text),) = told(s, "unplaced")
    assert subject == "app/d"
    assert text.startswith("1 replica wait")
    assert "GPU" in text
    async with Worker(s.address, nthreads=1, resources={"GPU": 1}, dashboard=False):
        await serve.running()
        assert told(s, "placed") == [("app/d", "no replica waits for a worker any more")]


@gen_cluster(client=True, nthreads=TWO)
async def test_what_befalls_replicas(c, s, a, b):
    serve = await deployed(c, num_replicas=2)
    status = await serve.status()
    first = next(r for r in replicas(status) if r.worker == a.address)
    await serve.rpc.serve_report(replica=first.id, event="unhealthy", message="its model is gone")
    ((subject, text),) = told(s, "unhealthy")
    assert (subject, text) == (
        "app/d",
        f"replica {first.id} on worker {a.address} was unhealthy: its model is gone; it is replaced",
    )
    await b.close()
    ((subject, text),) = told(s, "lost")
    assert (subject, text) == ("app/d", f"1 replica lost with worker {b.address}, and replaced")
    await until(lambda: len(s.plugins["dask-serve"].registry.on_worker(a.address)) == 2)
    s.log_event("worker-restart-memory", {"worker": a.address, "rss": 2**30})
    found = told(s, "out_of_memory")
    assert len(found) == 2
    assert "was killed when it used 1.00 GiB" in found[0][1]


@gen_cluster(client=True, nthreads=TWO)
async def test_workers(c, s, a, b):
    serve = await deployed(c, num_replicas=1)
    (replica,) = replicas(await serve.status())
    await serve.rpc.serve_drain(worker=replica.worker)
    assert told(s, "leaving") == [(replica.worker, "it leaves: 1 replica is replaced elsewhere first")]
    await serve.rpc.serve_drain(worker=replica.worker, stay=True)
    assert told(s, "stays") == [(replica.worker, "it does not leave after all, and may hold replicas again")]
    controller = s.plugins["dask-serve"]
    pulse = Pulse(s, controller.registry, controller.reconciler, b"")
    for silent in (True, True, False):
        pulse._note(a.address, silent=silent)
    assert told(s, "silent") == [(a.address, "it does not answer: no new requests go there")]
    assert told(s, "answers") == [(a.address, "it answers again, and gets requests")]


@gen_cluster(client=True, nthreads=TWO)
async def test_proxies(c, s, a, b):
    serve = await service(c)
    url = (await serve.rpc.serve_start(options=msgspec.msgpack.encode(HTTPOptions(port=0))))["url"]
    assert told(s, "proxies") == [("proxies", f"HTTP is served at {url}")]
    pid = (await serve.status()).proxies[0].pid
    os.kill(pid, signal.SIGKILL)
    await until(lambda: told(s, "proxy_died"))
    ((subject, text),) = told(s, "proxy_died")
    assert (subject, text) == ("proxies", f"proxy {pid} exited with code -9; it is started again")
    await serve.rpc.serve_shutdown()
    assert told(s, "proxies")[-1] == ("proxies", f"HTTP is no longer served at {url}")


@gen_cluster(client=True, nthreads=[])
async def test_as_many_are_kept_as_a_time_line_needs(c, s):
    events = Events(s)
    for number in range(2 * KEPT):
        events.add("scaled", "app/d", str(number))
    assert [event.text for event in events.latest()] == [str(n) for n in range(2 * KEPT - TOLD, 2 * KEPT)]
    assert len(events.latest(KEPT)) == KEPT
    assert events.counts["scaled"] == 2 * KEPT
    assert set(KINDS.values()) == {"rollout", "scaling", "healing", "workers", "proxies"}
    assert brief("Traceback:\n  here\nValueError: x\n") == "Traceback: ... ValueError: x"
    assert brief("") == ""
