"""The Dask client that a session's functions use, and the embedded cluster where there is none."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import dask
from distributed import Client

from .controller.progress import Progress
from .session.peers import current_client, not_running

if TYPE_CHECKING:
    from .embedded import EmbeddedCluster

__all__ = ["close_made", "ensure_client", "existing_client", "is_made_here"]

#: Seconds that the workers of a new embedded cluster have to register before it is used without the last of them.
WORKERS_WITHIN = 10.0


@dataclasses.dataclass(frozen=True)
class _Made:
    """The client, and maybe the cluster, that this module made."""

    client: Client
    cluster: EmbeddedCluster | None


_made: _Made | None = None
_making = threading.Lock()


def existing_client(client: Client | None) -> Client:
    """Return the client to use where something should run already.

    Raises
    ------
    NotRunningError
        There is none, nor an address in Dask's configuration.
    """
    used = current_client(client)
    if used is not None:
        return used
    if dask.config.get("scheduler-address", None) is None:
        not_running("here, as far as can be seen: there is no Dask client")
    return ensure_client(None, Progress())[0]


def ensure_client(client: Client | None, say: Callable[[str], None]) -> tuple[Client, bool]:
    """Return the client to use, and whether an embedded cluster was made for it."""
    global _made
    with _making:
        used = current_client(client)
        if used is not None:
            return used, False
        address = dask.config.get("scheduler-address", None)
        if address is not None:
            _made = _Made(Client(address), None)
            return _made.client, False
        from .embedded import EmbeddedCluster

        cluster = EmbeddedCluster.start(progress=say)
        try:
            _made = _Made(Client(cluster.scheduler_address), cluster)
            # They start together; whoever deploys before the last of them is up has all replicas on the first.
            with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
                _made.client.wait_for_workers(cluster.n_workers, timeout=WORKERS_WITHIN)
        except BaseException:
            cluster.close()
            raise
        # Registered last, it runs first: a client whose scheduler leaves would try to reconnect, and complain.
        atexit.register(close_made)
        return _made.client, True


def _after_fork() -> None:
    """The embedded cluster is the parent's; its client has no thread here that could close it."""
    global _made
    _made = None


os.register_at_fork(after_in_child=_after_fork)


def is_made_here(client: Client) -> bool:
    """The client is the one that `ensure_client` has made."""
    return _made is not None and client is _made.client


def close_made() -> None:
    """End the client, and the cluster, that `ensure_client` has made."""
    global _made
    made, _made = _made, None
    if made is None:
        return
    atexit.unregister(close_made)
    try:
        made.client.close()
    finally:
        if made.cluster is not None:
            made.cluster.close()
