"""Dask's profiles show what replicas run."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from distributed.utils_test import gen_cluster
from helpers import until

import dask_serve as serve


def grind_in_a_thread(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1000))


def grind_on_the_loop(seconds: float) -> None:
    grind_in_a_thread(seconds)


@serve.deployment
class Grinder:
    def grind(self, seconds: float) -> None:
        grind_in_a_thread(seconds)

    async def grind_async(self, seconds: float) -> None:
        await asyncio.sleep(0)
        grind_on_the_loop(seconds)

    async def wait(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def names(profile: dict[str, Any]) -> dict[str, int]:
    """Counts by the name of the function."""
    found: dict[str, int] = {}

    def walk(node: dict[str, Any]) -> None:
        name = node["description"]["name"]
        found[name] = found.get(name, 0) + node["count"]
        for child in node["children"].values():
            walk(child)

    walk(profile)
    return found


#: Dask shows nothing before the first cycle has ended.
CONFIG = {
    "distributed.worker.profile.interval": "5ms",
    "distributed.worker.profile.cycle": "50ms",
    "distributed.worker.profile.enabled": True,
}


@gen_cluster(client=True, nthreads=[("", 1)], config=CONFIG)
async def test_profiles_have_user_code(c, s, a):
    handle = await serve.run(Grinder.bind(), route_prefix=None)
    await handle.wait.remote(0.3)
    # Who waits does nothing: of 60 looks hardly one has found something.
    assert names(await c.profile()).get("", 0) <= 5
    for method, function in (("grind", "grind_in_a_thread"), ("grind_async", "grind_on_the_loop")):
        await getattr(handle, method).remote(0.3)
        found = names(await c.profile())
        assert found[method] >= found[function] >= 5, found
        # What calls user code is not shown.
        assert not {"_run_async", "_blocking_answer", "_work"} & found.keys()
    by_deployment = names(await c.profile(key="default/Grinder"))
    assert by_deployment["grind_in_a_thread"] >= 5
    await until(lambda: not a.active_threads)


@gen_cluster(client=True, nthreads=[("", 1)], config={"distributed.worker.profile.enabled": False})
async def test_profiles_stay_switched_off(c, s, a):
    handle = await serve.run(Grinder.bind(), route_prefix=None)
    await handle.grind.remote(0.05)
    assert "profile" not in a.periodic_callbacks
