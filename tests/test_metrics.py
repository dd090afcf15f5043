"""The pages that Prometheus reads: of proxies, of workers, of the scheduler; and metrics of user code."""

from __future__ import annotations

import pickle
import re

import httpx
import pytest
from helpers import embedded_client, http_client, wait_until
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

import dask_serve as serve
from dask_serve.exceptions import ConfigError
from dask_serve.measures.families import Family, Sample
from dask_serve.measures.histogram import Histogram
from dask_serve.measures.prometheus import render

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
