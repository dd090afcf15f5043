"""The pages that Prometheus reads: of proxies, of workers, of the scheduler; and metrics of user code."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
from pathlib import Path

import httpx
import pytest
import yaml
from helpers import embedded_client, http_client, wait_until
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

import dask_serve as serve
from dask_serve.exceptions import ConfigError
from dask_serve.measures.families import Family, Sample
from dask_serve.measures.histogram import Histogram
from dask_serve.measures.prometheus import render
from dask_serve.metrics import KEPT, _Registry

# -- text --------------------------------------------------------------------------------------------------------------

label_text = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=20)


@given(label_text, st.floats(0, 1e12), st.lists(st.floats(0, 100), max_size=20), label_text)
def test_what_is_rendered_can_be_read(label, value, durations, text):
    histogram = Histogram()
    for duration in durations:
        histogram.add(duration)
    families = [
        Family("c", "counter", text, [Sample({"l": label}, value)]),
        Family("g", "gauge", "", [Sample({}, value)]),
        Family("h", "histogram", text, [Sample({"l": label}, histogram)]),
    ]
    read = {family.name: family for family in text_string_to_metric_families(render(families))}
    (counted,) = read["c"].samples
    assert (counted.labels, counted.value) == ({"l": label}, pytest.approx(value))
    assert read["g"].samples[0].value == pytest.approx(value)
    buckets = [sample for sample in read["h"].samples if sample.name == "h_bucket"]
    assert buckets[-1].labels == {"l": label, "le": "+Inf"}
    assert buckets[-1].value == len(durations)
    assert [bucket.value for bucket in buckets] == sorted(bucket.value for bucket in buckets)


# -- metrics of user code ----------------------------------------------------------------------------------------------


def test_bad_declarations_and_uses_say_what_to_do():
    with pytest.raises(ConfigError, match="'a-b' is no name for a metric"):
        serve.metrics.Counter("a-b")
    with pytest.raises(ConfigError, match="'replica' of metric 'x1' cannot be used"):
        serve.metrics.Counter("x1", tag_keys=("replica",))
    counter = serve.metrics.Counter("x2", tag_keys=("kind",))
    with pytest.raises(ConfigError, match="no tag 'sort'; its tag_keys: kind"):
        counter.inc(tags={"sort": "a"})
    with pytest.raises(ConfigError, match="needs a value for tag 'kind'"):
        counter.inc()
    with pytest.raises(ConfigError, match="cannot grow by -1"):
        counter.inc(-1, tags={"kind": "a"})
    with pytest.raises(ConfigError, match=r"declared before .* as Counter\(tag_keys=\['kind'\]\), and now as Gauge"):
        serve.metrics.Gauge("x2")
    with pytest.raises(ConfigError, match="do not ascend"):
        serve.metrics.Histogram("x3", boundaries=[2, 1])
    with pytest.raises(ConfigError, match="'x5' has a tag twice"):
        serve.metrics.Gauge("x5", tag_keys=("a", "a"))
    with pytest.raises(ConfigError, match="tag '__name__' of metric 'x5' cannot be used"):
        serve.metrics.Gauge("x5", tag_keys=("__name__",))


@pytest.mark.parametrize("name", ["dask_serve_replicas", "dask_worker_tasks", "process_cpu_seconds", "python_info"])
def test_names_of_others_are_taken(name):
    with pytest.raises(ConfigError, match=f"metric '{name}' cannot have a name that begins with"):
        serve.metrics.Gauge(name)


def test_no_two_metrics_are_told_under_one_name():
    first = serve.metrics.Counter("x6_total")
    assert first.name == "x6"
    assert serve.metrics.Counter("x6")._series is first._series
    with pytest.raises(ConfigError, match=r"'x6_total' would be told as 'x6_total', as Counter 'x6' is"):
        serve.metrics.Gauge("x6_total")
    serve.metrics.Histogram("x7")
    with pytest.raises(ConfigError, match=r"would be told as 'x7_count', as Histogram 'x7' is"):
        serve.metrics.Gauge("x7_count")


def test_gauges_go_with_their_replica(monkeypatch):
    now = 100.0
    monkeypatch.setattr("dask_serve.metrics.time.monotonic", lambda: now)
    registry = _Registry()
    gauge, counter = serve.metrics.Gauge("x8"), serve.metrics.Counter("x9")
    registry._metrics = {"x8": (gauge, {("a", "d", "r"): 1.0}), "x9": (counter, {("a", "d", "r"): 2.0})}
    registry.forget("r")
    told = {family.name: len(family.samples) for family in registry.families()}
    assert told == {"x8": 0, "x9": 1}
    now += KEPT + 1
    assert [len(family.samples) for family in registry.families()] == [0, 0]
    # Where replicas are one series nobody's end is its end.
    registry.apart = False
    registry._metrics["x8"][1]["a", "d", ""] = 3.0
    assert [sample.labels for sample in registry.families()[0].samples] == [{"application": "a", "deployment": "d"}]


def test_metrics_travel_by_their_declaration():
    counter = serve.metrics.Counter("x4", "What it is.", tag_keys=("kind",))
    counter.set_default_tags({"kind": "usual"})
    counter.inc(2)
    again = pickle.loads(pickle.dumps(counter))
    again.inc()
    assert again._series is counter._series
    assert list(counter._series.values()) == [3.0]


# -- pages -------------------------------------------------------------------------------------------------------------


@serve.deployment(num_replicas=2)
class Model:
    seen = serve.metrics.Counter("model_words", "Words that were seen.", tag_keys=("language",))

    def __init__(self) -> None:
        self.sizes = serve.metrics.Histogram("model_size", boundaries=[1, 10])

    def __call__(self) -> str:
        self.seen.inc(3, tags={"language": "en"})
        self.sizes.observe(5)
        return "x"


@pytest.fixture(scope="module")
def client():
    with embedded_client(2, 2) as client:
        yield client


def scrape(url: str) -> dict[str, list]:
    text = httpx.get(url, timeout=10).text
    found: dict[str, list] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


def pages(client) -> tuple[str, list[str]]:
    """Return the scheduler's page and those of the workers."""
    info = client.scheduler_info(n_workers=-1)
    hosts = [
        f"http://{worker['host']}:{worker['services']['dashboard']}/metrics" for worker in info["workers"].values()
    ]
    return re.sub(r"/status$", "/metrics", client.dashboard_link), hosts


