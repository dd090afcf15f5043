"""The Serve page in a real browser, under load: nothing is empty, and its numbers are those of the load generator."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from distributed import Client
from helpers import http_client, wait_until
from test_browser import Browser, browser, pytestmark  # noqa: F401

import dask_serve as serve
from dask_serve.embedded import EmbeddedCluster

pytest.importorskip("bokeh")

#: Finds the source of the plots over time in the page.
SOURCE = """
    const doc = Bokeh.documents[0];
    const source = [...doc._all_models.values()].find(m => m.type == 'ColumnDataSource' && 'took_p99' in m.data);
    const list = name => Array.from(source.data[name]);
"""


@serve.deployment(num_replicas=2, max_ongoing_requests=50)
class Model:
    def __init__(self) -> None:
        self.asked = 0

    async def __call__(self, request: Any) -> str:
        if "fail" in request.query_params:
            raise ValueError("asked to")
        return "x"


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, str]]:
    """The address of the service, and that of the page."""
    cluster = EmbeddedCluster.start(n_workers=2, nthreads=1, dashboard_address="127.0.0.1:0")
    with cluster, Client(cluster.scheduler_address, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=30)
        serve.run(Model.bind(), name="shop", route_prefix="/m", client=client)
        yield serve.url(client=client), cluster.dashboard_link.replace("/status", "/serve")


def load(url: str, seconds: float, counts: dict[int, int]) -> None:
    ends = time.monotonic() + seconds
    with http_client(url) as http:
        number = 0
        while time.monotonic() < ends:
            number += 1
            status = http.get("/m?fail=1" if number % 20 == 0 else "/none" if number % 10 == 0 else "/m").status_code
            counts[status] = counts.get(status, 0) + 1


def test_the_page_under_load(browser: Browser, served: tuple[str, str]):  # noqa: F811
    url, page = served
    with http_client(page.removesuffix("/serve")) as http:
        assert http.get("/status", follow_redirects=True).status_code == 200
    counts: list[dict[int, int]] = [{}, {}]
    threads = [threading.Thread(target=load, args=(url, 12.0, one)) for one in counts]
    for thread in threads:
        thread.start()
    browser.open(page)
    for thread in threads:
        thread.join()
    sent = {status: sum(one.get(status, 0) for one in counts) for status in (200, 404, 500)}
    assert sum(sent.values()) > 200

    def drawn() -> dict[str, Any]:
        return browser.run(
            SOURCE
            + """
            const sum = name => list(name).reduce((a, b) => a + (b || 0), 0);
            const sums = {};
            for (const name of ['2xx', '4xx', '5xx', 'answered', 'failed']) sums[name] = sum(name);
            const rows = [...doc._all_models.values()].filter(m => m.type == 'DataTable').map(m => m.source.data);
            return {sums, p50: list('took_p50'), ready: list('ready'),
                    replicas: Array.from(rows.find(r => 'escaped' in r).replica)};
            """
        )

    def agree() -> bool:
        sums = drawn()["sums"]
        wanted = {"2xx": sent[200], "4xx": sent[404], "5xx": sent[500], "answered": sent[200], "failed": sent[500]}
        return all(sums[name] == pytest.approx(number, rel=0.02) for name, number in wanted.items())

    wait_until(agree, 15)
    told = drawn()
    # The time of an empty method, in milliseconds.
    assert 0 < next(value for value in told["p50"] if value) < 1000
    assert 2 in told["ready"]
    assert len(told["replicas"]) == 2
    # What is drawn is drawn: pixels of all plots differ from their background.
    empty = browser.run(
        """
        const figures = [...Bokeh.documents[0]._all_models.values()].filter(m => m.type == 'Figure');
        const views = figures.map(figure => Bokeh.index.find_one(figure));
        return views.map((view, n) => {
            const canvas = view.canvas_view.primary.canvas;
            const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
            return data.some(value => value != 0) ? '' : figures[n].title.text;
        }).filter(title => title);
        """
    )
    assert empty == []
    links = browser.run(
        """
        const found = [];
        const search = root => {
            for (const element of root.querySelectorAll('*')) {
                if (element.tagName == 'A' && element.href.includes('info/worker/')) found.push(element.href);
                if (element.shadowRoot) search(element.shadowRoot);
            }
        };
        search(document);
        return found;
        """
    )
    assert len(links) == 2
    assert all(browser.run(f"return (await fetch('{link}')).status") == 200 for link in links)
