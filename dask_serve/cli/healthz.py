"""Whether HTTP is served, asked from here."""

from __future__ import annotations

import http.client
import socket
import ssl
from urllib.parse import urlsplit

from .connecting import Cluster

__all__ = ["ask_healthz"]

#: Seconds for an answer.
ANSWER = 5.0


def ask_healthz(url: str, cluster: Cluster) -> tuple[str, str, str]:
    """Return the state, the message and the repair of what is found at a URL of proxies.

    Parameters
    ----------
    url : str
        As the status tells it.
    cluster : Cluster
        Whose it is: a URL of loopback is that of another machine than this one, if the scheduler is elsewhere.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        return "note", "it is a Unix socket, which is not looked at", ""
    if parts.hostname in ("127.0.0.1", "localhost", "::1") and not _is_here(cluster.address):
        return (
            "note",
            "it can be reached on the scheduler's node only",
            "where others are to reach it: serve.start(host='0.0.0.0'), or `dask serve proxy` on their node",
        )
    host = parts.hostname or ""
    if parts.scheme == "https":
        # What counts is whether it answers; whose certificate it has, its clients find out.
        unverified = ssl._create_unverified_context()  # noqa: S323
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            host, parts.port, timeout=ANSWER, context=unverified
        )
    else:
        connection = http.client.HTTPConnection(host, parts.port, timeout=ANSWER)
    try:
        connection.request("GET", "/-/healthz")
        answer = connection.getresponse()
        answer.read()
    except (OSError, http.client.HTTPException) as error:
        repair = "is there a firewall between, and does a proxy run there? `dask serve status -v` tells"
        return "wrong", f"it does not answer ({str(error) or type(error).__name__})", repair
    finally:
        connection.close()
    if answer.status in (200, 404):
        # The admin routes may have a port of their own.
        return "ok", "it answers", ""
    return "wrong", f"it answers {answer.status} {answer.reason} to /-/healthz", "`dask serve logs` may tell why"


def _is_here(address: str) -> bool:
    """Whether a scheduler's address is one of this machine."""
    if address.startswith("inproc"):
        return True
    host = address.partition("://")[2].rpartition(":")[0].strip("[]")
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        # Only an address of this machine can be bound to.
        with socket.socket(found[0], socket.SOCK_STREAM) as probe:
            probe.bind(found[4])
    except OSError:
        return False
    return True
