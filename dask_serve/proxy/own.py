"""The proxies' own routes: health, readiness, routes, metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from ..routing.fabric import Fabric
from .protocol import CONNECTION

if TYPE_CHECKING:
    from .forward import Forwarder

__all__ = ["make_own_app"]


def make_own_app(fabric: Fabric, forwarder: Forwarder) -> Starlette:
    """Return the application behind ``/-/``."""

    async def healthz(request: Request) -> Response:
        return PlainTextResponse("ok")

    async def readyz(request: Request) -> Response:
        if request.scope[CONNECTION].server_state.draining:
            return PlainTextResponse("draining", 503)
        if not forwarder.routes.entries:
            return PlainTextResponse("no application is routed yet", 503)
        return PlainTextResponse("ready")

    async def routes(request: Request) -> Response:
        return JSONResponse({entry.prefix: entry.deployment for entry in forwarder.routes.entries})

    async def metrics(request: Request) -> Response:
        text = "\n".join(_metrics(fabric, forwarder)) + "\n"
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    return Starlette(
        routes=[
            Route("/-/healthz", healthz),
            Route("/-/readyz", readyz),
            Route("/-/routes", routes),
            Route("/-/metrics", metrics),
        ]
    )


def _metrics(fabric: Fabric, forwarder: Forwarder) -> list[str]:
    """Render the counters of this process in Prometheus's text format."""
    from .forward import BUCKETS

    lines = ["# TYPE dask_serve_http_requests_total counter"]
    for status, count in sorted(forwarder.statuses.items()):
        lines.append(f'dask_serve_http_requests_total{{status="{status}"}} {count}')
    lines.append("# TYPE dask_serve_http_request_seconds histogram")
    total = 0
    for bound, count in zip([*map(str, BUCKETS), "+Inf"], forwarder.buckets, strict=True):
        total += count
        lines.append(f'dask_serve_http_request_seconds_bucket{{le="{bound}"}} {total}')
    lines.append(f"dask_serve_http_request_seconds_sum {forwarder.seconds:.6f}")
    lines.append(f"dask_serve_http_request_seconds_count {total}")
    kinds = {
        "sent": "counter",
        "answered": "counter",
        "failed": "counter",
        "refused": "counter",
        "lost": "counter",
        "cancelled": "counter",
        "queued": "gauge",
        "in_flight": "gauge",
        "replicas": "gauge",
    }
    stats = [router.stats() for router in fabric.routers.values()]
    for name, kind in kinds.items():
        metric = f"dask_serve_router_{name}{'_total' if kind == 'counter' else ''}"
        lines.append(f"# TYPE {metric} {kind}")
        for stat in stats:
            app, _, deployment = stat["deployment"].partition("/")
            lines.append(f'{metric}{{application="{app}",deployment="{deployment}"}} {stat[name]}')
    return lines
