"""``dask serve``: run, proxy, status, delete, rollback, shutdown.

Every ``dask`` command loads this module: it imports click, and all else when a command runs.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    from distributed import Client

    from .embedded import EmbeddedCluster

__all__ = ["serve"]

#: Exit code of a process that a signal ended before it could drain.
INTERRUPTED = 130
#: Seconds within which a scheduler must answer a proxy's first question.
CONNECT_WITHIN = 10.0


@click.group()
def serve() -> None:
    """Serve Python models on a Dask cluster."""


_scheduler_option = click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Address of a running scheduler, e.g. tcp://127.0.0.1:8786. Dask's configuration (scheduler-address) is "
    "used when there is none.",
)


_http_option = click.option(
    "--http",
    "http",
    multiple=True,
    metavar="NAME=VALUE",
    help="Any other option of serve.start, e.g. --http body_limit=1000000; the value is JSON or text.",
)


@serve.command()
@click.argument("target", metavar="MODULE:APP")
@_scheduler_option
@click.option("--name", default="default", show_default=True, help="Name of the application.")
@click.option("--route-prefix", default="/", show_default=True, help="Where HTTP finds the application.")
@click.option("--host", help="Interface the proxies listen on (127.0.0.1 unless set).")
@click.option("--port", type=click.IntRange(0, 65535), help="Port the proxies listen on (8000 unless set; 0: any).")
@click.option("--num-proxies", type=click.IntRange(1), help="Number of proxy processes (1 unless set).")
@_http_option
@click.option("--workers", type=click.IntRange(1), help="Workers of the embedded cluster to begin with.")
def run(  # noqa: PLR0917 - click passes them by name
    target: str,
    scheduler: str | None,
    name: str,
    route_prefix: str,
    host: str | None,
    port: int | None,
    num_proxies: int | None,
    http: tuple[str, ...],
    workers: int | None,
) -> None:
    """Deploy an application and serve it until Ctrl-C.

    MODULE:APP is an application (what .bind() returns) or a function that returns one; modules of the working
    directory are found. Without a scheduler a cluster is started on this machine, and ended with this command.
    """
    address = _address(scheduler)
    if workers is not None and address is not None:
        raise click.UsageError(f"--workers is for the embedded cluster, and this runs on the cluster at {address}")
    session = _Session(address, workers)
    with session.signals(), _errors():
        try:
            options = _http_options(http, host=host, port=port, num_proxies=num_proxies)
            application = _load(target)
            session.deploy(application, name, route_prefix, options)
            session.wait()
        except _Stop:
            pass
        finally:
            session.close()


@serve.command()
@_scheduler_option
@click.option("--host", help="Interface the proxies listen on (127.0.0.1 unless set).")
@click.option("--port", type=click.IntRange(0, 65535), help="Port the proxies listen on (8000 unless set; 0: any).")
@click.option("--num-proxies", type=click.IntRange(1), help="Number of proxy processes (1 unless set).")
@_http_option
@click.option("--service-file", metavar="PATH", help="File for users to read where HTTP is served: JSON with its url.")
def proxy(  # noqa: PLR0917 - click passes them by name
    scheduler: str | None,
    host: str | None,
    port: int | None,
    num_proxies: int | None,
    http: tuple[str, ...],
    service_file: str | None,
) -> None:
    """Serve HTTP on this node, until SIGTERM or Ctrl-C, for the applications of a cluster elsewhere.

    Options are those of serve.start on the cluster, but for the addresses to listen on; what is given here goes first.
    Files (certificates, tokens) are this node's. While the scheduler is away the proxies go on with what they know.
    """
    import asyncio

    address = _address(scheduler)
    if address is None:
        raise click.UsageError("which cluster? Give --scheduler ADDRESS, or set DASK_SCHEDULER_ADDRESS")
    with _errors():
        options = _http_options(http, host=host, port=port, num_proxies=num_proxies)
        asyncio.run(_serve_here(address, options, service_file))


async def _serve_here(address: str, options: dict[str, Any], service_file: str | None) -> None:
    import asyncio

    from .controller.remote import RemoteProxies

    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, ended.set)
    proxies = RemoteProxies(address, options, service_file=service_file)
    try:
        click.echo(f"serving at {await proxies.start(timeout=CONNECT_WITHIN)}")
        following = loop.create_task(proxies.follow(click.echo))
        ending = loop.create_task(ended.wait())
        await asyncio.wait({following, ending}, return_when=asyncio.FIRST_COMPLETED)
        if following.done():
            following.result()
        following.cancel()
        click.echo("draining")
    finally:
        await proxies.stop()


def _http_options(texts: tuple[str, ...], **given: Any) -> dict[str, Any]:
    from .config import parse_options

    return {**parse_options(texts), **{name: value for name, value in given.items() if value is not None}}


@serve.command()
@_scheduler_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(scheduler: str | None, as_json: bool) -> None:
    """Show the applications of a cluster, their deployments and replicas."""
    import msgspec

    from . import api

    with _errors(), _connected(scheduler) as client:
        found = api.status(client=client)
        click.echo(json.dumps(msgspec.to_builtins(found), indent=2) if as_json else str(found))


@serve.command()
@click.argument("name")
@_scheduler_option
def delete(name: str, scheduler: str | None) -> None:
    """Delete the application NAME, once its replicas have drained."""
    from . import api

    with _errors(), _connected(scheduler) as client:
        api.delete(name, client=client)
        click.echo(f"deleted {name}")


@serve.command()
@click.argument("name")
@click.option("--version", type=click.IntRange(1), help="To this version (the last other one that ran unless set).")
@_scheduler_option
def rollback(name: str, version: int | None, scheduler: str | None) -> None:
    """Make the application NAME again what it was."""
    from . import api

    with _errors(), _connected(scheduler) as client:
        api.rollback(name, version, client=client)
        click.echo(str(api.history(name, client=client)[-1]))


@serve.command()
@click.argument("worker")
@click.option("--stay", is_flag=True, help="Take it back: the worker may hold replicas again.")
@_scheduler_option
def drain(worker: str, stay: bool, scheduler: str | None) -> None:
    """Bring WORKER (its address or name) to hold no replicas.

    Replicas start elsewhere first. The worker goes on as a worker of Dask, and gets no new replicas until --stay.
    """
    from .session.peers import ask

    with _errors(), _connected(scheduler) as client:
        answer = client.sync(ask, client.scheduler, "serve_drain", worker=worker, stay=stay)
    click.echo(f"{answer['worker']} {'may hold replicas again' if stay else 'holds no replicas'}")


@serve.command()
@_scheduler_option
def shutdown(scheduler: str | None) -> None:
    """Delete all applications and end the proxies of a cluster; its scheduler and workers go on."""
    from . import api

    with _errors(), _connected(scheduler) as client:
        api.shutdown(client=client)
        click.echo("dask_serve is shut down")


class _Stop(BaseException):
    """The user asked for the end. Not an Exception: no handler of user code is meant to catch it."""


class _Session:
    """What ``dask serve run`` has started, and has to end."""

    def __init__(self, address: str | None, workers: int | None) -> None:
        self.address = address
        self.workers = workers
        self.cluster: EmbeddedCluster | None = None
        self.client: Client | None = None
        self._deployed: str | None = None
        self._signals = 0
        self._closing = False

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Turn the first SIGINT or SIGTERM into `_Stop`, and the second into the end of everything."""
        before = {signum: signal.signal(signum, self._on_signal) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals > 1:
            self._abort()
        # During the close that an error or the cluster's end began, the first signal need not begin another.
        if not self._closing:
            raise _Stop

    def _abort(self) -> NoReturn:
        if self.cluster is not None:
            self.cluster.kill()
        os._exit(INTERRUPTED)

    def deploy(self, application: Any, name: str, route_prefix: str, options: dict[str, Any]) -> None:
        """Deploy ``application`` and print where it answers."""
        from . import api

        client = self._connect()
        if self.cluster is None:
            click.echo(f"scheduler at {client.scheduler.address}, dashboard at {client.dashboard_link}")
        api.start(**options, client=client)
        self._deployed = name
        click.echo(f"deploying {name}")
        api.run(application, name=name, route_prefix=route_prefix, client=client)
        url = api.url(client=client)
        click.echo(f"{name} is ready at {url.rstrip('/')}{route_prefix}")
        click.echo("Ctrl-C ends it")

    def _connect(self) -> Client:
        from distributed import Client

        if self.address is None:
            from .embedded import EmbeddedCluster

            self.cluster = EmbeddedCluster.start(n_workers=self.workers, progress=click.echo)
            self.client = Client(self.cluster.scheduler_address)
        else:
            self.client = _client(self.address)
        return self.client

    def wait(self) -> NoReturn:
        """Wait for a signal, or for the cluster's end."""
        pause = threading.Event()
        while True:
            pause.wait(0.5)
            if self.cluster is not None and not self.cluster.alive:
                raise click.ClickException("the embedded cluster ended by itself")
            if self.client is not None and self.client.status == "closed":
                raise click.ClickException(f"the connection to the scheduler at {self.address} was lost")

    def close(self) -> None:
        """Drain, and end what this command started."""
        self._closing = True
        if self.client is None and self.cluster is None:
            return
        with contextlib.suppress(OSError):  # nobody may be reading any more
            click.echo("draining (Ctrl-C again ends at once)" if self._signals else "closing")
        from . import api

        if self.cluster is None and self._deployed is not None and self.client is not None:
            with contextlib.suppress(Exception):
                api.delete(self._deployed, client=self.client)
        # An embedded cluster drains by itself, and closes this client between the service and the scheduler.
        if self.cluster is not None:
            self.cluster.close()
        elif self.client is not None:
            self.client.close()


def _address(given: str | None) -> str | None:
    import dask

    return given or dask.config.get("scheduler-address", None)


def _client(address: str) -> Client:
    from distributed import Client

    try:
        return Client(address, timeout="10s")
    except (OSError, ValueError) as error:
        raise click.ClickException(f"no scheduler answers at {address} ({error})") from None


@contextlib.contextmanager
def _connected(given: str | None) -> Iterator[Client]:
    address = _address(given)
    if address is None:
        raise click.UsageError("which cluster? Give --scheduler ADDRESS, or set DASK_SCHEDULER_ADDRESS")
    with _client(address) as client:
        yield client


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Print the errors of this package as one message, without a traceback of its own code."""
    from .exceptions import ServeError

    try:
        yield
    except ServeError as error:
        raise click.ClickException(str(error)) from None


def _load(target: str) -> Any:
    """Return the application that ``module:attribute`` names."""
    import inspect

    from .deployment import Application

    module_name, colon, path = target.partition(":")
    if not (module_name and colon and path):
        raise click.UsageError(f"{target!r} does not name an application; write MODULE:APP, e.g. main:app")
    found = _attribute(_import(module_name), module_name, path)
    if inspect.isfunction(found):
        built = found()
        if not isinstance(built, Application):
            raise click.ClickException(f"{target}() returned {_name(built)}, not an application{_hint(built)}")
        return built
    if not isinstance(found, Application):
        raise click.ClickException(f"{target} is {_name(found)}, not an application{_hint(found)}")
    return found


def _import(name: str) -> Any:
    cwd = str(Path.cwd())
    if sys.path[:1] != [cwd]:
        sys.path.insert(0, cwd)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A module that is there and imports one that is not shows its own traceback.
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise
        raise click.ClickException(f"there is no module {error.name!r} (looked in {cwd} and on sys.path)") from None


def _attribute(module: Any, module_name: str, path: str) -> Any:
    found = module
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            from .deployment import Application

            there = sorted(key for key, value in vars(module).items() if isinstance(value, Application))
            hint = f"; its applications: {', '.join(there)}" if there else ""
            raise click.ClickException(f"module {module_name!r} has no attribute {path!r}{hint}") from None
    return found


def _name(found: Any) -> str:
    kind = type(found).__name__
    article = "an" if kind[:1].lower() in "aeiou" else "a"
    named = getattr(found, "__name__", None) or getattr(found, "name", None)
    return f"{article} {kind} ({named})" if isinstance(named, str) else f"{article} {kind}"


def _hint(found: Any) -> str:
    from .deployment import Deployment

    if isinstance(found, Deployment):
        return "; write .bind() behind it"
    if isinstance(found, type):
        return "; decorate the class with @serve.deployment and bind it: app = Model.bind()"
    return "; an application is what .bind() of a deployment returns"
