"""Bringing several applications to the controller as one change, and looking at what is desired there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from ..exceptions import DeploymentFailedError, ServeError, StartTimeoutError
from ..session.peers import probe
from .asking import ask_again
from .deploy import (
    SEND_TRIES,
    check_bound,
    ensure_controller,
    signature,
    wait_known,
    wait_running,
    with_configured,
)
from .desired import Change, DesiredState
from .progress import Progress
from .sending import send_code

if TYPE_CHECKING:
    from distributed import Client

    from ..config import HTTPOptions
    from ..shipping.graph import Built

__all__ = ["Applied", "apply", "desired"]


class Applied(Struct, frozen=True):
    """What a change has brought about.

    Attributes
    ----------
    versions : dict
        The version of each application now.
    before : dict
        The version of each before; 0: there was none.
    deleted : list of str
        Applications that are deleted.
    url : str
        Where HTTP is served; empty: nowhere.
    """

    versions: dict[str, int]
    before: dict[str, int]
    deleted: list[str]
    url: str


async def desired(client: Client) -> DesiredState:
    """Return what is desired on the cluster; nothing is where dask_serve does not run."""
    answer = await probe(client.scheduler, "serve_desired")
    return DesiredState() if answer is None else msgspec.msgpack.decode(answer["desired"], type=DesiredState)


async def apply(
    client: Client,
    built: Sequence[Built],
    http: tuple[HTTPOptions, list[str]],
    *,
    prune: bool = False,
    wait: bool = True,
    timeout: float | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Applied:
    """Make some applications and the proxies as they are given, all of it or nothing.

    Parameters
    ----------
    client : Client
        Of the cluster; this runs on its loop.
    built : sequence of Built
        The applications.
    http : tuple
        HTTP options, and the names of those that are to change.
    prune : bool
        Delete all other applications.
    wait : bool
        Return once all of them run.
    timeout : float or None
        Seconds for that.
    tell : callable
        Called with a line of text when an application runs.

    Raises
    ------
    ConfigError
        Something cannot be so; nothing has changed.
    DeploymentFailedError, ConflictError, StartTimeoutError
        Some of them do not run; the others do.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    await ensure_controller(client)
    say = Progress()
    for application in built:
        await check_bound(client, application.spec, deadline, say)
    options, preferred = with_configured(*http)
    change = Change(
        applications=[application.spec for application in built],
        prune=prune,
        http=options,
        explicit=http[1],
        preferred=preferred,
    )
    applied = await _send(client, built, change)
    if wait:
        await _wait_all(client, built, applied, timeout, tell)
    return applied


async def _send(client: Client, built: Sequence[Built], change: Change) -> Applied:
    code = {revision: blob for application in built for revision, blob in application.code.items()}
    answer = await ask_again(client, "serve_missing", revisions=list(code))
    encoded = msgspec.msgpack.encode(change)
    for _ in range(SEND_TRIES):
        sent = await send_code(client, code, answer.get("missing", ()))
        answer = await ask_again(client, "serve_apply", change=encoded, code=sent, **signature(client))
        if "versions" in answer:
            return Applied(answer["versions"], answer["before"], list(answer["deleted"]), answer["url"])
    raise DeploymentFailedError("nothing was deployed: what has the same code is deleted all the time by others")


async def _wait_all(
    client: Client, built: Sequence[Built], applied: Applied, timeout: float | None, tell: Callable[[str], None]
) -> None:
    deadline = None if timeout is None else time.monotonic() + timeout
    errors: list[ServeError] = []
    for application in built:
        name, route = application.spec.name, application.spec.route_prefix
        say = Progress()
        try:
            await wait_running(client, name, applied.versions[name], deadline=deadline, timeout=timeout, say=say)
        except (DeploymentFailedError, StartTimeoutError) as error:
            # The others may run all the same.
            errors.append(error)
            continue
        finally:
            say.end()
        where = f" at {applied.url.rstrip('/')}{route}" if applied.url and route else ""
        tell(f"application {name!r} is running{where}")
    if errors:
        raise errors[0] if len(errors) == 1 else DeploymentFailedError("\n".join(map(str, errors)))
    await wait_known(client, any(application.spec.route_prefix is not None for application in built))