def total(samples: list, **labels: str) -> float:
    return sum(s.value for s in samples if all(s.labels.get(name) == value for name, value in labels.items()))


def test_every_page_tells_the_same_requests(client):
    serve.run(Model.bind(), name="told", route_prefix="/told", client=client)
    with http_client(serve.url(client=client)) as http:
        for _ in range(30):
            assert http.get("/told").status_code == 200
        assert http.get("/nothing").status_code == 404
        proxy = http.get("/-/metrics").text
    own = {"application": "told", "deployment": "Model"}
    read = {
        sample.name + str(sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(proxy)
        for sample in family.samples
    }
    labels = sorted(own.items())
    assert read["dask_serve_http_requests_total" + str(sorted({**own, "status": "200"}.items()))] == 30
    assert read["dask_serve_http_request_seconds_count" + str(labels)] == 30
    assert read["dask_serve_http_wait_seconds_count" + str(labels)] == 30
    assert read["dask_serve_router_sent_total" + str(labels)] == 30

    scheduler, workers = pages(client)

    def at_replicas():
        found = [scrape(page) for page in workers]
        if sum(total(one["dask_serve_replica_requests_total"], **own, outcome="answered") for one in found) < 30:
            return None
        return found

    found = wait_until(at_replicas)
    assert sum(total(one["dask_serve_replica_run_seconds_count"], **own) for one in found) == 30
    assert sum(total(one["dask_serve_replica_requests_total"], **own, outcome="failed") for one in found) == 0
    assert sum(total(one["model_words_total"], **own, language="en") for one in found) == 90
    assert sum(total(one["model_size_bucket"], **own, le="10.0") for one in found) == 30
    replicas = {sample.labels["replica"] for one in found for sample in one["dask_serve_replica_running"]}
    assert len(replicas) == 2

    def everywhere():
        one = scrape(scheduler)
        answered = total(one.get("dask_serve_cluster_replica_requests_total", []), **own, outcome="answered")
        http = total(one.get("dask_serve_cluster_http_requests_total", []), **own, status="200")
        return one if answered == http == 30 else None

    one = wait_until(everywhere)
    assert total(one["dask_serve_replicas"], **own, state="ready") == 2
    assert total(one["dask_serve_replicas_wanted"], **own) == 2
    assert total(one["dask_serve_application_status"], application="told", status="running") == 1
    assert total(one["dask_serve_proxies"], state="ready") == 1


# -- what people build on ----------------------------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent
DOCUMENTED = re.compile(r"\| `(dask_serve_\w+)` \| (counter|gauge|histogram) \| ([\w, ]*)\|")
#: Of Prometheus's own.
ADDED = ("_bucket", "_sum", "_count")


@serve.deployment
class Batched:
    def __init__(self, model):
        self.model = model

    @serve.batch(max_batch_size=4)
    async def many(self, numbers: list[int]) -> list[int]:
        return numbers

    async def __call__(self, request=None) -> str:
        await self.many(1)
        return await self.model.remote()


@pytest.fixture(scope="module")
def told(client) -> dict[str, tuple[str, set[str]]]:
    """Return kind and labels of all metrics of dask_serve, from pages on which each has a sample."""
    serve.run(Batched.bind(Model.bind()), name="batched", route_prefix="/batched", client=client)
    url = serve.url(client=client)

    def ask() -> list[str]:
        with http_client(url) as http:
            assert http.get("/batched").status_code == 200
            return [http.get("/-/metrics").text]

    scheduler, workers = pages(client)
    serve.scale("batched/Model", 1, client=client)

    def complete():
        # Again and again: there are few threads here, and the replica may just have moved to better ones.
        texts = ask()
        found = [*texts, *(httpx.get(page, timeout=10).text for page in (scheduler, *workers))]
        sums = ("dask_serve_cluster_http_wait_seconds_bucket", "dask_serve_cluster_replica_run_seconds_bucket")
        summed = all(f'{name}{{application="batched"' in found[1] for name in sums)
        batched = any("dask_serve_batch_calls_total{" in text for text in found[2:])
        return found if summed and batched else None

    known: dict[str, tuple[str, set[str]]] = {}
    for text in wait_until(complete):
        for family in text_string_to_metric_families(text):
            if family.name.startswith("dask_serve_"):
                name = f"{family.name}_total" if family.type == "counter" else family.name
                _, labels = known.setdefault(name, (family.type, set()))
                for sample in family.samples:
                    labels.update(sample.labels.keys() - {"le"})
    return known


def test_the_documentation_lists_what_is_told(told):
    text = (ROOT / "docs" / "metrics.md").read_text()
    rows = {name: (kind, {*filter(None, re.split("[, ]+", labels))}) for name, kind, labels in DOCUMENTED.findall(text)}
    # Events are those that happened.
    rows["dask_serve_events_total"] = told["dask_serve_events_total"]
    assert rows == told


def names_in(query: str) -> set[str]:
    return set(re.findall(r"\bdask_serve_\w+", query))


def test_dashboard_and_alerts_ask_for_what_there_is(told):
    known = set(told) | {name + more for name, (kind, _) in told.items() if kind == "histogram" for more in ADDED}
    dashboard = json.loads((ROOT / "examples" / "prometheus" / "dashboard.json").read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    queries += [variable["definition"] for variable in dashboard["templating"]["list"] if "definition" in variable]
    alerts = yaml.safe_load((ROOT / "examples" / "prometheus" / "alerts.yml").read_text())
    rules = [rule for group in alerts["groups"] for rule in group["rules"]]
    queries += [rule["expr"] for rule in rules]
    unknown = {name for query in queries for name in names_in(query)} - known
    assert not unknown
    assert all(names_in(query) or "up{" in query for query in queries)
    for labels in (re.findall(r"(\w+)=~?\"", query) for query in queries):
        assert set(labels) <= {"application", "deployment", "status", "state", "outcome", "job"}
    # It has what Grafana needs to take it.
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    assert {"title", "uid", "schemaVersion", "templating", "panels"} <= dashboard.keys()
    for panel in panels:
        assert {"title", "type", "gridPos", "datasource", "fieldConfig", "targets"} <= panel.keys()
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    assert all({"summary", "description"} <= rule["annotations"].keys() for rule in rules)


def test_the_scheduler_tells_where_pages_are(client, told):
    with serve_changed(client, admin_port=0):
        base = re.sub(r"/status$", "", client.dashboard_link)
        groups = httpx.get(f"{base}/api/serve/v1/targets").raise_for_status().json()
        assert [group["labels"]["role"] for group in groups] == ["scheduler", "worker", "worker", "proxy"]
        for group in groups:
            (target,) = group["targets"]
            labels = group["labels"]
            page = httpx.get(f"{labels['__scheme__']}://{target}{labels['__metrics_path__']}")
            assert "# TYPE dask_serve_" in page.text


@contextlib.contextmanager
def serve_changed(client, **options):
    serve.start(**options, client=client)
    try:
        yield
    finally:
        serve.start(**dict.fromkeys(options), client=client)
