"""The fabric: what one event loop needs to call deployments. Links by process, routers by deployment, one table."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import AsyncGenerator, Callable
from time import monotonic
from typing import Any

from ..measures.histogram import Histogram
from .backlogs import Backlogs
from .callers import callers
from .dial import Ways
from .link import Link
from .router import Router
from .store import Fetched
from .table import Table

__all__ = ["Fabric"]

logger = logging.getLogger("dask_serve.routing")

#: Seconds between two looks at the links.
CHECK_EVERY = 0.5
#: Seconds until a process that could not be reached, though the table lists it, is dialled again.
REDIAL_AFTER = 1.0
#: A process that is silent for this many seconds, and that the controller has taken out of the table, is given up
#: though its connection stands: it is stopped or hangs for good. One that the controller still lists may take its time.
GIVE_UP_AFTER = 30.0


class Fabric:
    """Links and routers of one event loop; all methods are for that loop's thread.

    Parameters
    ----------
    loop : asyncio.AbstractEventLoop
    name : str
        For logs.
    secret : bytes, optional
        The cluster's secret; the table brings it too.
    ssl : SSLContext, optional
        For doors with TLS.
    ways : Ways, optional
        How to get to worker processes; by default only directly.
    report : callable, optional
        Takes what the controller should know of waiting requests; see `Backlogs`.
    measured : bool
        Routers keep how long requests wait at them.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        name: str,
        secret: bytes = b"",
        ssl: Any = None,
        ways: Ways | None = None,
        report: Callable[[dict[str, Any]], None] | None = None,
        measured: bool = False,
    ) -> None:
        self.table: Table | None = None
        self.closed = False
        #: Kept alive for the session, which closes the fabric through it when the loop ends.
        self.guard: AsyncGenerator[None, None] | None = None
        self.routers: dict[str, Router] = {}
        #: Why nothing can be called, where there is no controller.
        self._absent: str | None = None
        self._name = name
        self._loop = loop
        self._secret = secret
        self._ssl = ssl
        self._ways = ways or Ways()
        self._measured = measured
        self._links: dict[str, Link] = {}
        self._backlogs = None if report is None else Backlogs(self.routers, loop, report)
        #: What was told last of doors and certificates.
        self._untrusted = ""
        self._check: asyncio.TimerHandle | None = None
        self._redial: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Fabric {self._name}: {len(self._links)} links, {len(self.routers)} routers>"

    # ------------------------------------------------------------------ the table

    def apply(self, table: Table) -> None:
        """Take over a new version of the table."""
        self.table = table
        self._absent = None
        self._secret = table.secret
        for router in list(self.routers.values()):
            self._apply_to(router)
        listed = {replica.process for entry in table.deployments.values() for replica in entry.replicas}
        for link in list(self._links.values()):
            # Results may still be fetched from a process without replicas, so a link ends with its process only.
            if link.process not in listed and not link.targets and link.lost:
                self._links.pop(link.process, None)

    def absent(self) -> None:
        """There is no controller on the cluster: nothing that waits will ever be answered."""
        self.table = Table(epoch="", version=0, secret=b"", deployments={}, routes=[])
        self._absent = "dask_serve does not run on this cluster: start it with serve.run(app)"
        for router in list(self.routers.values()):
            router.close(self._absent)

    def _apply_to(self, router: Router) -> None:
        assert self.table is not None
        entry = self.table.deployments.get(router.id)
        if entry is not None:
            for replica in entry.replicas:
                self.link(replica.process, replica.door)
        router.apply(entry, self._links)

    def router(self, deployment: str) -> Router:
        """Return the router of a deployment (``app/deployment``), known or not."""
        router = self.routers.get(deployment)
        if router is None:
            router = self.routers[deployment] = Router(deployment)
            if self._measured:
                router.waited = Histogram()
            if self._backlogs is not None:
                router.on_backlog = self._backlogs.wake
            if self._absent is not None:
                router.close(self._absent)
            elif self.table is not None:
                self._apply_to(router)
        return router

    # ------------------------------------------------------------------ links

    def link(self, process: str, door: str) -> Link:
        """Return the link to a process, dialled if there is none."""
        link = self._links.get(process)
        # Not in the context of the request that needs it first: it would live as long as the link.
        return contextvars.Context().run(self._open, process, door) if link is None else link

    def _open(self, process: str, door: str) -> Link:
        link = self._links[process] = Link(
            self._secret,
            process,
            door,
            self._ssl,
            self._on_link_lost,
            ways=self._ways,
        )
        if self._check is None:
            self._check = self._loop.call_later(CHECK_EVERY, self._on_check)
        return link

    def _on_link_lost(self, link: Link) -> None:
        self._links.pop(link.process, None)
        if link.untrusted:
            self._tell_untrusted(link)
        # The controller takes a dead process out of the table; one that it keeps there may be reachable again.
        if not self.closed and self._redial is None:
            self._redial = self._loop.call_later(REDIAL_AFTER, self._on_redial)

    def _tell_untrusted(self, link: Link) -> None:
        """What waits for replicas behind doors without trust, and for no others, is not kept waiting."""
        why = f"the door {link.door} cannot be used: {link.untrusted}"
        if why != self._untrusted:
            # The first time may be the end of the process, which looks the same.
            self._untrusted = why
            logger.warning("No requests go to process %s: %s", link.process, why)
            return
        for router in self.routers.values():
            router.fail_untrusted(link.process, why)

    def _on_redial(self) -> None:
        self._redial = None
        if self.table is not None and not self.closed:
            for router in list(self.routers.values()):
                router.forgive()
                self._apply_to(router)

    def _on_check(self) -> None:
        now = monotonic()
        for link in list(self._links.values()):
            link.check(now)
            if link.silent and self._is_lost(link):
                link.give_up()
        for router in self.routers.values():
            router.remind()
        self._check = self._loop.call_later(CHECK_EVERY, self._on_check) if self._links else None

    def _is_lost(self, link: Link) -> bool:
        """Tell whether a silent process is given up: the controller has, or nobody knows anything of it."""
        table, process = self.table, link.process
        if table is None or process in table.silent:
            return False
        return process in table.given_up or (
            self._loop.time() - link.silent_since > GIVE_UP_AFTER
            and all(replica.process != process for entry in table.deployments.values() for replica in entry.replicas)
        )

    def knows(self, process: str) -> bool:
        """There is a link to the process."""
        return process in self._links

    async def fetch(self, process: str, door: str, name: str) -> Fetched:
        """Return a result from a process's store.

        Raises
        ------
        ReplicaLostError
            The process is gone, or has the result no more.
        """
        return await self.link(process, door).fetch(name)

    def release(self, process: str, name: str) -> None:
        """Free a result in a process's store; nothing to do when the process is gone."""
        link = self._links.get(process)
        if link is not None:
            link.release(name)

    # ------------------------------------------------------------------ the end

    async def close(self) -> None:
        """Close all links; what is under way or waits fails."""
        self.closed = True
        callers.close(self)
        for timer in (self._check, self._redial):
            if timer is not None:
                timer.cancel()
        if self._backlogs is not None:
            self._backlogs.close()
        for router in self.routers.values():
            router.close("the service, or this process's connection to it, was shut down")
        for link in list(self._links.values()):
            link.close()
        self._links.clear()
        await asyncio.sleep(0)
