"""The hot path with somebody who looks on: access log, spans, ``Server-Timing`` for all. Used only where one is on."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from starlette.types import Scope

from ..config import HTTPOptions
from ..routing.fabric import Fabric
from ..routing.router import Router
from .access import AccessLog
from .calls import HttpCall
from .errors import Refusal, request_id_in
from .forward import Forwarder
from .protocol import Refused
from .timing import ASKS

if TYPE_CHECKING:
    from .tracing import ProxyTraces

__all__ = ["ObservedForwarder", "make_forwarder"]

#: Where the scope of a request holds its id, and a list which is not empty once its answer has been noted.
ID, NOTED = "dask_serve.request_id", "dask_serve.noted"


def make_forwarder(fabric: Fabric, options: HTTPOptions) -> Forwarder:
    """Return what serves requests: the plain one unless the options ask for something that it does not do."""
    if options.access_log or options.tracing or options.server_timing:
        return ObservedForwarder(fabric, options)
    return Forwarder(fabric, options)


class ObservedForwarder(Forwarder):
    """Serves requests, and tells of them.

    Attributes
    ----------
    access : AccessLog or None

    Raises
    ------
    ConfigError
        Spans are asked for, and OpenTelemetry is not installed.
    """

    def __init__(self, fabric: Fabric, options: HTTPOptions) -> None:
        super().__init__(fabric, options)
        self.access: AccessLog | None = None
        if options.access_log:
            self.access = AccessLog(options.access_log_limit, options.log_format)
        self._traces: ProxyTraces | None = None
        if options.tracing:
            # What nobody asks for is not loaded.
            from .tracing import ProxyTraces

            self._traces = ProxyTraces()
        self._timed = options.server_timing

    def read_head(self, scope: Scope) -> tuple[str, float | None, Refusal | None]:
        """Return what the plain one does, and begin to look at the request."""
        found = super().read_head(scope)
        scope[ID] = found[0]
        if self._timed:
            scope["headers"] = [*scope["headers"], (ASKS, b"1")]
        if self._traces is not None:
            route = self.routes.match(scope["path"])
            self._traces.begin(scope, "" if route is None else route.prefix, found[0])
        return found

    def submit(self, router: Router, call: HttpCall, timeout: float | None, scope: Scope) -> None:
        """Put a request to its router."""
        if self._traces is not None:
            self._traces.submitted(scope, call)
        super().submit(router, call, timeout, scope)

    def count(self, status: int, began: float, deployment: str, scope: Scope) -> None:
        """Count an answer, and note it."""
        super().count(status, began, deployment, scope)
        self.note(status, began, deployment, scope)
        self.end(status, deployment, scope)

    def end(self, status: int, deployment: str, scope: Scope) -> None:
        """End the span of a request that its connection has answered."""
        if self._traces is not None:
            self._traces.end(scope, status, deployment)

    def note_refused(self, refused: Refused) -> None:
        """Note what a connection has refused by itself."""
        if self.access is not None:
            client, method, path, version, status, request_id = refused
            self.access.accesses.append((time.time(), client, method, path, version, status, 0.0, "", request_id))

    def note(self, status: int, began: float, deployment: str, scope: Scope) -> None:
        """Note an answer for the access log."""
        if self.access is None:
            return
        if NOTED in scope:
            scope[NOTED].append(status)
        self.access.accesses.append(
            (
                time.time(),
                scope["client"],
                scope.get("method", "WEBSOCKET"),
                scope["raw_path"],
                scope["http_version"],
                status,
                time.monotonic() - began,
                deployment,
                scope.get(ID) or request_id_in(scope["headers"]),
            )
        )
