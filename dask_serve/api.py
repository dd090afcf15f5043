"""What a session does: run, look at and end applications.

Every function takes ``client=None``, which means Dask's current client. With an asynchronous client every function
returns an awaitable, with any other it blocks.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NoReturn

from dask.utils import parse_timedelta
from distributed import Client
from msgspec import UNSET, UnsetType

from .clients import close_made, ensure_client, existing_client, is_made_here
from .config import HTTPOptions
from .controller.deploy import deploy, ensure_controller, signature, start_proxies
from .controller.progress import Progress
from .controller.status import ServeStatus, decode_status
from .deployment import Application, Deployment
from .exceptions import ConfigError, NotRunningError, ServeError
from .options import build_options
from .session.peers import ask, current_client, find_handle, make_handle, probe, refuse_inside
from .shipping.graph import build

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator
    from types import TracebackType

    from .handle import DeploymentHandle

__all__ = [
    "delete",
    "get_app_handle",
    "get_deployment_handle",
    "run",
    "shutdown",
    "start",
    "status",
    "url",
]

_ELSEWHERE = {
    "blocking": "a script that should stay up ends with `signal.pause()`, or is started by `dask serve run module:app`",
    "_local_testing_mode": "serve.testing.run(app) runs it in this process, for tests",
    "logging_config": "configure the loggers `dask_serve` and `distributed`, as everywhere in Dask",
    "proxy_location": "proxies run beside the scheduler; num_proxies= says how many",
    "location": "proxies run beside the scheduler; num_proxies= says how many",
    "ssl_certfile": "it is called tls_certificate here",
    "ssl_keyfile": "it is called tls_key here",
    "ssl_keyfile_password": "write it to a file, and name that with tls_key_password_file",
    "ssl_ca_certs": "it is called tls_client_ca here",
    "middlewares": "give import paths with arguments to middleware=",
    "detached": "leave it out: applications outlive the session that deployed them on a cluster of yours",
}


# -- the public functions ----------------------------------------------------------------------------------------------


def run(
    target: Application,
    name: str = "default",
    route_prefix: str | None = "/",
    *,
    wait: bool = True,
    timeout: float | str | None = None,
    client: Client | None = None,
    host: str | UnsetType = UNSET,
    port: int | UnsetType | None = UNSET,
    **unknown: Any,
) -> Any:
    """Deploy an application, or update the one of that name, and return its handle.

    Without a Dask client in scope, and without ``scheduler-address`` in Dask's configuration, this starts a
    cluster on this machine and a default client, which end with the session or with `shutdown`.

    Parameters
    ----------
    target : Application
        What `Deployment.bind` returned.
    name : str, default "default"
        Name of the application. Applications of other names are left alone.
    route_prefix : str or None, default "/"
        Where HTTP finds it. None: not over HTTP.
    wait : bool, default True
        Return once all replicas are ready. In a terminal and in a notebook a bar on stderr shows them by state.
    timeout : float or str, optional
        How long to wait, in seconds or as Dask parses it (``"2 min"``). By default there is no limit, and messages
        say what is waited for. The application stays deployed when the time is over.
    client : distributed.Client, optional
        The cluster to use.
    host, port : str, int, optional
        Where proxies listen; see `start`.

    Returns
    -------
    DeploymentHandle
        Of the ingress deployment. As a context manager it deletes the application at the end, unless another session
        deployed it again, and ends the embedded cluster if this call made it. With an asynchronous client: an
        awaitable, and an asynchronous context manager, for the handle.

    Raises
    ------
    ConfigError
        ``target`` was not bound or cannot be sent to workers, or a route or port is taken.
    DeploymentFailedError
        Replicas could not be started; the message holds the original traceback.
    ConflictError
        Another session replaced or deleted the application meanwhile: who comes last wins.
    StartTimeoutError
        Not ready after ``timeout``; the message says what is missing.
    """
    timeout = unknown.pop("timeout_s", timeout)
    _refuse(unknown, "serve.run")
    refuse_inside("serve.run")
    options = build_options(HTTPOptions, {"host": host, "port": port}, "serve.run")
    explicit = [option for option, value in (("host", host), ("port", port)) if value is not UNSET]
    built = build(_bound(target), name, route_prefix)
    seconds = None if timeout is None else parse_timedelta(timeout, "s")
    say = Progress()
    used, made = ensure_client(client, say)

    async def begin(on_exit: Callable[[], None] | None) -> DeploymentHandle:
        await deploy(used, built, (options, explicit), wait=wait, timeout=seconds, say=say)
        extra = {} if on_exit is None else {"on_exit": on_exit}
        return make_handle(name, built.spec.ingress, address=used.scheduler.addr, client=used, **extra)

    if used.asynchronous:
        return _Running(lambda: begin(None), lambda: _delete_own(name, used))
    return used.sync(begin, shutdown if made else lambda: _delete_own(name, used))


def start(
    *,
    host: str | UnsetType = UNSET,
    port: int | UnsetType | None = UNSET,
    num_proxies: int | UnsetType = UNSET,
    client: Client | None = None,
    **options: Any,
) -> Any:
    """Start the controller and the proxies; `run` does it as well.

    On a service that runs it changes the options that are named, one proxy after the other, without a lost request;
    where they cannot be used it raises and all stays as it was.

    Parameters
    ----------
    host, port : str, int, optional
        Where proxies listen. A busy default port gives the next free one with a warning; a busy explicit port is an
        error.
    num_proxies : int, optional
        How many proxy processes there are.
    client : distributed.Client, optional
        The cluster to use.
    **options
        The other options of `HTTPOptions`: limits, TLS, tokens, middleware, time-outs.

    Returns
    -------
    str
        Where HTTP is served, e.g. ``http://127.0.0.1:8000``; ``unix:PATH`` for a Unix socket.

    Raises
    ------
    ConfigError
        An option is unknown or out of range, a port is taken, or a file or a middleware cannot be used by the proxies.
    """
    given = {"host": host, "port": port, "num_proxies": num_proxies}
    given = {option: value for option, value in given.items() if value is not UNSET}
    # Ray's spelling.
    given.update(options.pop("http_options", None) or {})
    given.update(options)
    _refuse(given, "serve.start")
    refuse_inside("serve.start")
    http = build_options(HTTPOptions, given, "serve.start")
    used, _ = ensure_client(client, Progress())

    async def begin() -> str:
        await ensure_controller(used)
        return await start_proxies(used, http, list(given))

    return used.sync(begin)


def status(client: Client | None = None) -> Any:
    """Return what runs on the cluster and how it fares.

    Returns
    -------
    ServeStatus
        Without applications, and with a message, where dask_serve does not run.
    """
    used = existing_client(client)

    async def get() -> ServeStatus:
        answer = await probe(used.scheduler, "serve_status")
        if answer is None:
            return ServeStatus(message="dask_serve does not run on this cluster")
        return decode_status(answer["status"])

    return used.sync(get)


def url(client: Client | None = None) -> Any:
    """Return where HTTP is served, e.g. ``http://127.0.0.1:8000``.

    Raises
    ------
    NotRunningError
        HTTP is not served on this cluster.
    """
    used = existing_client(client)

    async def get() -> str:
        found = decode_status((await ask(used.scheduler, "serve_status"))["status"])
        if not found.url:
            raise NotRunningError(f"HTTP is not served: call serve.start(). {found.message}".rstrip())
        return found.url

    return used.sync(get)


def delete(name: str, client: Client | None = None) -> Any:
    """Delete an application, once its replicas have finished what they run.

    Raises
    ------
    ApplicationNotFoundError
        There is none of that name; the message lists those there are.
    """
    refuse_inside("serve.delete")
    used = existing_client(client)

    async def end() -> None:
        await ask(used.scheduler, "serve_delete", app=name, **signature(used))

    return used.sync(end)


def _delete_own(name: str, client: Client) -> Any:
    """Delete an application at the end of a ``with`` block, unless it is another session's by now."""

    async def end() -> None:
        await ask(client.scheduler, "serve_delete", app=name, own=True, **signature(client))

    return client.sync(end)


