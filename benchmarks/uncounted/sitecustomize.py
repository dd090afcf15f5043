"""Takes the counting of requests out of the processes that find this on their path: what `counting` compares with.

Only what is counted for metrics goes; what the service needs to know itself (who has how many in flight) stays.
"""

from __future__ import annotations

import sys
from typing import Any


def _nothing(*_: Any) -> None:
    pass


def _from_proxies() -> None:
    from dask_serve.proxy.forward import Forwarder
    from dask_serve.routing import fabric

    Forwarder.count = _nothing  # type: ignore[method-assign]
    # Then routers do not look how long a request waited.
    fabric.Histogram = _nothing  # type: ignore[misc, assignment]


def _from_workers() -> None:
    from dask_serve.replica.core import ReplicaCore
    from dask_serve.routing import fabric

    ReplicaCore._count = _nothing  # type: ignore[method-assign]
    fabric.Histogram = _nothing  # type: ignore[misc, assignment]


if "dask_serve.proxy" in sys.orig_argv:
    _from_proxies()
elif "worker" in sys.orig_argv:
    _from_workers()
