"""The versions of an application: what it was, and making it that again; numbers of replicas.

Every function takes ``client=None`` and answers as those of `dask_serve.api` do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dask.utils import parse_timedelta

from .clients import existing_client
from .controller.deploy import roll_back
from .controller.deploy import scale as scale_on
from .controller.history import Revision, decode_history
from .controller.progress import Progress
from .controller.status import decode_status, only_deployment
from .exceptions import ApplicationNotFoundError
from .session.peers import ask, refuse_inside

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["history", "rollback", "scale"]


def rollback(
    name: str,
    version: int | None = None,
    *,
    wait: bool = True,
    timeout: float | str | None = None,
    client: Client | None = None,
) -> Any:
    """Make an application again what it was: code, bound arguments, options and route.

    It is a deployment like any other, with the code that the controller kept: old replicas serve until new ones are
    ready.

    Parameters
    ----------
    name : str
        Name of the application.
    version : int, optional
        Which version, as `history` tells them. By default the last one that ran and is another than the present one.
    wait : bool, default True
        Return once all replicas are ready.
    timeout : float or str, optional
        How long to wait, in seconds or as Dask parses it. By default there is no limit.
    client : distributed.Client, optional
        The cluster to use.

    Returns
    -------
    int
        The number of the version that this is.

    Raises
    ------
    ApplicationNotFoundError
        There is none of that name; the message lists those there are.
    ConfigError
        There is no such version, or it cannot come back: its route is taken, or Dask values that were bound are gone.
    DeploymentFailedError, ConflictError, StartTimeoutError
        As of `run`.
    """
    refuse_inside("serve.rollback")
    used = existing_client(client)
    seconds = None if timeout is None else parse_timedelta(timeout, "s")

    async def begin() -> int:
        return await roll_back(used, name, version, wait=wait, timeout=seconds, say=Progress())

    return used.sync(begin)


def scale(
    deployment: str,
    num_replicas: int,
    *,
    wait: bool = True,
    timeout: float | str | None = None,
    client: Client | None = None,
) -> Any:
    """Change how many replicas a deployment has; those that stay are not restarted.

    It is a new version of the application, which `history` tells of and `rollback` takes back. Deploying the
    application again makes the number what the code says.

    Parameters
    ----------
    deployment : str
        ``application/deployment``; the name of the application is enough where that has one deployment only.
    num_replicas : int
        How many, from 1 on.
    wait : bool, default True
        Return once they are ready, and those that are too many are gone.
    timeout : float or str, optional
        How long to wait, in seconds or as Dask parses it. By default there is no limit.
    client : distributed.Client, optional
        The cluster to use.

    Returns
    -------
    int
        The number of the version that this is.

    Raises
    ------
    ApplicationNotFoundError
        There is no such application or deployment; the message lists those there are.
    ConfigError
        The deployment follows its load (the message says between which bounds), or the number is none.
    DeploymentFailedError, ConflictError, StartTimeoutError
        As of `run`.
    """
    refuse_inside("serve.scale")
    used = existing_client(client)
    seconds = None if timeout is None else parse_timedelta(timeout, "s")

    async def begin() -> int:
        app, slash, name = deployment.partition("/")
        if not slash:
            answer = await ask(used.scheduler, "serve_status")
            name = only_deployment(decode_status(answer["status"]), app)
        return await scale_on(used, app, name, num_replicas, wait=wait, timeout=seconds, say=Progress())

    return used.sync(begin)


def history(name: str, client: Client | None = None) -> Any:
    """Return the last versions of an application: who deployed what, when and why.

    Returns
    -------
    list of Revision
        The oldest first; 10 of them unless ``serve.history-length`` of the scheduler's configuration says otherwise.

    Raises
    ------
    ApplicationNotFoundError
        There is none of that name; the message says who deleted it, if that was lately.
    """
    used = existing_client(client)

    async def get() -> list[Revision]:
        answer = await ask(used.scheduler, "serve_history", app=name)
        revisions = decode_history(answer["history"]).revisions
        if not revisions:
            raise ApplicationNotFoundError(answer["told"])
        return revisions

    return used.sync(get)
