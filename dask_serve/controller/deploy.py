"""Bringing an application to the controller, installing that first if need be, and waiting until it runs."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from typing import TYPE_CHECKING

import msgspec
from distributed.protocol import to_serialize

from ..exceptions import ConfigError, DeploymentFailedError, NotRunningError, StartTimeoutError
from ..policy.desired import ApplicationSpec, deployment_id
from ..routing.session import Session
from ..routing.table import Table
from ..session.peers import ask, probe
from .status import ApplicationStatus, decode_status

if TYPE_CHECKING:
    from collections.abc import Callable

    from distributed import Client

    from ..config import HTTPOptions
    from ..shipping.graph import Built

__all__ = ["Progress", "deploy", "ensure_controller", "start_proxies"]

logger = logging.getLogger("dask_serve")

#: Seconds one long poll may take.
POLL = 30.0
#: Seconds that the news of a running application may take to the proxies and to this session.
KNOWN_WITHIN = 2.0


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


async def start_proxies(client: Client, options: HTTPOptions, explicit: list[str]) -> str:
    """Start the proxies, or change their options; return the URL."""
    answer = await ask(
        client.scheduler, "serve_start", options=msgspec.msgpack.encode(options), explicit=sorted(explicit)
    )
    return str(answer["url"])


async def deploy(
    client: Client,
    built: Built,
    proxies: tuple[HTTPOptions, list[str]],
    *,
    wait: bool,
    timeout: float | None,
    say: Callable[..., None],
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
    say : callable
        Gets a line of text whenever there is something to tell.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    spec = built.spec
    await ensure_controller(client)
    await _check_bound(client, spec, deadline, say)
    address = ""
    if proxies[1]:
        # What was asked for may be refused (a busy port), which must leave everything as it was.
        address = await start_proxies(client, *proxies)
        await _send(client, built)
    elif spec.route_prefix is not None:
        address, _ = await asyncio.gather(start_proxies(client, *proxies), _send(client, built))
    else:
        await _send(client, built)
    if wait:
        await _wait_running(client, spec.name, deadline, timeout, say)
        await _wait_known(client, spec)
        route = spec.route_prefix
        where = f" at {address}{route.rstrip('/')}/" if address and route else ""
        say(f"application {spec.name!r} is running{where}")


async def _check_bound(client: Client, spec: ApplicationSpec, deadline: float | None, say: Callable[..., None]) -> None:
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


async def _wait_known(client: Client, spec: ApplicationSpec) -> None:
    """Wait until the proxies and this session know the application's replicas: the next call finds all of them."""
    if spec.route_prefix is not None:
        await probe(client.scheduler, "serve_routed", timeout=KNOWN_WITHIN)
    ingress = deployment_id(spec.name, spec.ingress)
    options = next(one for one in spec.deployments if one.name == spec.ingress).options
    number, config = options.num_replicas, options.autoscaling_config
    target = number if isinstance(number, int) else min(1, config.min_replicas if config is not None else 1)

    def known(table: Table) -> bool:
        entry = table.deployments.get(ingress)
        return entry is not None and len(entry.replicas) >= target

    await Session.of(client).until(known, KNOWN_WITHIN)


async def _send(client: Client, built: Built) -> None:
    """Send an application, and those parts of its code that the controller does not have."""
    answer = await ask(client.scheduler, "serve_missing", revisions=list(built.code))
    code = {revision: to_serialize(built.code[revision]) for revision in answer["missing"]}
    await ask(client.scheduler, "serve_deploy", application=msgspec.msgpack.encode(built.spec), code=code)


async def _wait_running(
    client: Client, name: str, deadline: float | None, timeout: float | None, say: Callable[..., None]
) -> None:
    found = decode_status((await ask(client.scheduler, "serve_status"))["status"])
    while True:
        application = found.applications.get(name)
        if application is None:
            raise DeploymentFailedError(f"application {name!r} was deleted while it was being deployed")
        if application.status == "running":
            return
        if application.status == "failed":
            raise DeploymentFailedError(f"application {name!r} could not be started: {application.message}")
        say(_describe(name, application), _is_stuck(application))
        left = POLL if deadline is None else min(POLL, deadline - time.monotonic())
        if left <= 0:
            raise StartTimeoutError(
                f"application {name!r} is not running after {timeout:g} s: {application}\n"
                "It stays deployed, and starts once what is missing is there; serve.delete() takes it back. Workers "
                "are added with `dask worker SCHEDULER`, with resources by `--resources GPU=1`."
            )
        answer = await ask(client.scheduler, "serve_watch", since=found.version, timeout=left)
        found = decode_status(answer["status"])


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


class Progress:
    """Prints lines on a terminal when they change, and logs them elsewhere."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, line: str, urgent: bool = False) -> None:
        """Tell a line; an urgent one, on which somebody has to act, is a warning where there is no terminal."""
        if line == self._last:
            return
        self._last = line
        if sys.stderr is not None and sys.stderr.isatty():
            sys.stderr.write(f"dask_serve: {line}\n")
            sys.stderr.flush()
        else:
            logger.log(logging.WARNING if urgent else logging.INFO, "%s", line)
