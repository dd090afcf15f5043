"""The application under test, from its start to its end."""

from __future__ import annotations

import asyncio
import contextlib
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any

from ..config import HTTPOptions
from ..deployment import Application, check_name
from ..exceptions import ApplicationNotFoundError, ConfigError, DeploymentFailedError, ServeError
from ..handle import DeploymentHandle
from ..options import build_options
from ..policy.desired import deployment_id
from ..replica.listening import Place
from ..routing.session import Session
from ..routing.table import RouteEntry
from ..session.peers import stand_ins
from ..shipping.graph import build, check_route
from .peers import Caller, Cluster, Host
from .replicas import Graph, InProcessDoor, Unit, kept_routes
from .web import Gateway

__all__ = ["Service", "run"]

#: Where test clients say that they are: on this machine.
CLIENT = ("127.0.0.1", 50000)
BASE_URL = "http://testserver"


def run(
    target: Application,
    name: str = "default",
    route_prefix: str | None = "/",
    *,
    replicas: int | dict[str, int] = 1,
    http: dict[str, Any] | None = None,
    shippable: bool = False,
) -> _Run:
    """Run an application in this process, for a test.

    Parameters
    ----------
    target : Application
        What `Deployment.bind` returned. The class and the bound arguments are used as they are: a mock among them is
        the test's own object, and what the test patches in a module is patched in the replica.
    name : str, default "default"
        Name of the application.
    route_prefix : str or None, default "/"
        Where HTTP finds it. None: not over HTTP.
    replicas : int or dict, default 1
        How many replicas each deployment has, or those named in a dict by their deployments. Neither ``num_replicas``
        nor ``autoscaling_config`` counts here.
    http : dict, optional
        Options of `serve.start`, such as ``middleware``, ``tokens_file`` or ``body_limit``.
    shippable : bool, default False
        Check first that the application can be sent to workers, as `serve.run` does.

    Returns
    -------
    context manager
        For ``with`` or ``async with``; it gives a `Service`. At the end the replicas drain and shut down as on a
        cluster; after an exception what runs is ended at once.

    Raises
    ------
    ConfigError
        As of `serve.run`.
    DeploymentFailedError
        (On entering.) A replica could not start; its cause is the exception itself.

    Examples
    --------
    >>> import dask_serve as serve
    >>> @serve.deployment
    ... class Model:
    ...     def predict(self, x):
    ...         return 2 * x
    >>> with serve.testing.run(Model.bind()) as service:
    ...     service.handle.predict.remote(21).result()
    42
    """
    if not isinstance(target, Application):
        raise ConfigError(
            f"serve.testing.run takes what `.bind()` of a deployment returns, not {target!r}: write "
            f"serve.testing.run({getattr(target, 'name', 'Model')}.bind(...))"
        )
    options = build_options(HTTPOptions, http or {}, "http of serve.testing.run")
    if shippable:
        build(target, name, route_prefix)
    graph = Graph(check_name(name, "an application"))
    ingress = graph.add(target)
    numbers = dict.fromkeys(graph.found, replicas) if isinstance(replicas, int) else {**replicas}
    for other, number in numbers.items():
        if other not in graph.found:
            raise ConfigError(f"replicas names {other!r}; the deployments are {', '.join(sorted(graph.found))}")
        if not isinstance(number, int) or number < 1:
            raise ConfigError(f"replicas of {other!r} is {number!r}: give a number from 1 on")
    route = check_route(route_prefix)
    return _Run(
        lambda asynchronous: Service(
            graph, ingress=ingress, route=route, numbers=numbers, options=options, asynchronous=asynchronous
        )
    )


class _Run:
    """Starts and ends one `Service`."""

    def __init__(self, make: Callable[[bool], Service]) -> None:
        self._make = make
        self._service: Service | None = None

    def __enter__(self) -> Service:
        self._service = self._make(False)
        self._service._start()
        return self._service

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        service, self._service = self._service, None
        if service is not None:
            service._close(at_once=kind is not None)

    async def __aenter__(self) -> Service:
        self._service = self._make(True)
        await asyncio.get_running_loop().run_in_executor(None, self._service._start)
        return self._service

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        service, self._service = self._service, None
        if service is not None:
            await service._aclose()
            await asyncio.get_running_loop().run_in_executor(None, service._close, kind is not None)


