"""The options of commands that start proxies."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import click

__all__ = ["http_options"]

Function = TypeVar("Function", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--host", help="Interface the proxies listen on (127.0.0.1 unless set)."),
    click.option("--port", type=click.IntRange(0, 65535), help="Port the proxies listen on (8000 unless set; 0: any)."),
    click.option("--num-proxies", type=click.IntRange(1), help="Number of proxy processes (1 unless set)."),
    click.option(
        "--http",
        "options",
        multiple=True,
        metavar="NAME=VALUE",
        help="Any other option of serve.start, e.g. --http body_limit=1000000; the value is JSON or text.",
    ),
)


def http_options(function: Function) -> Function:
    """Add the options of proxies; the function gets those that were given as one argument, ``http``, a dictionary."""

    @functools.wraps(function)
    def with_http(**given: Any) -> Any:
        from ..options import parse_options

        http = parse_options(given.pop("options"))
        for name in ("host", "port", "num_proxies"):
            value = given.pop(name)
            if value is not None:
                http[name] = value
        return function(http=http, **given)

    for option in reversed(_OPTIONS):
        with_http = option(with_http)
    return with_http  # type: ignore[return-value]
