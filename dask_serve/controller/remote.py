"""Proxies on another node than the scheduler's: what ``dask serve proxy`` runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable
from typing import Any

import msgspec
from distributed.comm.addressing import get_address_host
from distributed.core import rpc
from distributed.security import Security
from distributed.utils import get_ip

from .. import __version__
from ..config import HTTPOptions
from ..defaults import configured_http
from ..exceptions import ConfigError, NotRunningError, ServeError
from ..options import change_options
from ..routing.table import decode_table
from .counts_sender import CountsSender
from .proxies import Proxies
from .scrape import at_host
from .service_file import ServiceFile

__all__ = ["RemoteProxies", "configured_here"]

logger = logging.getLogger("dask_serve.controller")

#: Seconds that the controller may hold a question for news; each answer is a sign of life.
POLL = 2.0
#: Seconds beyond that until a scheduler that says nothing counts as away, and until it is asked again.
PATIENCE, RETRY = 5.0, 0.5
#: Seconds that saying goodbye may take.
GOODBYE = 1.0
#: Options that say where a node listens: each has its own.
LOCAL = ("host", "port", "unix_socket", "num_proxies", "admin_host", "admin_port")


def configured_here() -> dict[str, Any]:
    """Return what Dask's configuration of this node says of where to listen; the rest is the service's."""
    options, names = configured_http()
    return {name: getattr(options, name) for name in names if name in LOCAL}


class RemoteProxies:
    """Supervises proxies of this node for the service of a cluster elsewhere.

    They get the options of ``serve.start`` and the routing table from the controller, and follow both. While the
    scheduler is away they go on with what they know.

    Parameters
    ----------
    address : str
        Of the scheduler.
    given : dict
        Options of this node, which replace those of ``serve.start``.
    security : distributed.Security, optional
        Dask's certificates; by default those of its configuration.
    service_file : str, optional
        Path of a file that tells where HTTP is served.

    Raises
    ------
    ConfigError
        The service file cannot be there.
    """

    def __init__(
        self,
        address: str,
        given: dict[str, Any],
        security: Security | None = None,
        service_file: str | None = None,
    ) -> None:
        self._address = address
        self._given = given
        security = security or Security()
        self._scheduler: Any = rpc(address, connection_args=security.get_connection_args("client"))
        self._proxies = Proxies(self._on_proxy, heartbeat=False, security=security)
        self._counts = CountsSender(self._scheduler)
        self._telling: set[asyncio.Task[None]] = set()
        self._known = ("", 0)
        #: What the controller calls these proxies.
        self._name = f"{socket.gethostname()}-{os.getpid()}"
        self._options: HTTPOptions | None = None
        self._file: ServiceFile | None = None
        if service_file is not None:
            # As the scheduler sees this node.
            self._file = ServiceFile(service_file, address, get_ip(get_address_host(address)))

    async def start(self, timeout: float) -> str:
        """Return where HTTP is served, once it is.

        Raises
        ------
        NotRunningError
            The scheduler cannot be reached, or dask_serve does not run there.
        ConfigError, ServeError
            The proxies cannot be started.
        """
        try:
            options = await asyncio.wait_for(self._ask(0.0), timeout)
        except (OSError, asyncio.TimeoutError) as error:
            raise NotRunningError(f"no scheduler answers at {self._address}: {str(error) or 'it is silent'}") from None
        self._options = options
        await self._proxies.start(self._here(options))
        await self._tell_users()
        return self._proxies.url

    async def follow(self, say: Callable[[str], None]) -> None:
        """Pass on news from the controller, until cancelled."""
        away = False
        while True:
            try:
                options = await asyncio.wait_for(self._ask(POLL), POLL + PATIENCE)
            except (OSError, asyncio.TimeoutError, ServeError) as error:
                if not away:
                    say(f"the scheduler is away ({str(error) or 'it is silent'}); going on with what is known")
                away = True
                await asyncio.sleep(RETRY)
                continue
            if away:
                say("the scheduler is back")
            away = False
            self._counts.wake()
            if options != self._options:
                self._options = options
                try:
                    await self._proxies.start(self._here(options))
                    await self._tell_users()
                except ServeError as error:
                    say(f"the new options of serve.start cannot be used here: {error}")

    async def stop(self) -> None:
        """Drain and end the proxies."""
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            await asyncio.wait_for(self._scheduler.serve_proxy(timeout=0.0, node=self._name), GOODBYE)
        if self._file is not None:
            await self._file.tell("", "")
        await self._proxies.stop()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._counts.flush(), GOODBYE)
        with contextlib.suppress(OSError):
            await self._scheduler.close_rpc()

    async def _tell_users(self) -> None:
        if self._file is not None:
            await self._file.tell(self._proxies.url, self._proxies.options.host)

    def _on_proxy(self, slot: int, event: str, details: dict[str, Any]) -> None:
        if event == "counts":
            self._counts.put(**details)
        elif event == "counted":
            self._counts.end(**details)
        elif event == "backlogs":
            task = asyncio.get_running_loop().create_task(self._tell(details))
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)

    async def _tell(self, details: dict[str, Any]) -> None:
        """Pass on how many requests wait; the next report makes up for one that is lost."""
        with contextlib.suppress(OSError):
            await self._scheduler.serve_backlogs(**details)

    def _here(self, options: HTTPOptions) -> HTTPOptions:
        defaults = HTTPOptions()
        local = {name: getattr(defaults, name) for name in LOCAL}
        return change_options(options, {**local, **self._given}, "dask serve proxy")

    def _rows(self) -> list[dict[str, Any]]:
        """Describe the proxies for `serve.status()`."""
        here = {"node": socket.gethostname(), "url": self._proxies.url, "version": __version__}
        rows = self._proxies.describe()
        admin_host, own = self._proxies.options.admin_host, get_ip(get_address_host(self._address))
        for row in rows:
            row["admin"] = at_host(row.get("admin", ""), admin_host, own)
        return [{**here, **{name: value for name, value in row.items() if name != "stats"}} for row in rows]

    async def _ask(self, timeout: float) -> HTTPOptions:
        """Pass on the latest table if it is new, and return the options."""
        epoch, since = self._known
        answer = await self._scheduler.serve_proxy(
            epoch=epoch, since=since, timeout=timeout, node=self._name, proxies=self._rows()
        )
        if not answer or "options" not in answer:
            raise NotRunningError(
                f"dask_serve does not run on the cluster at {self._address}: start it with serve.run(app) or "
                "`dask scheduler --preload dask_serve.preload`"
            )
        if answer["table"] is not None:
            table = decode_table(answer["table"])
            self._known = (table.epoch, table.version)
            self._proxies.publish(answer["table"])
        self._proxies.ping()
        try:
            return msgspec.msgpack.decode(answer["options"], type=HTTPOptions)
        except msgspec.ValidationError as error:
            raise ConfigError(f"the scheduler has another version of dask_serve: {error}") from None
