"""Bringing a document to a cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..config import HTTPOptions
from ..controller.applying import Applied, apply, desired
from ..exceptions import ConfigError
from ..options import build_options
from .difference import difference
from .validation import Checked

if TYPE_CHECKING:
    from distributed import Client

    from ..shipping.graph import Built

__all__ = ["changes", "http_of", "make"]


def http_of(checked: Checked) -> tuple[HTTPOptions, list[str]]:
    """Return the options of the proxies, and the names of those that the document has."""
    return build_options(HTTPOptions, checked.http, checked.name), sorted(checked.http)


async def changes(client: Client, checked: Checked, built: Sequence[Built], *, prune: bool = False) -> list[str]:
    """Return a line for each thing that a document would change on a cluster."""
    now = await desired(client)
    return difference(now, [application.spec for application in built], http_of(checked), prune)


async def make(
    client: Client,
    checked: Checked,
    built: Sequence[Built],
    *,
    prune: bool = False,
    wait: bool = True,
    timeout: float | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Applied:
    """Make a cluster as a document says; see `dask_serve.controller.applying.apply`."""
    try:
        return await apply(client, built, http_of(checked), prune=prune, wait=wait, timeout=timeout, tell=tell)
    except ConfigError as error:
        raise type(error)(f"nothing of {checked.name} was deployed: {error}") from error
