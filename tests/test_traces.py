"""Spans of real processes, as a collector receives them: one trace from the client to the batch."""

from __future__ import annotations

import functools
import gzip
import itertools
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import pytest
from distributed import Client
from helpers import http_client, wait_until

import dask_serve as serve
from dask_serve.embedded import EmbeddedCluster

pytest.importorskip("opentelemetry.sdk")
trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"
SECRET = "hunter2-very-secret"


class Collector:
    """What OTLP over HTTP is sent to."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.raw: list[bytes] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.raw.append(body)
                request = trace_service.ExportTraceServiceRequest.FromString(body)
                for resource in request.resource_spans:
                    attributes = {a.key: a.value.string_value for a in resource.resource.attributes}
                    for scope in resource.scope_spans:
                        collector.spans += [(attributes, span) for span in scope.spans]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def of(self, trace: str) -> dict[str, Any]:
        """Spans of a trace by id."""
        return {span.span_id.hex(): span for _, span in list(self.spans) if span.trace_id.hex() == trace}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


@pytest.fixture(scope="module")
def service(collector) -> Iterator[Service]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        # Also a proxy's environment: it is a child of this process.
        with EmbeddedCluster.start(n_workers=2, nthreads=1, dashboard_address=None) as cluster:
            with Client(cluster.scheduler_address, set_as_default=False) as client:
                client.wait_for_workers(2, timeout=30)
                serve.start(port=0, tracing=True, client=client)
                serve.run(Front.bind(Model.bind()), name="shop", client=client)
                yield Service(client, serve.url(client=client))


class Service(NamedTuple):
    client: Client
    url: str


@serve.deployment(tracing=True)
class Model:
    @serve.batch(max_batch_size=4, batch_wait_timeout_s=0.05)
    async def predict(self, xs):
        return [len(x) for x in xs]


@serve.deployment(tracing=True)
class Front:
    def __init__(self, model):
        self.model = model

    async def __call__(self, request):
        from opentelemetry import trace

        if "fail" in request.query_params:
            raise ValueError((await request.body()).decode())
        with trace.get_tracer("mine").start_as_current_span("preprocess"):
            body = (await request.body()).decode()
        one, two = self.model.predict.remote(body), self.model.predict.remote(body * 2)
        return [await one, await two, serve.get_request_context().traceparent]


def test_one_trace_from_http_to_the_batch(service, collector):
    with http_client(service.url) as http:
        answer = http.post("/", content=SECRET, headers={"traceparent": PARENT})
    assert answer.json()[:2] == [len(SECRET), 2 * len(SECRET)]
    assert answer.json()[2].split("-")[1] == TRACE
    spans = wait_until(lambda: (found := collector.of(TRACE)) and len(found) >= 18 and found)
    names = sorted(span.name for span in spans.values())
    assert names.count("shop/Model.predict") == 2
    assert {"POST /", "queue", "shop/Front.__call__", "user code", "preprocess", "call shop/Model.predict"} < set(names)

    def path(span: Any) -> list[str]:
        above = spans.get(span.parent_span_id.hex())
        return [span.name, *(path(above) if above is not None else [span.parent_span_id.hex()])]

    # Every span leads to the client's own.
    assert {path(span)[-1] for span in spans.values()} == {"b7ad6b7169203331"}
    batch = next(span for span in spans.values() if span.name == "batch predict")
    assert path(batch) == [
        "batch predict",
        "user code",
        "shop/Model.predict",
        "call shop/Model.predict",
        "user code",
        "shop/Front.__call__",
        "POST /",
        "b7ad6b7169203331",
    ]
    # The other call of the batch is linked to it, both ways.
    assert len(batch.links) == 1
    other = spans[batch.links[0].span_id.hex()]
    assert (other.name, [link.span_id for link in other.links]) == ("user code", [batch.span_id])
    own = next(span for span in spans.values() if span.name == "preprocess")
    assert path(own)[:3] == ["preprocess", "user code", "shop/Front.__call__"]
    processes = {attributes["service.instance.id"] for attributes, span in collector.spans}
    assert len(processes) >= 2
    assert {attributes["service.name"] for attributes, span in collector.spans} == {"dask-serve"}
    for span in spans.values():
        above = spans.get(span.parent_span_id.hex())
        assert span.end_time_unix_nano >= span.start_time_unix_nano
        if above is not None:
            assert span.start_time_unix_nano >= above.start_time_unix_nano - 2e6, path(span)


def test_failures_are_marked_and_say_nothing_of_the_payload(service, collector):
    trace = "1af7651916cd43dd8448eb211c80319c"
    with http_client(service.url) as http:
        headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01", "x-private": SECRET}
        assert http.post(f"/?fail={SECRET}", content=SECRET, headers=headers).status_code == 500
    spans = wait_until(lambda: (found := collector.of(trace)) and len(found) >= 5 and found)
    failed = {span.name: span for span in spans.values() if span.status.code == 2}
    assert failed.keys() == {"POST /", "shop/Front.__call__", "user code"}
    types = {a.key: a.value.string_value for a in failed["user code"].attributes}
    assert types["error.type"] == "ValueError"
    assert not [raw for raw in collector.raw if SECRET.encode() in raw]


def test_a_client_without_a_trace_begins_one(service, collector):
    with http_client(service.url) as http:
        trace = http.post("/", content="x").json()[2].split("-")[1]
    assert set(trace) != {"0"}
    spans = wait_until(lambda: (found := collector.of(trace)) and len(found) >= 18 and found)
    assert [span.name for span in spans.values() if not span.parent_span_id] == ["POST /"]


def test_who_makes_no_spans_does_not_load_opentelemetry():
    code = (
        "import sys, dask_serve.proxy.__main__, dask_serve.proxy.app, dask_serve.replica.unit, dask_serve.replica.http"
    )
    check = "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    done = subprocess.run([sys.executable, "-c", f"{code}; {check}"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_opentelemetry_it_says_what_to_install():
    code = """
