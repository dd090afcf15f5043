"""Dask's certificates, as doors and their callers use them. Knows `distributed.Security`, and does not import it."""

from __future__ import annotations

import ssl
from typing import Any

__all__ = ["for_callers", "for_door", "lend_to_client", "reason"]

#: Protocols of Dask without TLS: where its own connections have none, certificates or not, doors have none either.
_PLAIN = ("tcp://", "ws://")


def lend_to_client(security: Any, role: str) -> None:
    """Let a process that has only the certificate of its own role show it as a client, too.

    ``dask scheduler --tls-cert`` and ``dask worker --tls-cert`` set no other, but the controller is a client of its
    scheduler, and replicas are clients of other workers' doors.

    Parameters
    ----------
    security : distributed.Security
        Changed, where it has no certificate for clients.
    role : str
        "scheduler" or "worker".
    """
    if security.tls_client_cert is None:
        security.tls_client_cert = getattr(security, f"tls_{role}_cert")
        security.tls_client_key = getattr(security, f"tls_{role}_key")


def for_callers(security: Any) -> ssl.SSLContext | None:
    """Return the context for connections to doors, or None where Dask has no certificates."""
    context: ssl.SSLContext | None = security.get_connection_args("client").get("ssl_context")
    return context


def for_door(security: Any, address: str) -> ssl.SSLContext | None:
    """Return the context for the door of the worker at ``address``, or None for one without TLS."""
    context: ssl.SSLContext | None = security.get_listen_args("worker").get("ssl_context")
    return None if address.startswith(_PLAIN) else context


def reason(error: BaseException) -> str:
    """Tell what went wrong in a TLS connection, in the words of OpenSSL and without its codes."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate verify failed: {error.verify_message}"
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.lower().replace("_", " ")
    return str(error) or type(error).__name__