def shutdown(client: Client | None = None) -> Any:
    """End all applications and the proxies on the cluster; nothing happens where none run.

    The embedded cluster, and the client, that `run` or `start` made end with it. Other clusters go on.
    """
    refuse_inside("serve.shutdown")
    used = current_client(client)
    if used is None:
        return close_made()

    async def end() -> None:
        await probe(used.scheduler, "serve_shutdown", **signature(used))

    if not is_made_here(used):
        return used.sync(end)
    try:
        # It may be gone already; what is left of it must go all the same.
        with contextlib.suppress(OSError):
            used.sync(end)
    finally:
        close_made()
    return None


def get_app_handle(name: str = "default", client: Client | None = None) -> Any:
    """Return the handle of an application's ingress deployment.

    Raises
    ------
    ApplicationNotFoundError
        There is none of that name; the message lists those there are.
    """
    return find_handle(None, name, client=client)


def get_deployment_handle(deployment_name: str, app_name: str | None = None, client: Client | None = None) -> Any:
    """Return the handle of a deployment.

    Parameters
    ----------
    deployment_name : str
        Its name.
    app_name : str, optional
        Needed where several applications have a deployment of that name. In a replica, its own comes first.

    Raises
    ------
    ApplicationNotFoundError
        There is none of that name, or several; the message lists the candidates.
    """
    return find_handle(deployment_name, app_name, client=client)


# -- checks ------------------------------------------------------------------------------------------------------------


def _bound(target: Any) -> Application:
    if isinstance(target, Application):
        return target
    if isinstance(target, Deployment):
        raise ConfigError(
            f"serve.run takes a bound deployment: write serve.run({target.name}.bind(...)), with the arguments of the "
            "constructor, if any, in .bind()"
        )
    if isinstance(target, type) or callable(target):
        name = getattr(target, "__name__", "Model")
        raise ConfigError(
            f"serve.run takes a bound deployment, and {name} is not declared as one: decorate it with "
            f"@serve.deployment and write serve.run({name}.bind(...))"
        )
    raise ConfigError(f"serve.run takes what `.bind()` of a deployment returns, not {target!r}")


def _refuse(unknown: dict[str, Any], where: str) -> None:
    for name in unknown:
        if name in _ELSEWHERE:
            raise ConfigError(f"{where} has no option {name!r}: {_ELSEWHERE[name]}")
    if unknown and where == "serve.run":
        raise ConfigError(
            f"serve.run has no option {next(iter(unknown))!r}; options of a deployment go to "
            "@serve.deployment or .options(), those of HTTP to serve.start()"
        )


# -- the awaitable of `run` --------------------------------------------------------------------------------------------


class _Running:
    """What `run` returns with an asynchronous client: awaited, or entered with ``async with``, it is the handle."""

    def __init__(self, begin: Callable[[], Awaitable[DeploymentHandle]], end: Callable[[], Awaitable[None]]) -> None:
        self._begin = begin
        self._end = end

    def __await__(self) -> Generator[Any, None, DeploymentHandle]:
        return self._begin().__await__()

    def __enter__(self) -> NoReturn:
        raise ServeError("the Dask client is asynchronous: write `async with serve.run(...) as handle:`")

    def __exit__(self, *exc: object) -> None:
        """Never called."""

    async def __aenter__(self) -> DeploymentHandle:
        return await self._begin()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end()
