"""The proxies as the controller sees them: started when needed, told each table, brought back after a restart."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec

from ..config import HTTPOptions
from ..exceptions import ConfigError
from ..records import keep_records
from .editor import Editor
from .elsewhere import Elsewhere
from .events import brief
from .measures import Measures
from .status import ProxyStatus
from .store import HTTP

if TYPE_CHECKING:
    from distributed.security import Security

    from .service_file import ServiceFile

__all__ = ["Front", "first_options"]

logger = logging.getLogger("dask_serve.controller")

#: Seconds that a closing scheduler waits for its proxies; what is still in flight then, they finish as orphans.
CLOSE_DRAIN = 2.0
#: Seconds that proxies wait for a port at the start of a scheduler.
REBIND = 10.0


def first_options(
    given: HTTPOptions | None, explicit: set[str], saved: HTTP | None
) -> tuple[HTTPOptions | None, set[str]]:
    """Return the options of the first proxies: what ran before, but for what was given now."""
    if saved is None:
        return given, explicit
    if given is None:
        return saved.options, set(saved.explicit)
    named = {name: getattr(given, name) for name in explicit}
    return msgspec.structs.replace(saved.options, **named), explicit | set(saved.explicit)


class Front:
    """Proxies, their options and what is wrong with them.

    Parameters
    ----------
    security : distributed.Security
        Dask's certificates, for the proxies' connections to doors.
    editor : Editor
        Saves the options.
    on_change : callable
        Called when URL, message or the state of a process changed.
    on_backlogs : callable
        Called with what a proxy tells of the requests that wait there, the arguments of `Scaling.waits`.
    measures : Measures
        Where the counts of the proxies go.
    note : callable
        Told of each decision: kind, subject and text, as `Events.add`.
    """

    def __init__(
        self,
        security: Security,
        editor: Editor,
        on_change: Callable[[], None],
        on_backlogs: Callable[..., None],
        measures: Measures,
        *,
        note: Callable[[str, str, str], None],
    ) -> None:
        #: Where HTTP is served; empty while it is not.
        self.url = ""
        #: Why it is not, in words.
        self.message = ""
        #: Proxies of other nodes.
        self.elsewhere = Elsewhere(on_change)
        self._security = security
        self._editor = editor
        self._on_change = on_change
        self._on_backlogs = on_backlogs
        self._measures = measures
        self._note = note
        self._proxies: Any = None
        self._table = b""
        self._starting = asyncio.Lock()
        #: Names of the options that a person gave.
        self._explicit: set[str] = set()
        #: What the scheduler was started with: proxies that are started later have it, too.
        self.standing: dict[str, Any] = {}
        self._first: asyncio.Task[None] | None = None
        #: Where users read the URL.
        self.file: ServiceFile | None = None

    def begin(self, options: HTTPOptions, explicit: set[str]) -> None:
        """Start the first proxies, without waiting: replicas need not wait until the last ones have left the port."""
        self._first = asyncio.get_running_loop().create_task(self._begin(options, explicit))

    async def _begin(self, options: HTTPOptions, explicit: set[str]) -> None:
        # The proxies of a scheduler that died may hold the port while they drain.
        retry = REBIND if options.port or options.unix_socket else 0.0
        try:
            try:
                await self.start(options, explicit, retry=retry)
            except ConfigError:
                if options.port is None or "port" in explicit:
                    raise
                # Nobody asked for the port that the last scheduler's proxies had.
                await self.start(msgspec.structs.replace(options, port=None), explicit)
        except Exception:
            # Told by the status too; the first application that needs them tries again.
            logger.exception("the proxies could not be started")

    async def start(self, options: HTTPOptions, explicit: set[str], retry: float = 0.0) -> str:
        """Start the proxies, or change what can be changed; return the URL once they accept requests.

        Raises
        ------
        ConfigError, ServeError
            See `Proxies.start`.
        """
        async with self._starting:
            if not self.url:
                named = {name: value for name, value in self.standing.items() if name not in explicit}
                options, explicit = msgspec.structs.replace(options, **named), explicit | named.keys()
            if self._proxies is None:
                from .proxies import Proxies

                self._proxies = Proxies(self._on_event, security=self._security)
                # They accept nothing before they have a table.
                self._proxies.publish(self._table)
            self.message = ""
            try:
                await self._proxies.start(options, explicit, retry=retry)
            except Exception as error:
                # Of those that run all stays as it was, and who asked for the change is told.
                if not self._proxies.url:
                    self.message = f"the proxies could not be started: {error}"
                    self._note("proxies", "proxies", brief(self.message))
                raise
            finally:
                if self._proxies.url and self._proxies.url != self.url:
                    self._note("proxies", "proxies", f"HTTP is served at {self._proxies.url}")
                self.url = self._proxies.url
                await self._tell_users()
                self._on_change()
            self._explicit |= explicit
            await self._editor.save_http(self._proxies.fixed_options, sorted(self._explicit))
            return self.url

    async def stop(self) -> None:
        """Drain and end the proxies."""
        async with self._starting:
            if self.url:
                self._note("proxies", "proxies", f"HTTP is no longer served at {self.url}")
            self.url = self.message = ""
            self._on_change()
            if self._proxies is not None:
                await self._proxies.stop()
                self._proxies = None
            await self._tell_users()
            self._explicit.clear()
            await self._editor.save_http(None)

    async def close(self) -> None:
        """End with the scheduler."""
        self.elsewhere.close()
        if self._first is not None:
            self._first.cancel()
            with suppress(asyncio.CancelledError):
                await self._first
        self.url = ""
        await self._tell_users()
        if self._proxies is not None:
            await self._proxies.stop(CLOSE_DRAIN)

    async def _tell_users(self) -> None:
        if self.file is not None:
            wrong = await self.file.tell(self.url, self.options.host)
            self.message = wrong or self.message

    def publish(self, table: bytes) -> None:
        """Give the proxies a new routing table, encoded."""
        self._table = table
        if self._proxies is not None:
            self._proxies.publish(table)

    async def until_applied(self, timeout: float) -> bool:
        """Wait until all proxies route by the present table; False after ``timeout`` seconds."""
        return self._proxies is None or bool(await self._proxies.until_applied(timeout))

    @property
    def options(self) -> HTTPOptions:
        """The options of the proxies, or those that they would have."""
        return HTTPOptions() if self._proxies is None else self._proxies.options

    @property
    def explicit(self) -> list[str]:
        """Names of the options that a person gave."""
        return sorted(self._explicit)

    def describe(self) -> list[ProxyStatus]:
        """Return all processes, those of other nodes too."""
        rows = [] if self._proxies is None else self._proxies.describe()
        # Statistics change all the time, and would wake everyone who watches the status.
        return [*msgspec.convert(rows, list[ProxyStatus]), *self.elsewhere.rows]

    def queued(self) -> dict[str, float]:
        """Return how many requests wait at the proxies of this node, by deployment."""
        return {} if self._proxies is None else dict(self._proxies.queued())

    def _on_event(self, slot: int, event: str, details: dict[str, Any]) -> None:
        if event == "backlogs":
            self._on_backlogs(**details)
        elif event == "counts":
            self._measures.proxy_told(**details)
        elif event == "counted":
            self._measures.proxy_ended(**details)
        elif event == "logs":
            for record in details["records"]:
                keep_records().add({**record, "source": f"proxy {slot}"})
        elif event == "died":
            self._note("proxy_died", "proxies", f"proxy {details['pid']} {brief(details['why'])}; it is started again")
        elif event != "stats":
            self._on_change()