class Service:
    """An application that runs in this process.

    Attributes
    ----------
    handle : DeploymentHandle
        Of the ingress deployment, as `serve.run` returns it. Within ``async with`` refs are awaited, and ``result()``
        returns an awaitable, as with an asynchronous client.
    app : ASGI application
        What a proxy would serve: for test clients of your own, on any event loop.
    """

    def __init__(
        self,
        graph: Graph,
        *,
        ingress: str,
        route: str | None,
        numbers: dict[str, int],
        options: HTTPOptions,
        asynchronous: bool,
    ) -> None:
        self._graph = graph
        self._ingress = ingress
        self._route = route
        self._numbers = numbers
        self._options = options
        self._asynchronous = asynchronous
        self._units: dict[str, list[Unit]] = {}
        self._clients = contextlib.ExitStack()
        self._client: Any = None
        self._async_client: Any = None
        self._app: Gateway | None = None
        self._closed = False

    def __repr__(self) -> str:
        numbers = ", ".join(f"{name}: {len(units)}" for name, units in self._units.items())
        return f"<Service {self._graph.app!r} under test, {'closed' if self._closed else numbers}>"

    # ------------------------------------------------------------------ start

    def _start(self) -> None:
        app = self._graph.app
        ingress = deployment_id(app, self._ingress)
        routes = [] if self._route is None else [RouteEntry(self._route, ingress)]
        self._restore = kept_routes(self._graph)
        self._cluster = Cluster(routes, {app: ingress}, self._graph.entries())
        self._caller = Caller(self._cluster, self._asynchronous)
        self._host = Host(self._cluster)
        self._door = InProcessDoor(self._cluster.secret, Place())
        self._door.start()
        self.handle = self.get_handle(self._ingress)
        stand_ins.append(self._caller)
        try:
            self._start_replicas()
        except BaseException:
            self._close(at_once=True)
            raise

    def _start_replicas(self) -> None:
        started: list[tuple[Unit, Future[str]]] = []
        for name in self._graph.found:
            for number in range(self._numbers.get(name, 1)):
                unit = self._graph.unit(name, number, self._host, door=self._door, handle=self._inner_handle)
                self._units.setdefault(name, []).append(unit)
                ended = self._cluster.ended[unit.id] = Future()
                started.append((unit, ended))
        for unit, _ in started:
            unit.start()
        for unit, ended in started:
            text = ended.result()
            if text:
                raise DeploymentFailedError(
                    f"application {self._graph.app!r} could not be started: {unit.spec['deployment']}: {text}"
                ) from unit.error
        session = Session.of(self._caller)
        total = len(started)

        def complete(table: Any) -> bool:
            return sum(len(entry.replicas) for entry in table.deployments.values()) == total

        asyncio.run_coroutine_threadsafe(session.until(complete, 5.0), self._cluster.engine.loop).result()

    def _inner_handle(self, deployment: str) -> DeploymentHandle:
        """Return the handle that a constructor gets."""
        return DeploymentHandle(self._graph.app, deployment, self._cluster.address)

    # ------------------------------------------------------------------ what tests use

    def get_handle(self, deployment: str) -> DeploymentHandle:
        """Return the handle of a deployment.

        Raises
        ------
        ApplicationNotFoundError
            The application has none of that name.
        """
        self._check(deployment)
        client: Any = self._caller
        return DeploymentHandle(self._graph.app, deployment, self._cluster.address, client=client)

    def replica(self, deployment: str | None = None, number: int = 0) -> Any:
        """Return the object that answers: the instance of the user's class in a replica, to look at and to change.

        Its methods can be called directly too; they run in the test's own thread then, without a request.

        Parameters
        ----------
        deployment : str, optional
            Name of the deployment; the ingress by default.
        number : int, default 0
            Which of its replicas.
        """
        name = self._ingress if deployment is None else deployment
        self._check(name)
        units = self._units[name]
        if not -len(units) <= number < len(units):
            raise ServeError(f"deployment {name!r} has {len(units)} replicas under test, and none of number {number}")
        return units[number].user.instance

    def replicas(self, deployment: str | None = None) -> list[Any]:
        """Return the objects of all replicas of a deployment, of the ingress by default."""
        name = self._ingress if deployment is None else deployment
        self._check(name)
        return [unit.user.instance for unit in self._units[name]]

    @property
    def app(self) -> Gateway:
        """What a proxy would serve."""
        if self._closed:
            raise ServeError("the application under test has ended: use it within the `with` block")
        if self._app is None:
            loop, fabric = self._cluster.engine.loop, Session.of(self._caller).engine()[1]
            self._app = Gateway(loop, fabric, self._options)
        return self._app

    @property
    def client(self) -> Any:
        """Starlette's `TestClient`: requests, streams and WebSockets, without a socket. It blocks."""
        if self._client is None:
            app = self.app
            try:
                with warnings.catch_warnings():
                    # Which library its client comes from is Starlette's business.
                    warnings.simplefilter("ignore")
                    from starlette.testclient import TestClient
            except (ImportError, RuntimeError) as error:
                raise ServeError(f"service.client is Starlette's TestClient, which needs httpx: {error}") from None
            test_client = TestClient(app, base_url=BASE_URL, client=CLIENT)
            self._client = self._clients.enter_context(test_client)
        return self._client

    @property
    def async_client(self) -> Any:
        """An ``httpx.AsyncClient``, for coroutines. It collects streamed answers, and has no WebSockets."""
        if self._async_client is None:
            app = self.app
            try:
                import httpx
            except ImportError:
                raise ServeError("service.async_client needs httpx: pip install httpx") from None
            transport = httpx.ASGITransport(app=app, client=CLIENT)
            self._async_client = httpx.AsyncClient(transport=transport, base_url=BASE_URL)
        return self._async_client

    def _check(self, deployment: str) -> None:
        if deployment not in self._graph.found:
            known = ", ".join(sorted(self._graph.found))
            raise ApplicationNotFoundError(f"there is no deployment {deployment!r} under test; there are: {known}")

    # ------------------------------------------------------------------ the end

    async def _aclose(self) -> None:
        if self._async_client is not None:
            await self._async_client.aclose()

    def _close(self, at_once: bool = False) -> None:
        if self._closed:
            return
        self._closed = True
        self._clients.close()
        units = [unit for units in self._units.values() for unit in units]
        if not at_once:

            async def drain() -> None:
                await asyncio.gather(*(unit.drain(unit.options.graceful_shutdown_timeout_s) for unit in units))

            asyncio.run_coroutine_threadsafe(drain(), self._cluster.engine.loop).result()
        for unit in units:
            unit.end()
        deadline = time.monotonic() + 1.0
        for unit in units:
            if unit.user.thread.ident is not None:
                unit.user.join(max(0.0, deadline - time.monotonic()))
        stand_ins.remove(self._caller)
        self._door.close()
        self._cluster.close()
        self._restore()