import sys
sys.modules["opentelemetry"] = None
from dask_serve.config import HTTPOptions
from dask_serve.proxy.observed import make_forwarder
from dask_serve.exceptions import ConfigError
from types import SimpleNamespace
import asyncio
async def main():
    try:
        make_forwarder(None, HTTPOptions(tracing=True))
    except ConfigError as error:
        print(error)
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("tracing=True needs OpenTelemetry")
    assert "install dask-serve[otel]" in done.stdout


def test_who_decided_against_a_trace_gets_none(service, collector):
    trace = "2af7651916cd43dd8448eb211c80319c"
    with http_client(service.url) as http:
        headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-00"}
        assert http.post("/", content="x", headers=headers).json()[2].split("-")[1::2] == [trace, "00"]
        later = http.post("/", content="x").json()[2].split("-")[1]
    wait_until(lambda: len(collector.of(later)) >= 18)
    assert collector.of(trace) == {}


def test_it_is_switched_in_place(service, collector):
    def traced(number: int) -> bool:
        trace = f"{number:032x}"
        with http_client(service.url) as http:
            headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
            seen = http.get("/echo", headers=headers).text.split("-")
        assert seen[1] == trace
        of_proxy = wait_until(lambda: [id for id, span in collector.of(trace).items() if span.name == "GET /echo"])
        # Without spans of its own the replica sees the proxy's.
        return seen[2] not in of_proxy

    replicas, numbers = set(), itertools.count(1)
    for on in (False, True, False):
        serve.run(Echo.options(tracing=on).bind(), name="echo", route_prefix="/echo", client=service.client)
        status = serve.status(client=service.client)
        replicas |= {replica.id for replica in status.applications["echo"].deployments["Echo"].replicas}
        wait_until(functools.partial(lambda on: traced(next(numbers)) == on, on))
    assert len(replicas) == 1


@serve.deployment
class Echo:
    def __call__(self):
        return serve.get_request_context().traceparent
