"""``dask scheduler --preload dask_serve.preload``: the controller and the proxies, up before any client comes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .config import HTTPOptions
from .controller.boot import BootDocument
from .controller.plugin import Controller
from .controller.service_file import check
from .controller.state_file import default_file
from .defaults import overlaid
from .exceptions import ConfigError
from .options import build_options, parse_options

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler

__all__ = ["dask_setup"]


@click.command()
@click.option("--serve-host", help="Interface of the HTTP proxies.  [default: 127.0.0.1]")
@click.option("--serve-port", type=int, help="Port of the HTTP proxies.  [default: 8000 or the next free one]")
@click.option("--serve-proxies", type=int, help="Number of HTTP proxies.  [default: 1]")
@click.option("--serve-http", multiple=True, metavar="NAME=VALUE", help="Any other option of serve.start.")
@click.option("--no-serve-http", is_flag=True, help="Start no proxies before an application needs them.")
@click.option(
    "--serve-state",
    metavar="PATH",
    help="File that applications are saved in, and come back from; none: nowhere.  [default: serve.state-file, or one "
    "for crashes only]",
)
@click.option(
    "--serve-config",
    metavar="PATH",
    type=click.Path(dir_okay=False),
    help="Document (YAML) whose applications are deployed once the scheduler runs.",
)
@click.option("--service-file", metavar="PATH", help="File for users to read where HTTP is served: JSON with its url.")
def dask_setup(  # noqa: PLR0917 - click passes them by name
    scheduler: Scheduler,
    serve_host: str | None,
    serve_port: int | None,
    serve_proxies: int | None,
    serve_http: tuple[str, ...],
    no_serve_http: bool,
    serve_state: str | None,
    serve_config: str | None,
    service_file: str | None,
) -> None:
    """Options of dask_serve's scheduler preload."""
    options = {"host": serve_host, "port": serve_port, "num_proxies": serve_proxies}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    given.update(parse_options(serve_http))
    document = None if serve_config is None else _read(serve_config, given, no_serve_http)
    http = None if no_serve_http else build_options(HTTPOptions, given, "the preload of dask_serve")
    if http is not None:
        http = overlaid(http, given)
    if service_file is not None:
        check(service_file)
    # Not register_scheduler_plugin: the scheduler starts all its plugins after the preloads.
    state = default_file(scheduler, serve_state)
    scheduler.add_plugin(Controller(http, list(given), state, document, service_file), idempotent=True)


def _read(path: str, given: dict[str, Any], no_http: bool) -> BootDocument:
    """Return a document, and put its options of proxies among those that are ``given``, which go first.

    A scheduler comes up whatever is wrong with it: what its state file holds has to run again.
    """
    from .document.validation import parse

    file = Path(path).absolute()
    try:
        text, time = file.read_text(encoding="utf-8"), file.stat().st_mtime
        checked = parse(text, path)
    except (OSError, UnicodeDecodeError) as error:
        return BootDocument(path=path, trouble=f"it cannot be read: {error}")
    except ConfigError as error:
        return BootDocument(path=path, trouble=str(error))
    if not no_http:
        given.update((name, value) for name, value in checked.http.items() if name not in given)
    return BootDocument(path=path, text=text, time=time, http=no_http)
