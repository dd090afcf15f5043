"""Bringing an application to the controller, installing that first if need be, and waiting until it runs."""

from __future__ import annotations

import asyncio
import getpass
import os
import socket
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from ..defaults import configured_http
from ..exceptions import ConfigError, ConflictError, DeploymentFailedError, NotRunningError, StartTimeoutError
from ..policy.desired import ApplicationSpec
from ..policy.history import CONTROLLER
from ..routing.session import Session
from ..session.peers import ask, probe
from .asking import ask_again
from .history import decode_history, when
from .progress import Progress
from .sending import send_code
from .status import ApplicationStatus, ServeStatus, decode_status

if TYPE_CHECKING:
    from distributed import Client

    from ..config import HTTPOptions
    from ..shipping.graph import Built

__all__ = [
    "SEND_TRIES",
    "check_bound",
    "deploy",
    "ensure_controller",
    "roll_back",
    "scale",
    "signature",
    "start_proxies",
    "wait_known",
    "wait_running",
    "with_configured",
]

#: Seconds one long poll may take.
POLL = 30.0
#: Seconds that the news of a running application may take to the proxies and to this session.
KNOWN_WITHIN = 2.0
#: How often code is sent again that another session's deletion took away meanwhile.
SEND_TRIES = 5


async def ensure_controller(client: Client) -> None:
    """Install the controller in the scheduler where there is none."""
    from .plugin import Controller

    address = client.scheduler.addr
    try:
        # Does nothing where it is there already. Asking first would put a traceback into the scheduler's log.
        await client.register_plugin(Controller())
    except ImportError as error:
        raise NotRunningError(
            f"the scheduler at {address} cannot import dask_serve ({error}): install it there, in the environment "
            "that `dask scheduler` runs in, with `pip install dask-serve`, in the version of this session; the "
            "workers need it too"
        ) from error
    except ValueError as error:
        # Its configuration forbids plugins from clients, but not those from preloads.
        if await probe(client.scheduler, "serve_status") is None:
            raise NotRunningError(
                f"the scheduler at {address} does not accept plugins ({error}): start it with "
                "`dask scheduler --preload dask_serve.preload`"
            ) from error


def signature(client: Client) -> dict[str, str]:
    """Return who this is, for the history: the person and the Dask client."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        user = str(os.getuid())
    return {"owner": f"{user}@{socket.gethostname()}", "client": str(client.id)}


async def roll_back(
    client: Client, name: str, version: int | None, *, wait: bool, timeout: float | None, say: Progress
) -> int:
    """Make an application again what it was, and wait until that runs; return the number of the new version."""
    return await _change(client, "serve_rollback", name, wait=wait, timeout=timeout, say=say, version=version)


async def scale(
    client: Client, name: str, deployment: str, number: int, *, wait: bool, timeout: float | None, say: Progress
) -> int:
    """Change how many replicas a deployment has, and wait for them; return the number of the new version."""
    options = {"deployment": deployment, "number": number}
    return await _change(client, "serve_scale", name, wait=wait, timeout=timeout, say=say, **options)


async def _change(
    client: Client, op: str, name: str, *, wait: bool, timeout: float | None, say: Progress, **arguments: Any
) -> int:
    deadline = None if timeout is None else time.monotonic() + timeout
    answer = await ask(client.scheduler, op, app=name, **arguments, **signature(client))
    if wait:
        try:
            await wait_running(client, name, answer["version"], deadline=deadline, timeout=timeout, say=say)
        finally:
            say.end()
        await wait_known(client, routed=True)
    return int(answer["version"])


def with_configured(options: HTTPOptions, explicit: Sequence[str]) -> tuple[HTTPOptions, list[str]]:
    """Put what Dask's configuration has of this session in the place of options that nobody gave; return its names too.

    It is for the first start of proxies: what is configured in one session does not change what runs.
    """
    found, names = configured_http()
    preferred = [name for name in names if name not in explicit]
    return msgspec.structs.replace(options, **{name: getattr(found, name) for name in preferred}), preferred


async def start_proxies(client: Client, options: HTTPOptions, explicit: list[str]) -> str:
    """Start the proxies, or change their options; return the URL."""
    options, preferred = with_configured(options, explicit)
    answer = await ask_again(
        client,
        "serve_start",
        options=msgspec.msgpack.encode(options),
        explicit=sorted(explicit),
        preferred=preferred,
    )
    return str(answer["url"])


async def deploy(
    client: Client,
    built: Built,
    proxies: tuple[HTTPOptions, list[str]],
    *,
    wait: bool,
    timeout: float | None,
    say: Progress,
) -> None:
    """Bring an application to the cluster, and wait until it runs.

    Parameters
    ----------
    client : Client
        Of the cluster; this runs on its loop.
    built : Built
        The application.
    proxies : tuple
        HTTP options, and the names of those that the user gave.
    wait : bool
        Return once it runs.
    timeout : float or None
        Seconds until `StartTimeoutError`.
    say : Progress
        Told whenever there is something to tell.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    spec = built.spec
    await ensure_controller(client)
    await check_bound(client, spec, deadline, say)
    address = ""
    if proxies[1]:
        # What was asked for may be refused (a busy port), which must leave everything as it was.
        address = await start_proxies(client, *proxies)
        version = await _send(client, built)
    elif spec.route_prefix is not None:
        address, version = await asyncio.gather(start_proxies(client, *proxies), _send(client, built))
    else:
        version = await _send(client, built)
    if wait:
        try:
            await wait_running(client, spec.name, version, deadline=deadline, timeout=timeout, say=say)
        finally:
            say.end()
        await wait_known(client, spec.route_prefix is not None)
        route = spec.route_prefix
        where = f" at {address}{route.rstrip('/')}/" if address and route else ""
        say(f"application {spec.name!r} is running{where}")


