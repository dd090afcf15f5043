"""What replicas take of their workers: Dask's resources, devices, memory, and the threads of BLAS."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from typing import Any

import dask
import numpy as np
import pytest
from distributed import Client, Event, Nanny
from distributed.utils_test import gen_cluster, inc
from helpers import until, wait_until
from test_deaths import Processes
from threadpoolctl import threadpool_info

import dask_serve as serve
from dask_serve.controller.status import DeploymentStatus, ServeStatus, decode_status
from dask_serve.exceptions import ConfigError
from dask_serve.replica.devices import detect_devices

ONE = [("127.0.0.1", 2)]
TWO = [("127.0.0.1", 2)] * 2
#: What the workers of `gen_cluster` are started with.
GPU = {"resources": {"GPU": 1}}
BOTH = {"distributed.scheduler.work-stealing": False, "serve.gpus": "0,1"}


async def status_of(client: Client) -> ServeStatus:
    return decode_status((await client.scheduler.serve_status())["status"])


async def deployment_of(client: Client, app: str) -> DeploymentStatus:
    (deployment,) = (await status_of(client)).applications[app].deployments.values()
    return deployment


async def run(client: Client, application: serve.Application, name: str = "app", wait: bool = True) -> Any:
    return await serve.run(application, name=name, route_prefix=None, client=client, wait=wait)


@serve.deployment
class Model:
    def __init__(self):
        self.at_first = serve.get_replica_context().devices

    async def __call__(self):
        return serve.get_replica_context().devices, self.at_first, serve.get_replica_context().worker


def state_of(scheduler: Any, future: Any) -> str:
    task = scheduler.tasks.get(future.key)
    return "unknown" if task is None else task.state


def hold(name: str) -> str:
    Event(name).wait(30)
    return name


# -- Dask's resources


@gen_cluster(client=True, nthreads=ONE, worker_kwargs=GPU)
async def test_tasks_wait_for_what_a_replica_has(c, s, a):
    await run(c, Model.options(resources={"GPU": 1}).bind())
    await until(lambda: s.workers[a.address].resources == {"GPU": 0})
    assert (a.state.total_resources, a.state.available_resources) == ({"GPU": 0}, {"GPU": 0})
    task = c.submit(inc, 1, resources={"GPU": 1}, pure=False)
    other = c.submit(inc, 2)
    assert await other == 3
    await until(lambda: state_of(s, task) == "no-worker")
    # Those who come later too, also when the application is deployed anew.
    await run(c, Model.options(resources={"GPU": 1}, num_replicas=1, max_ongoing_requests=3).bind())
    assert s.tasks[task.key].state == "no-worker"
    await serve.delete("app", client=c)
    assert await asyncio.wait_for(task, 10) == 2
    await until(lambda: s.workers[a.address].resources == {"GPU": 1})
    await until(lambda: a.state.total_resources == a.state.available_resources == {"GPU": 1})


@gen_cluster(client=True, nthreads=ONE, worker_kwargs=GPU)
async def test_a_replica_waits_for_what_a_task_has(c, s, a):
    task = c.submit(hold, "held", resources={"GPU": 1})
    await until(lambda: state_of(s, task) == "processing")
    handle = await run(c, Model.options(resources={"GPU": 1}).bind(), wait=False)
    status = await until(lambda: _message(c, "waits for"))
    assert f"waits for GPU=1 on worker {a.address}, which tasks hold" in status
    await Event("held").set()
    assert (await handle.remote())[2] == a.address
    assert await task == "held"


async def _message(client: Client, part: str) -> str | None:
    message = (await deployment_of(client, "app")).message
    return message if part in message else None


@gen_cluster(client=True, nthreads=TWO, worker_kwargs=GPU, config={"distributed.scheduler.work-stealing": False})
async def test_tasks_that_wait_there_already_go_elsewhere(c, s, a, b):
    """A replica acquires before the tasks behind it in the worker's line: they must not wait for its end."""
    holder = c.submit(hold, "first", resources={"GPU": 1}, workers=[a.address])
    await until(lambda: state_of(s, holder) == "processing")
    busy = c.submit(hold, "second", resources={"GPU": 1}, workers=[b.address])
    await until(lambda: state_of(s, busy) == "processing")
    await run(c, Model.options(resources={"GPU": 1}, workers=[a.address]).bind(), wait=False)
    await until(lambda: any(key.startswith("serve-app") for key in a.state.tasks))
    waiting = [c.submit(inc, number, resources={"GPU": 1}, pure=False) for number in range(6)]
    await until(lambda: all(state_of(s, f) == "processing" for f in waiting))
    assert {s.tasks[future.key].processing_on.address for future in waiting} == {a.address, b.address}
    await Event("first").set()
    await until(lambda: s.workers[a.address].resources == {"GPU": 0})
    await Event("second").set()
    assert await asyncio.wait_for(c.gather(waiting), 20) == list(range(1, 7))


