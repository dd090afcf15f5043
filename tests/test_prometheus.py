"""A real Prometheus beside a real cluster: what it knows is what the load generator knows, whatever was replaced."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from distributed import Client
from helpers import wait_until
from processes import Processes, free_port
from test_leaving import Load

import dask_serve as serve

MISSING = [name for name in ("prometheus", "promtool") if shutil.which(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.prometheus,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(MISSING), reason=f"no {' and '.join(MISSING)} here: make clusters"),
]
EXAMPLES = Path(__file__).parent.parent / "examples" / "prometheus"
OWN = {"application": "default", "deployment": "Outer"}


@serve.deployment
class Inner:
    async def double(self, number: int) -> int:
        return 2 * number


@serve.deployment(num_replicas=2)
class Outer:
    """Answers HTTP itself, and Python by asking another deployment."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    async def __call__(self, request: Any) -> dict[str, Any]:
        return {"label": "a"}

    async def nap(self, seconds: float) -> int:
        return int(await self.inner.double.remote(2))


class Site:
    """Scheduler, workers and Prometheus, each started by command."""

    def __init__(self, directory: Path) -> None:
        self.processes = Processes(directory)
        self.dashboard, self.port = free_port(), free_port()
        self.workers = 0
        file = directory / "scheduler.json"
        self.processes.dask(
            "scheduler", "scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file),
            "--dashboard-address", f"127.0.0.1:{self.dashboard}", "--preload", "dask_serve.preload", "--no-show",
        )  # fmt: skip
        self.address = wait_until(lambda: file.exists() and file.stat().st_size and json.loads(file.read_text()))
        self.address = self.address["address"]
        for _ in range(3):
            self.worker()
        self._prometheus(directory)

    def worker(self) -> str:
        name = f"worker-{self.workers}"
        self.workers += 1
        self.processes.dask(
            name, "worker", self.address, "--host", "127.0.0.1", "--nthreads", "2", "--name", name,
            "--dashboard-address", "127.0.0.1:0",
        )  # fmt: skip
        return name

    def _prometheus(self, directory: Path) -> None:
        """Start it with the example's files: a person changes the address, and a test the intervals."""
        text = (EXAMPLES / "prometheus.yml").read_text().replace("localhost:8787", f"127.0.0.1:{self.dashboard}")
        for before, after in {"_interval: 15s": "_interval: 500ms", "timeout: 10s": "timeout: 500ms"}.items():
            assert before in text
            text = text.replace(before, after)
        (directory / "prometheus.yml").write_text(text)
        shutil.copy(EXAMPLES / "alerts.yml", directory)
        self.processes.start(
            "prometheus", "prometheus", f"--config.file={directory}/prometheus.yml",
            f"--storage.tsdb.path={directory}/data", f"--web.listen-address=127.0.0.1:{self.port}",
        )  # fmt: skip
        self.api = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", trust_env=False, timeout=10)
        wait_until(self._is_up, 30)

    def _is_up(self) -> bool:
        try:
            return self.api.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def ask(self, query: str) -> list[Any]:
        answer = self.api.get("/api/v1/query", params={"query": query}).json()
        assert answer["status"] == "success", (query, answer)
        return list(answer["data"]["result"])

    def number(self, query: str) -> float | None:
        result = self.ask(query)
        assert len(result) < 2, (query, result)
        return float(result[0]["value"][1]) if result else None

    def becomes(self, query: str, value: float) -> None:
        seen: list[float | None] = []

        def is_so() -> bool:
            seen.append(self.number(query))
            return seen[-1] == value

        try:
            wait_until(is_so, 15)
        except AssertionError:
            raise AssertionError(f"{query} is {seen[-1]}, not {value}") from None

    def targets(self) -> dict[str, int]:
        """Return how many pages of each role are read without an error."""
        found: dict[str, int] = {}
        for target in self.api.get("/api/v1/targets").json()["data"]["activeTargets"]:
            if target["health"] == "up":
                role = target["labels"]["role"]
                found[role] = found.get(role, 0) + 1
        return found

    def close(self) -> None:
        self.api.close()
        self.processes.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    found = Site(tmp_path_factory.mktemp("prometheus"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def client(site) -> Iterator[Client]:
    with Client(site.address, set_as_default=False) as client:
        client.wait_for_workers(3, timeout=30)
        serve.start(port=0, num_proxies=2, admin_port=0, client=client)
        yield client


def selector(**labels: str) -> str:
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels.items()) + "}"


def deploy(client: Client, version: str) -> Any:
    app = Outer.options(version=version).bind(Inner.options(version=version).bind())
    return serve.run(app, client=client, timeout=60)


class Tally:
    """What load generators were answered, by HTTP and by handles."""

    def __init__(self) -> None:
        self.http = self.calls = 0

    def add(self, load: Load) -> None:
        assert not load.errors, load.errors[:3]
        http = sum(told == "a" for _, _, told in load.answers)
        self.http += http
        self.calls += len(load.answers) - http


def agree(site: Site, tally: Tally) -> None:
    """The sums on the scheduler's page are what was answered."""
    own, inner = selector(**OWN), selector(application="default", deployment="Inner")
    ok = selector(**OWN, status="200")
    site.becomes(f"sum(dask_serve_cluster_http_requests_total{ok})", tally.http)
    site.becomes(f"sum(dask_serve_cluster_http_requests_total{own})", tally.http)
    site.becomes(f"sum(dask_serve_cluster_http_request_seconds_count{own})", tally.http)
    site.becomes(f"sum(dask_serve_cluster_http_request_seconds_bucket{selector(**OWN, le='+Inf')})", tally.http)
    answered = selector(**OWN, outcome="answered")
    site.becomes(f"sum(dask_serve_cluster_replica_requests_total{answered})", tally.http + tally.calls)
    site.becomes(f"sum(dask_serve_cluster_replica_run_seconds_count{own})", tally.http + tally.calls)
    site.becomes(f"sum(dask_serve_cluster_replica_wait_seconds_count{own})", tally.http + tally.calls)
    site.becomes(f"sum(dask_serve_cluster_replica_run_seconds_count{inner})", tally.calls)
    # They never went back, which Prometheus would take for a restart, and count twice.
    for name in ("http_requests_total", "replica_requests_total", "http_request_seconds_count"):
        assert site.number(f"sum(resets(dask_serve_cluster_{name}[10m]))") == 0


def test_queries_agree_with_the_load_generator(site, client):
    tally = Tally()
    handle = deploy(client, "1")
    url = serve.url(client=client) + "/"
    wait_until(lambda: site.targets() == {"scheduler": 1, "worker": 3, "proxy": 2}, 30)

    # Replicas are replaced.
    with Load(handle, url, nap=0.0) as load:
        deploy(client, "2")
        load.goes_on()
    tally.add(load)
    agree(site, tally)
    # Those of before are still on their workers' pages.
    answered = selector(**OWN, outcome="answered")
    site.becomes(f"sum(dask_serve_replica_requests_total{answered})", tally.http + tally.calls)
    assert len(site.ask(f"dask_serve_replica_requests_total{answered}")) >= 4
    site.becomes(f"sum(dask_serve_http_requests_total{selector(**OWN, status='200')})", tally.http)
    # Replicas' own handles.
    inner = selector(application="default", deployment="Inner", outcome="answered")
    site.becomes(f"sum(dask_serve_router_requests_total{inner})", tally.calls)

    # Proxies are replaced.
    before = {row.pid for row in serve.status(client=client).proxies}
    with Load(handle, url, nap=0.0) as load:
        serve.start(body_limit=2**20, client=client)
        load.goes_on()
    tally.add(load)
    assert not before & {row.pid for row in serve.status(client=client).proxies if row.state == "ready"}
    agree(site, tally)

    # Workers leave: one is retired, another is told to end.
    retired, ended = _workers_with_replicas(client)[:2]
    site.worker()
    client.wait_for_workers(4, timeout=30)
    with Load(handle, url, nap=0.0) as load:
        client.retire_workers([retired])
        wait_until(lambda: retired not in client.scheduler_info(n_workers=-1)["workers"])
        load.goes_on()
        name = client.scheduler_info(n_workers=-1)["workers"][ended]["name"]
        assert site.processes.end(name) == 0
        load.goes_on()
    tally.add(load)
    agree(site, tally)
    wait_until(lambda: site.targets() == {"scheduler": 1, "worker": 2, "proxy": 2}, 30)


def _workers_with_replicas(client: Client) -> list[str]:
    replicas = serve.status(client=client).applications["default"].deployments["Outer"].replicas
    return sorted({replica.worker for replica in replicas})


def get(url: str, number: int) -> None:
    for _ in range(number):
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert answer.status == 200


def test_proxies_elsewhere(site, client):
    """What ``dask serve proxy`` counted arrives in whole, also when it ends."""
    deploy(client, "2")
    query = f"sum(dask_serve_cluster_http_requests_total{selector(**OWN, status='200')})"
    before = wait_until(lambda: site.number(query))
    log = site.processes.directory / "elsewhere.log"
    site.processes.serve("elsewhere", "proxy", "--scheduler", site.address, "--port", "0", "--http", "admin_port=0")
    url = wait_until(lambda: log.exists() and "serving at" in log.read_text() and log.read_text().split()[-1])
    wait_until(lambda: site.targets().get("proxy") == 3, 30)

    get(url, 200)
    site.processes.end("elsewhere")
    site.becomes(query, before + 200)


def test_a_killed_proxy_doubles_nothing(site, client):
    """What it counted in its last second may be lost; after that nothing is counted twice."""
    deploy(client, "2")
    url = serve.url(client=client) + "/"
    query = f"sum(dask_serve_cluster_http_requests_total{selector(**OWN, status='200')})"
    before = wait_until(lambda: site.number(query))
    get(url, 100)
    site.becomes(query, before + 100)
    row = next(row for row in serve.status(client=client).proxies if row.state == "ready")
    os.kill(row.pid, signal.SIGKILL)
    wait_until(lambda: row.pid not in {one.pid for one in serve.status(client=client).proxies})
    get(url, 100)
    site.becomes(query, before + 200)


def test_the_dashboard_and_the_alerts_have_something_to_say(site, client):
    handle = deploy(client, "2")
    with Load(handle, serve.url(client=client) + "/", nap=0.0) as load:
        load.goes_on(200)
        wait_until(lambda: site.number("sum(rate(dask_serve_cluster_http_requests_total[10s]))"), 30)
        dashboard = json.loads((EXAMPLES / "dashboard.json").read_text())
        empty = []
        for panel in dashboard["panels"]:
            for target in panel.get("targets", ()):
                query = target["expr"].replace("$__rate_interval", "10s")
                query = query.replace("$application", ".*").replace("$deployment", ".*")
                if not site.ask(query):
                    empty.append(panel["title"])
    # This application has no batched method, and perhaps nothing happened in the last seconds.
    assert set(empty) <= {"Calls in a batch, on average", "Calls that wait for a batch", "Events"}
    groups = site.api.get("/api/v1/rules").json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == 8
    assert {rule["health"] for rule in rules} == {"ok"}
    assert {rule["name"]: rule["state"] for rule in rules if rule["state"] == "firing"} == {}


def test_the_example_files_are_valid():
    for check, name in (("config", "prometheus.yml"), ("rules", "alerts.yml")):
        done = subprocess.run(
            ["promtool", "check", check, EXAMPLES / name], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
