"""Which application an HTTP path belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Generic, Protocol, TypeVar

from ..exceptions import ConfigError

__all__ = ["Route", "Routes", "check_free", "check_prefix"]

#: Paths that the proxies answer themselves.
RESERVED = "/-"


class Route(Protocol):
    """Anything with a route prefix, such as `dask_serve.routing.table.RouteEntry`."""

    @property
    def prefix(self) -> str: ...


R = TypeVar("R", bound=Route)


class Routes(Generic[R]):
    """Longest-prefix match over the routes of a table.

    Whole segments count: ``/api`` answers for ``/api`` and ``/api/x``, not for ``/apix``; ``/`` answers for all.
    """

    __slots__ = ("_ordered", "_root", "entries")

    def __init__(self, entries: Iterable[R] = ()) -> None:
        self.entries = tuple(sorted(entries, key=lambda entry: (-len(entry.prefix), entry.prefix)))
        self._ordered = [(entry.prefix, entry.prefix + "/", entry) for entry in self.entries if entry.prefix != "/"]
        self._root = next((entry for entry in self.entries if entry.prefix == "/"), None)

    def match(self, path: str) -> R | None:
        """Return the entry with the longest prefix of ``path``, or None."""
        for prefix, below, entry in self._ordered:
            if path.startswith(below) or path == prefix:
                return entry
        return self._root


def check_prefix(prefix: str) -> None:
    """Raise ConfigError unless ``prefix`` can be a route prefix."""
    said = f"route_prefix={prefix!r} is not valid"
    if not prefix.startswith("/"):
        raise ConfigError(f"{said}: it must start with '/', as in {'/' + prefix.strip('/')!r}")
    if prefix != "/" and prefix.endswith("/"):
        raise ConfigError(f"{said}: it must not end with '/'; use {prefix.rstrip('/') or '/'!r}")
    if "//" in prefix:
        raise ConfigError(f"{said}: it has an empty segment ('//')")
    if any(char in "?#{}" or char.isspace() for char in prefix):
        raise ConfigError(f"{said}: it must not contain spaces or any of ? # {{ }}")
    if prefix == RESERVED or prefix.startswith(RESERVED + "/"):
        raise ConfigError(f"{said}: {RESERVED!r} is kept for the proxies' own routes")


def check_free(application: str, prefix: str, taken: Mapping[str, str | None]) -> None:
    """Raise ConfigError when another application of ``taken`` (route prefix by name) has that route already."""
    for other, route in sorted(taken.items()):
        if other != application and route == prefix:
            raise ConfigError(
                f"applications {other!r} and {application!r} cannot both have route_prefix={prefix!r}: "
                f"give {application!r} another one, or None, or delete {other!r} first"
            )