async def check_bound(client: Client, spec: ApplicationSpec, deadline: float | None, say: Progress) -> None:
    """Wait for the Dask futures that are bound; a failed one would fail every constructor."""
    for deployment in spec.deployments:
        for key in deployment.keys:
            state = client.futures.get(key)
            if state is None:
                continue
            if state.status == "pending":
                say(f"application {spec.name!r}: deployment {deployment.name!r} waits for the bound future {key}")
                try:
                    left = None if deadline is None else max(0.0, deadline - time.monotonic())
                    await asyncio.wait_for(state.wait(), left)
                except asyncio.TimeoutError:
                    raise StartTimeoutError(
                        f"application {spec.name!r} was not deployed: the future {key}, which is bound into "
                        f"{deployment.name!r}, is still pending"
                    ) from None
            if state.status != "finished":
                raise ConfigError(
                    f"application {spec.name!r} was not deployed: the future {key}, which is bound into "
                    f"{deployment.name!r}, ended with status {state.status!r}: "
                    f"{type(state.exception).__name__}: {state.exception}"
                ) from state.exception


async def wait_known(client: Client, routed: bool) -> None:
    """Wait until proxies and this session have the present table: the next call finds the replicas that are ready."""
    answer = await ask_again(client, "serve_routed", timeout=KNOWN_WITHIN if routed else 0.0)
    present = answer["epoch"], answer["version"]
    # Of a later epoch, another controller has taken over.
    await Session.of(client).until(
        lambda table: (table.epoch, table.version) >= present or table.epoch != present[0], KNOWN_WITHIN
    )


async def _send(client: Client, built: Built) -> int:
    """Send an application, and those parts of its code that the controller does not have; return its version."""
    answer = await ask_again(client, "serve_missing", revisions=list(built.code))
    application = msgspec.msgpack.encode(built.spec)
    for _ in range(SEND_TRIES):
        code = await send_code(client, built.code, answer.get("missing", ()))
        answer = await ask_again(client, "serve_deploy", application=application, code=code, **signature(client))
        if "version" in answer:
            return int(answer["version"])
    raise DeploymentFailedError(
        f"application {built.spec.name!r} was not deployed: what has the same code is deleted all the time by others"
    )


async def wait_running(
    client: Client, name: str, version: int, *, deadline: float | None, timeout: float | None, say: Progress
) -> None:
    """Wait until a version runs; raise where it fails, or is no longer what is desired."""
    found = ServeStatus()
    while True:
        left = POLL if deadline is None else max(min(POLL, deadline - time.monotonic()), 0.0)
        found = await _next_status(client, found.version, left)
        application = found.applications.get(name)
        if application is None or application.status == "deleting" or application.version != version:
            raise await _overtaken(client, name, version, application)
        if application.status == "running":
            say.replicas("", application)
            return
        if application.status == "failed":
            raise DeploymentFailedError(f"application {name!r} could not be started: {application.message}")
        say.replicas(_describe(name, application), application, _is_stuck(application))
        if deadline is not None and time.monotonic() >= deadline:
            raise StartTimeoutError(
                f"application {name!r} is not running after {timeout:g} s: {application}\n"
                "It stays deployed, and starts once what is missing is there; serve.delete() takes it back. Workers "
                "are added with `dask worker SCHEDULER`, with resources by `--resources GPU=1`."
            )


async def _next_status(client: Client, since: int, timeout: float) -> ServeStatus:
    """Return the status once it is newer."""
    # The present one will do at first, and after a restart, when versions count anew.
    again = {"since": 0}
    answer = await ask_again(client, "serve_watch", again, since=since, timeout=timeout)
    return decode_status(answer["status"])


async def _overtaken(client: Client, name: str, version: int, now: ApplicationStatus | None) -> DeploymentFailedError:
    """Return the error for a version that is no longer the desired one: who replaced or deleted it, and when."""
    what = f"version {version} of application {name!r}, which this session waited for,"
    if now is not None and now.status != "deleting":
        if now.owner == CONTROLLER.owner:
            return DeploymentFailedError(f"application {name!r} could not be started: {now.reason}")
        change = f"was replaced by version {now.version}, {now.reason}"
        return ConflictError(f"{what} {change} by {_who(now.owner, now.client)} at {when(now.deployed_at)}")
    gone = decode_history((await ask(client.scheduler, "serve_history", app=name))["history"]).deleted
    if gone is None:
        return ConflictError(f"{what} is not known any more: the scheduler was started again, and had not saved it")
    return ConflictError(f"{what} was deleted by {_who(gone.by.owner, gone.by.client)} at {when(gone.time)}")


def _who(owner: str, client: str) -> str:
    return f"{owner or 'unknown'}{f' ({client})' if client else ''}"


def _is_stuck(application: ApplicationStatus) -> bool:
    """Replicas wait for workers or resources that are not there."""
    return any("wait for a worker" in deployment.message for deployment in application.deployments.values())


def _describe(name: str, application: ApplicationStatus) -> str:
    """Say in one line how far an application is."""
    parts = []
    for deployment, state in application.deployments.items():
        counts = dict(state.counts)
        text = f"{deployment} {counts.pop('ready', 0)}/{state.target} ready"
        text += "".join(f", {number} {what}" for what, number in counts.items() if number)
        message = state.message.strip().splitlines()
        parts.append(text + (f" ({message[-1]})" if message else ""))
    return f"application {name!r}: " + "; ".join(parts)
