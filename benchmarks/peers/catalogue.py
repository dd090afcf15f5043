"""The peers: how each is run, in which cases, and what is asked."""

from __future__ import annotations

from collections.abc import Mapping

from .interface import Peer
from .models import BATCHES, CASE

__all__ = ["HTTP", "PEERS", "PICKLE", "QUIET"]

#: Read by `ray_serve`: HTTP is served too; no line in the log for each request; how calls over gRPC are serialised.
HTTP, QUIET, PICKLE = "BENCHMARK_HTTP", "BENCHMARK_QUIET", "BENCHMARK_PICKLE"

_THROUGHPUT = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
_FEWER_METRICS = {
    "RAY_SERVE_COLLECT_AUTOSCALING_METRICS_ON_HANDLE": "0",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "10000",
}
_THROUGHPUT_MODES: Mapping[str, Mapping[str, str]] = {
    "throughput mode": _THROUGHPUT,
    "throughput mode, no access log": {**_THROUGHPUT, QUIET: "1"},
    "throughput mode, all else that helps": {**_THROUGHPUT, **_FEWER_METRICS, QUIET: "1", PICKLE: "1"},
}
_HAPROXY = "HAProxy and throughput mode"
_BATCHES: Mapping[str, Mapping[str, str]] = {"batches": {CASE: BATCHES}}

PEERS = {
    "ray_serve": Peer(
        title="Ray Serve",
        modes={
            "default": {HTTP: "1"},
            **_THROUGHPUT_MODES,
            _HAPROXY: {**_THROUGHPUT, HTTP: "1", "RAY_SERVE_ENABLE_HA_PROXY": "1"},
            **_BATCHES,
        },
        cases={
            "concurrent": dict.fromkeys(["default", *_THROUGHPUT_MODES], 15.0),
            "burst": {"default": 40.0},
            "noop": {"default": 30.0, _HAPROXY: 3.0},
            "batched": {"batches": None},
        },
    ),
    "litserve": Peer(
        title="LitServe",
        modes={"default": {}, **_BATCHES},
        cases={"json": {"default": None}, "batches": {"batches": None}},
    ),
    "bentoml": Peer(title="BentoML", modes={"default": {}}, cases={"json": {"default": None}}),
    "mosec": Peer(
        title="mosec",
        modes={"default": {}, **_BATCHES},
        cases={"json": {"default": None}, "batches": {"batches": None}},
    ),
}