@gen_cluster(client=True, nthreads=ONE, worker_kwargs={"resources": {"GPU": 1}})
async def test_fractions_and_failures_leave_nothing_behind(c, s, a):
    @serve.deployment(resources={"GPU": 0.1}, num_replicas=3)
    class Tenth:
        def __call__(self):
            return None

    @serve.deployment(resources={"GPU": 0.2})
    class Broken:
        def __init__(self):
            raise ValueError("no")

    await run(c, Tenth.bind())
    with pytest.raises(serve.DeploymentFailedError):
        await run(c, Broken.bind(), name="broken")
    await until(lambda: s.workers[a.address].resources == {"GPU": 0.7})
    await until(lambda: a.state.available_resources == {"GPU": 0.7})
    # An update starts new ones before the old ones end.
    await run(c, Tenth.options(num_replicas=3, threads=2).bind())
    await serve.delete("app", client=c)
    await until(lambda: s.workers[a.address].resources == {"GPU": 1})
    await until(lambda: a.state.available_resources == a.state.total_resources == {"GPU": 1})


# -- devices


@gen_cluster(client=True, nthreads=TWO, config=BOTH)
async def test_replicas_get_devices(c, s, a, b):
    """Two workers of one host see the same two devices."""
    handle = await run(c, Model.options(gpus=1).bind())
    devices, at_first, _ = await handle.remote()
    assert devices == at_first == (0,)
    await run(c, Model.options(gpus=0.5, num_replicas=2).bind(), name="halves")
    assert [r.devices for r in (await deployment_of(c, "halves")).replicas] == [["1"], ["1"]]
    await run(c, Model.options(gpus=2).bind(), name="both", wait=False)
    waits = await until(lambda: _waits(c, "both"))
    assert "no worker has gpus=2 free" in waits
    assert "free of its 2 GPUs: 0: 0, 1: 0" in waits
    await serve.delete("app", client=c)
    await serve.delete("halves", client=c)
    both = await deployment_of(c, "both")
    await until(lambda: _is_running(c, "both"))
    both = await deployment_of(c, "both")
    assert both.replicas[0].devices == ["0", "1"]
    assert (await (await run(c, Model.options(gpus=2).bind(), name="both")).remote())[0] == (0, 1)


@gen_cluster(client=True, nthreads=ONE, config={"serve.gpus": "0"})
async def test_an_update_has_the_device_of_what_it_replaces(c, s, a):
    handle = await run(c, Model.options(gpus=1, max_unavailable=1, threads=1).bind())
    assert (await handle.remote())[0] == (0,)
    # There is no other one.
    await run(c, Model.options(gpus=1, max_unavailable=1, threads=2).bind())
    assert [r.devices for r in (await deployment_of(c, "app")).replicas if r.state == "ready"] == [["0"]]


async def _waits(client: Client, app: str) -> str | None:
    message = (await deployment_of(client, app)).message
    return message if "wait for a worker" in message and "looked up" not in message else None


async def _is_running(client: Client, app: str) -> bool:
    return (await deployment_of(client, app)).status == "running"


@gen_cluster(client=True, nthreads=ONE, config={"serve.gpus": "0"}, worker_kwargs={"resources": {"GPU": 1}})
async def test_devices_are_booked_with_dask_too(c, s, a):
    await run(c, Model.options(gpus=0.25).bind())
    await until(lambda: s.workers[a.address].resources == {"GPU": 0.75})
    await serve.delete("app", client=c)
    await until(lambda: s.workers[a.address].resources == {"GPU": 1})


@gen_cluster(client=True, nthreads=ONE, config={"serve.gpus": True})
async def test_wrong_setting_is_told_as_no_devices(c, s, a):
    await run(c, Model.options(gpus=1).bind(), wait=False)
    assert "no GPUs found there" in await until(lambda: _waits(c, "app"))


@pytest.fixture
def processes(tmp_path) -> Iterator[Processes]:
    found = Processes(tmp_path)
    yield found
    found.end()


def test_workers_in_the_manner_of_dask_cuda(processes):
    """One worker process for each GPU, which sees its own first and then all others."""
    processes.scheduler()
    for name, visible in (("first", "0,1"), ("second", "1,0")):
        processes.environment["CUDA_VISIBLE_DEVICES"] = visible
        processes.worker("--no-nanny", "--name", name, "--resources", "GPU=1")
    with Client(processes.address) as client:
        client.wait_for_workers(2, timeout=30)
        names = {address: w["name"] for address, w in client.scheduler_info(n_workers=-1)["workers"].items()}

        def replicas(app: str) -> list[tuple[str, list[str]]]:
            found = serve.status(client=client).applications[app].deployments["Pinned"].replicas
            return sorted((names[replica.worker], replica.devices) for replica in found)

        whole = serve.run(Pinned.options(gpus=1, num_replicas=2).bind(), route_prefix=None, client=client)
        assert replicas("default") == [("first", ["0"]), ("second", ["1"])]
        told = {}
        while len(told) < 2:
            answer = whole.remote().result(timeout=10)
            told[answer["visible"]] = answer["devices"]
        # What user code hands to its library is the place in what its process sees.
        assert told == {"0,1": (0,), "1,0": (0,)}
        serve.delete("default", client=client)

        only = Pinned.options(gpus=0.5, num_replicas=2, workers=["second"]).bind()
        halves = serve.run(only, "halves", None, client=client)
        assert replicas("halves") == [("second", ["1"]), ("second", ["1"])]
        assert halves.remote().result(timeout=10)["devices"] == (0,)
        serve.run(Pinned.options(gpus=0.6, workers=["second"]).bind(), "more", None, client=client, wait=False)
        wait_until(lambda: "GPU" in serve.status(client=client).applications["more"].message)


