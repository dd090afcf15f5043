"""Who the client is, where a reverse proxy stands between."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Any

from starlette.types import Scope

__all__ = ["TrustedProxies", "is_local"]

_NAMES = frozenset({b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host"})
#: Any of them says that the peer speaks for somebody else.
_RELAYED = frozenset({*_NAMES, b"forwarded", b"x-real-ip", b"via"})


class TrustedProxies:
    """Takes over what reverse proxies with trusted addresses say about a client.

    Parameters
    ----------
    trusted : iterable of str
        Addresses, networks, and "unix".
    """

    def __init__(self, trusted: Iterable[str]) -> None:
        trusted = list(trusted)
        self._unix = "unix" in trusted
        self._networks = [ipaddress.ip_network(entry) for entry in trusted if entry != "unix"]

    def read(self, scope: Scope) -> None:
        """Correct client, scheme and host of a request."""
        if not self._trusts_peer(scope["client"]):
            return
        values: dict[bytes, list[str]] = {}
        for name, value in scope["headers"]:
            if name in _NAMES:
                values.setdefault(name, []).extend(part.strip() for part in value.decode("latin-1").split(","))
        if client := self._client(values.get(b"x-forwarded-for", [])):
            scope["client"] = (client, 0)
        # Each proxy of a chain appends: the last was said by the peer that is trusted.
        proto = values.get(b"x-forwarded-proto", [""])[-1].lower()
        if proto in {"http", "https", "ws", "wss"}:
            websocket = scope["type"] == "websocket"
            secure = proto in {"https", "wss"}
            scope["scheme"] = ("wss" if secure else "ws") if websocket else ("https" if secure else "http")
        if host := values.get(b"x-forwarded-host", [""])[-1]:
            others = [(name, value) for name, value in scope["headers"] if name != b"host"]
            scope["headers"] = [(b"host", host.encode("latin-1")), *others]

    def _trusts_peer(self, client: Any) -> bool:
        return self._unix if client is None else self._trusts(client[0])

    def _trusts(self, address: str) -> bool:
        return _is_address(address) and any(ipaddress.ip_address(address) in network for network in self._networks)

    def _client(self, addresses: list[str]) -> str:
        """Return the last address that is not a trusted proxy's own: those before it may be made up."""
        for address in reversed(addresses):
            if not self._trusts(address):
                return address if _is_address(address) else ""
        return addresses[0] if addresses else ""


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def is_local(scope: Scope) -> bool:
    """Whether a request comes from this machine, and for nobody else as far as it says."""
    client = scope["client"]
    if client is not None and not (_is_address(client[0]) and ipaddress.ip_address(client[0]).is_loopback):
        return False
    # A client that a trusted proxy named has port 0 here, and was judged by its own address above.
    relayed = client is None or client[1] != 0
    return not (relayed and any(name in _RELAYED for name, _ in scope["headers"]))
