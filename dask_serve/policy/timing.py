"""What the response header ``Server-Timing`` tells, and how a replica tells its part to the proxy."""

from __future__ import annotations

__all__ = ["ASKS", "TOLD", "server_timing", "told"]

#: The header of requests that asks for it, and that of a replica's answers, which no client sees.
ASKS, TOLD = b"x-request-server-timing", b"x-dask-serve-timing"


def told(waited: float, ran: float) -> tuple[bytes, bytes]:
    """Return the header by which a replica tells how long a request waited there and ran, in seconds."""
    return TOLD, b"%.7f %.7f" % (waited, ran)


def server_timing(replica: bytes, routed: float, total: float) -> bytes:
    """Return the value of ``Server-Timing``, in milliseconds.

    Parameters
    ----------
    replica : bytes
        What the replica told; "" where there is none.
    routed : float
        Seconds for which the request waited at the proxy's router.
    total : float
        Seconds from the end of the request's head to the head of the answer.
    """
    try:
        waited, ran = map(float, replica.split())
    except ValueError:
        return b"total;dur=%.3f" % (1e3 * total)
    return b"queue;dur=%.3f, service;dur=%.3f, total;dur=%.3f" % (1e3 * (routed + waited), 1e3 * ran, 1e3 * total)