@serve.deployment
class Pinned:
    def __call__(self) -> dict[str, Any]:
        return {
            "devices": serve.get_replica_context().devices,
            "visible": os.environ["CUDA_VISIBLE_DEVICES"],
        }


@pytest.mark.parametrize(
    ("visible", "setting", "devices"),
    [
        ("2,0", None, [("2", 0), ("0", 1)]),
        ("GPU-8f3a,MIG-11", None, [("GPU-8f3a", 0), ("MIG-11", 1)]),
        ("", None, []),
        ("-1", None, []),
        ("0,-1,1", None, [("0", 0)]),
        ("2,0", "0", [("0", 1)]),
        ("2,0", "1", []),
        (None, "1,0", [("1", 1), ("0", 0)]),
        (None, 1, [("1", 1)]),
        (None, [0, 1], [("0", 0), ("1", 1)]),
        (None, "", []),
        ("0", "", []),
    ],
)
def test_detected_devices(monkeypatch, visible, setting, devices):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with dask.config.set({"serve.gpus": setting}):
        assert detect_devices() == devices


@pytest.mark.parametrize("setting", [True, 1.5, {"a": 1}, "0,0"])
def test_wrong_devices(setting):
    with dask.config.set({"serve.gpus": setting}), pytest.raises(ConfigError, match=r"serve\.gpus = .* in Dask's conf"):
        detect_devices()


def test_devices_from_the_driver(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '0\\n1\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert detect_devices() == [("0", 0), ("1", 1)]


# -- memory


@gen_cluster(client=True, nthreads=TWO, worker_kwargs={"memory_limit": "4 GiB"})
async def test_memory_is_a_hard_limit(c, s, a, b):
    await run(c, Model.options(memory="1.5 GiB", num_replicas=3).bind())
    await run(c, Model.options(memory="1.5 GiB", num_replicas=2).bind(), name="more", wait=False)
    message = await until(lambda: _waits(c, "more"))
    assert "1 of 2 replicas wait for a worker: no worker has memory=1.50 GiB left" in message
    assert "1.00 GiB of 4.00 GiB not booked" in message


@serve.deployment
class Glutton:
    def __init__(self):
        self.eaten = []

    def eat(self):
        while True:
            self.eaten.append(np.ones(4 * 2**20))
            time.sleep(0.01)

    async def __call__(self):
        return serve.get_replica_context().replica_id


@gen_cluster(
    client=True,
    nthreads=ONE,
    Worker=Nanny,
    worker_kwargs={"memory_limit": "500 MiB"},
    config={"distributed.worker.memory.pause": False, "distributed.worker.memory.spill": False},
    timeout=90,
)
async def test_replica_that_is_killed_for_memory_is_told(c, s, a):
    handle = await run(c, Glutton.bind())
    before = await handle.remote()
    with pytest.raises(serve.ServeError):
        await handle.eat.remote()
    await until(lambda: _setback(c, before), 20)
    await until(lambda: _is_running(c, "app"), 20)
    assert await handle.remote() != before
    setback = (await deployment_of(c, "app")).setback
    assert setback.startswith(f"replica {before} is out_of_memory: its worker ")
    assert setback.endswith("MiB of 500.00 MiB")


async def _setback(client: Client, replica: str) -> str | None:
    setback = (await deployment_of(client, "app")).setback
    return setback if replica in setback else None


# -- the threads of native libraries


def counts() -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for library in threadpool_info():
        found.setdefault(library["user_api"], set()).add(library["num_threads"])
    return found


@gen_cluster(client=True, nthreads=ONE)
async def test_native_threads_are_those_of_the_replica(c, s, a):
    # It brings OpenMP.
    pytest.importorskip("sklearn.cluster")

    @serve.deployment
    class Native:
        def warm_up(self):
            self.warm = counts()

        def plain(self):
            return counts(), self.warm

        async def loop(self):
            return counts()

    before = counts()
    # OpenBLAS takes no more than there are cores.
    one = await run(c, Native.bind(), name="one")
    two = await run(c, Native.options(threads=2).bind(), name="two")
    for handle, threads in ((one, 1), (two, 2)):
        now, warm = await handle.plain.remote()
        # One number for the process, the largest; and one for each thread.
        assert now == {"blas": {2}, "openmp": {threads}}
        assert warm == {"blas": {threads}, "openmp": {threads}}
        assert await handle.loop.remote() == now
    await serve.delete("two", client=c)
    assert (await one.plain.remote())[0] == {"blas": {1}, "openmp": {1}}
    await serve.delete("one", client=c)
    assert counts() == before
