"""How long a server's certificate is good for."""

from __future__ import annotations

import asyncio
import ssl
import time

__all__ = ["days_left"]

#: Seconds for a handshake.
HANDSHAKE = 5.0


async def days_left(address: str, context: ssl.SSLContext | None) -> tuple[float | None, str]:
    """Return for how many days the certificate of ``scheme://host:port`` is good, or None and why that is not known."""
    host, _, port = address.partition("://")[2].rpartition(":")
    try:
        opening = asyncio.open_connection(host.strip("[]"), int(port), ssl=context, server_hostname="")
        _, writer = await asyncio.wait_for(opening, HANDSHAKE)
    except (OSError, ValueError, asyncio.TimeoutError) as error:
        return None, str(error) or type(error).__name__
    certificate = writer.get_extra_info("peercert")
    writer.close()
    if not certificate:
        return None, "it is not verified"
    return (ssl.cert_time_to_seconds(certificate["notAfter"]) - time.time()) / 86400, ""
