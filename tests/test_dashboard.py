"""The page in Dask's dashboard: on a running scheduler, with the preload, under a prefix, and without bokeh."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from distributed import Client, Scheduler, Worker
from distributed.utils_test import gen_test
from helpers import until

import dask_serve as serve
from dask_serve.controller.plugin import Controller
from dask_serve.controller.state_file import StateFile

pytest.importorskip("bokeh")

from dask_serve.dashboard.history import Levels
from dask_serve.dashboard.pages import INDIVIDUAL, TIMES, Page, connect
from dask_serve.dashboard.panels import PANELS, Decisions, Headline, Replicas, Workers

ROOT = Path(__file__).parents[1]


def scheduler(**options: Any) -> Scheduler:
    return Scheduler(host="127.0.0.1", port=0, dashboard_address="127.0.0.1:0", dashboard=True, **options)


async def get(s: Scheduler, path: str) -> httpx.Response:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{s.http_server.port}", timeout=20) as http:
        return await http.get(path)


@gen_test()
async def test_a_running_scheduler_gets_the_page():
    async with scheduler() as s:
        assert 'href="serve"' not in (await get(s, "/status")).text
        await s.register_scheduler_plugin(Controller(state=StateFile()), idempotent=True)
        for page in ("/status", "/serve"):
            answer = await get(s, page)
            assert answer.status_code == 200
            assert '<a href="serve">Serve</a>' in answer.text
            assert '<a href="individual-serve-latency">Serve Latency</a>' in answer.text
        assert "render_items" in answer.text
        plots = (await get(s, "/individual-plots.json")).json()
        assert plots["Individual Serve Latency"] == "/individual-serve-latency"
        assert plots["Individual Task Stream"] == "/individual-task-stream", "Dask's own are still there"
        assert set(INDIVIDUAL) <= set(plots.values())
        for name in ("latency", "decisions?deployment=a/b"):
            assert "render_items" in (await get(s, f"/individual-serve-{name}")).text
        # Another controller, as after an upgrade: one page, the new one's.
        connect(s, s.plugins["dask-serve"].dashboard._sampler, "")
        assert [str(app.app_paths).count("'/serve'") for app in s.http_application.applications].count(1) == 1
        assert (await get(s, "/serve")).text.count('<a href="serve">') == 1


@gen_test()
async def test_under_a_prefix():
    async with scheduler(http_prefix="/behind") as s:
        await s.register_scheduler_plugin(Controller(state=StateFile()), idempotent=True)
        assert '<a href="serve">Serve</a>' in (await get(s, "/behind/status")).text
        assert "render_items" in (await get(s, "/behind/serve")).text
        plots = (await get(s, "/behind/individual-plots.json")).json()
        assert plots["Individual Serve Load"] == "/individual-serve-load"


@gen_test()
async def test_without_a_dashboard():
    async with Scheduler(host="127.0.0.1", port=0, dashboard_address=":0", dashboard=False) as s:
        await s.register_scheduler_plugin(Controller(state=StateFile()), idempotent=True)
        assert (await get(s, "/serve")).status_code == 404
        assert (await get(s, "/health")).status_code == 200


@gen_test()
async def test_a_page_that_cannot_be_made_harms_nobody(monkeypatch):
    monkeypatch.setattr("dask_serve.dashboard.pages.connect", lambda *_: 1 / 0)
    async with scheduler() as s:
        await s.register_scheduler_plugin(Controller(state=StateFile()), idempotent=True)
        assert (await get(s, "/status")).status_code == 200
        assert (await get(s, "/serve")).status_code == 404


@serve.deployment(num_replicas=2)
class Model:
    def __call__(self, fail: bool = False) -> str:
        if fail:
            raise ValueError("asked to")
        return "x"


def shown(page: Page) -> dict[str, list[float]]:
    """Return the columns of the plots as lists."""
    page.update()
    return {name: list(values) for name, values in page.source.data.items()}


@gen_test(timeout=60)
async def test_what_is_shown():
    async with (
        scheduler() as s,
        Worker(s.address, nthreads=2, name="w") as w,
        Client(s.address, asynchronous=True) as c,
    ):
        await serve.run(Model.bind(), name="a", client=c)
        controller = s.plugins["dask-serve"]
        sampler = controller.dashboard._sampler
        everything, other = Page(sampler), Page(sampler, "a/Model")
        select = everything.choose()
        assert len({method(everything.times).title.text for method in TIMES.values()}) == len(TIMES)
        panels = {name: kind() for name, kind in PANELS.items()}
        for panel in panels.values():
            everything.add(panel)
        handle = await serve.get_app_handle("a", client=c)
        for number in range(40):
            ref = handle.remote(number % 4 == 0)
            if number % 4:
                assert await ref == "x"
            else:
                with pytest.raises(Exception, match="asked to"):
                    await ref

        def counted() -> bool:
            data = shown(everything)
            return (sum(data["answered"]), sum(data["failed"])) == (pytest.approx(30), pytest.approx(10))

        await until(counted, 20)
        assert sum(shown(other)["answered"]) == pytest.approx(30)
        assert select.options == [("all", "all deployments"), ("a/Model", "a/Model")]
        select.value = "a/Model"
        assert sum(shown(everything)["failed"]) == pytest.approx(10)
        rows, workers, decisions = panels["replicas"], panels["workers"], panels["decisions"]
        assert isinstance(rows, Replicas)
        assert isinstance(workers, Workers)
        assert isinstance(decisions, Decisions)
        assert sum(rows.source.data["answered"]) == 30
        assert set(rows.source.data["escaped"]) == {w.address.replace(":", "%3A").replace("/", "%2F")}
        assert (await get(s, f"/info/worker/{rows.source.data['escaped'][0]}.html")).status_code == 200
        assert (workers.source.data["worker"], workers.source.data["ready"]) == (["w"], [2])
        assert "deployed" in decisions.source.data["kind"]
        assert sampler.look().trouble == []
        await serve.delete("a", client=c)
        assert shown(everything)["time"], "what is gone can still be looked at"
        await asyncio.sleep(0.5)
        assert "Nothing is deployed" in sampler.look().trouble[0]
        controller._shown.ended = "ValueError: x"
        sampler._sample()
        assert "restart the scheduler" in sampler.snapshot.trouble[0]


class Waits:
    async def __call__(self) -> None:
        await asyncio.sleep(30)


@gen_test(timeout=60)
async def test_calls_that_wait_at_a_session_are_shown():
    async with scheduler() as s, Worker(s.address, nthreads=2), Client(s.address, asynchronous=True) as c:
        handle = await serve.run(serve.deployment(max_ongoing_requests=2)(Waits).bind(), name="a", client=c)
        sampler = s.plugins["dask-serve"].dashboard._sampler
        refs = [handle.remote() for _ in range(6)]

        def seen() -> bool:
            levels = sampler.look().levels.get("a/Waits", Levels())
            return (levels.running, levels.queued) == (2, 4)

        await until(seen, 20)
        told = (await get(s, "/metrics")).text
        for name, number in (("in_flight", 2), ("queued", 4)):
            assert f'dask_serve_{name}{{application="a",deployment="Waits"}} {number}.0' in told
        panel = Headline()
        page = Page(sampler)
        page.add(panel)
        page.update()
        assert "4</b>" in panel.root.text
        assert (await serve.status(client=c)).applications["a"].deployments["Waits"].queued == 4
        for ref in refs:
            ref.cancel()


#: Everything else works where bokeh is not.
HIDDEN = """
import sys, importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name.partition(".")[0] == "bokeh" else find_spec(name, *more)
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "bokeh":
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Hide())

import asyncio
from distributed import Client, Scheduler, Worker
import dask_serve as serve

@serve.deployment
class Model:
    def __call__(self):
        return "served"

async def main():
    async with Scheduler(host="127.0.0.1", port=0, dashboard_address=":0") as s, Worker(s.address) as w:
        async with Client(s.address, asynchronous=True) as c:
            handle = await serve.run(Model.bind(), client=c)
            print(await handle.remote(), s.plugins["dask-serve"].dashboard._sampler, "bokeh" in sys.modules)

asyncio.run(main())
"""


def test_without_bokeh(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HIDDEN], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "served None False\n", done.stderr
