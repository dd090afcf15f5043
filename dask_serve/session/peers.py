"""Whom this process talks to: the current Dask client, or the worker that runs this code; and asking the controller."""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING, Any, NoReturn

from distributed import Client, Worker, get_worker
from distributed.client import _get_global_client
from distributed.utils import sync as run_on_loop

from .. import exceptions
from ..context import replica_context
from ..exceptions import ApplicationNotFoundError, ConfigError, NotRunningError, ServeError
from ..policy.desired import deployment_id
from ..routing.session import Session
from ..routing.table import Table, decode_table

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ..handle import DeploymentHandle

__all__ = [
    "ask",
    "current_client",
    "current_worker",
    "find_handle",
    "is_left_behind",
    "make_handle",
    "not_running",
    "probe",
    "refuse_inside",
    "stand_ins",
    "was_forked",
]


def current_client(client: Client | None = None) -> Client | None:
    """Return ``client``, or the one that Dask would use here; None when there is none."""
    if client is not None and not isinstance(client, Client):
        raise ConfigError(f"client={client!r} is no Dask client: give a distributed.Client, or leave it out")
    client = client if client is not None else _get_global_client()
    return None if client is None or is_left_behind(client) else client


#: Applications that run in this process without a cluster (`dask_serve.testing`), the last one last.
stand_ins: list[Any] = []


def is_left_behind(owner: Client | Worker) -> bool:
    """The client or worker belongs to the process that this one was forked from: here it has no thread that runs it."""
    return owner in _left_behind


def was_forked() -> bool:
    """Tell whether this process was forked from one that had a client or a worker."""
    return bool(_left_behind)


_left_behind: weakref.WeakSet[Any] = weakref.WeakSet()


def _after_fork() -> None:
    _left_behind.update(list(Client._instances))
    _left_behind.update(list(Worker._instances))


os.register_at_fork(after_in_child=_after_fork)


def current_worker() -> Worker | None:
    """Return the Dask worker that runs this code, in a task or in a replica; None elsewhere."""
    try:
        worker = get_worker()
        return None if is_left_behind(worker) else worker
    except ValueError:
        pass
    context = replica_context.get(None)
    if context is None:
        return None
    return next((worker for worker in Worker._instances if worker.address == context.worker), None)


def refuse_inside(where: str) -> None:
    """Raise where a function of sessions is called in a replica or a task."""
    if current_worker() is not None:
        raise ServeError(
            f"{where} does not work inside a replica or a Dask task: call it in a session. Here, "
            "serve.get_app_handle(name) and serve.get_deployment_handle(name) reach what runs already; deployments "
            "that belong together are bound into each other with .bind()"
        )


async def probe(scheduler: Any, op: str, **arguments: Any) -> dict[str, Any] | None:
    """Ask the controller; None when there is none.

    Parameters
    ----------
    scheduler : rpc
        ``client.scheduler`` or ``worker.scheduler``.
    op : str
        One of the ``serve_...`` operations.
    """
    answer = await getattr(scheduler, op)(**arguments)
    if answer is not None and "error" in answer:
        name, message = answer["error"]
        kind = getattr(exceptions, name) if name in exceptions.__all__ else ServeError
        raise kind(message)
    return answer


async def ask(scheduler: Any, op: str, **arguments: Any) -> dict[str, Any]:
    """Ask the controller, which must be there."""
    answer = await probe(scheduler, op, **arguments)
    if answer is None:
        not_running(f"on the cluster at {getattr(scheduler, 'addr', 'this address')}")
    return answer


def not_running(where: str) -> NoReturn:
    """Raise `NotRunningError`."""
    raise NotRunningError(f"dask_serve does not run {where}: start it with serve.run(app) or serve.start()")


def find_handle(
    deployment: str | None = None, app: str | None = None, sync: bool = True, client: Client | None = None
) -> Any:
    """Return the handle of a deployment that runs.

    Parameters
    ----------
    deployment : str, optional
        Its name; None: the ingress of ``app``.
    app : str, optional
        Name of the application; needed where several have a deployment of that name. In a replica its own
        application comes first.
    sync : bool
        False: the handle's ``remote`` is awaited for the ref.
    client : Client, optional
        The current one by default. With an asynchronous client the answer is an awaitable.
    """
    owner, run = _peer(client)

    async def find() -> DeploymentHandle:
        answer = await ask(owner.scheduler, "serve_table", epoch="", since=0, timeout=0)
        return _known_handle(owner, *choose(decode_table(answer["table"]), deployment, app), sync)

    return run(find)


def _peer(client: Client | None) -> tuple[Any, Callable[[Callable[[], Awaitable[Any]]], Any]]:
    worker = current_worker() if client is None else None
    if worker is not None:
        return worker, lambda function: run_on_loop(worker.loop, function)
    client = current_client(client)
    if client is None and stand_ins:
        return stand_ins[-1], stand_ins[-1].sync
    if client is None:
        not_running("here, as far as can be seen: there is no Dask client")
    if client.scheduler is None:
        raise NotRunningError("the Dask client is closed: make another one with distributed.Client(...)")
    return client, client.sync


def _known_handle(owner: Any, app: str, deployment: str, sync: bool) -> DeploymentHandle:
    """Return the handle that this client or worker has given out already, as long as anybody has it."""
    handles = Session.of(owner).handles
    key = app, deployment, sync
    handle: DeploymentHandle | None = handles.get(key)
    if handle is None:
        client = None if isinstance(owner, Worker) else owner
        made = make_handle(app, deployment, address=owner.scheduler.address, sync=sync, client=client)
        # Another thread may have made one meanwhile.
        handle = handles.setdefault(key, made)
    return handle


def choose(table: Table, deployment: str | None, app: str | None) -> tuple[str, str]:
    """Return the names of the application and deployment that are meant."""
    if deployment is None:
        if app not in table.applications:
            known = ", ".join(sorted(table.applications)) or "none"
            raise ApplicationNotFoundError(f"there is no application {app!r}; there are: {known}")
        return _split(table.applications[app])
    context = replica_context.get(None)
    own = context.app_name if context is not None else None
    for candidate in (app,) if app is not None else (own,):
        if candidate is not None and deployment_id(candidate, deployment) in table.deployments:
            return candidate, deployment
    found = [name for name in table.deployments if _split(name)[1] == deployment and app is None]
    if len(found) == 1:
        return _split(found[0])
    known = ", ".join(sorted(found or table.deployments)) or "none"
    if found:
        raise ApplicationNotFoundError(
            f"several applications have a deployment {deployment!r}: {known}; say which with app_name="
        )
    place = f" in application {app!r}" if app is not None else ""
    raise ApplicationNotFoundError(f"there is no deployment {deployment!r}{place}; there are: {known}")


def _split(name: str) -> tuple[str, str]:
    app, _, deployment = name.partition("/")
    return app, deployment


def make_handle(app: str, deployment: str, *, address: str | None, **options: Any) -> DeploymentHandle:
    """Make a handle for the cluster whose scheduler is at ``address``."""
    from ..handle import DeploymentHandle

    return DeploymentHandle(app, deployment, address, **options)
