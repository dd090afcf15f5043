"""Operations on all that is desired: several applications, and the proxies, as one change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from ..config import HTTPOptions
from ..defaults import overlaid
from ..exceptions import ConfigError
from ..policy.desired import ApplicationSpec
from ..policy.history import By, Entry
from .operations import operation

if TYPE_CHECKING:
    from .plugin import Controller

__all__ = ["Change", "Desired", "DesiredState"]


class DesiredState(Struct, frozen=True, kw_only=True):
    """What is desired on a cluster.

    Attributes
    ----------
    applications : list of Entry
        The present version of each.
    http : HTTPOptions or None
        The options of the proxies; None: there are none.
    explicit : list of str
        Those of them that somebody gave.
    """

    applications: list[Entry] = []
    http: HTTPOptions | None = None
    explicit: list[str] = []


class Change(Struct, frozen=True, kw_only=True):
    """What is to be desired.

    Attributes
    ----------
    applications : list of ApplicationSpec
        The applications; others are left alone.
    prune : bool
        Others are deleted.
    http : HTTPOptions
        Options of the proxies.
    explicit : list of str
        Names of those of them that are to change.
    preferred : list of str
        Names of those that are meant for proxies that have still to be started.
    """

    applications: list[ApplicationSpec]
    prune: bool = False
    http: HTTPOptions = HTTPOptions()
    explicit: list[str] = []
    preferred: list[str] = []


class Desired:
    """Answers for all that is desired; its operations are handlers of the scheduler.

    Parameters
    ----------
    controller : Controller
        Whose state it is.
    """

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    @operation
    async def serve_desired(self) -> dict[str, Any]:
        """Return what is desired."""
        history, front = self._controller.registry.history, self._controller.front
        entries = [history.current(name) for name, _ in self._controller.registry.living()]
        state = DesiredState(
            applications=[entry for entry in entries if entry is not None],
            http=front.options if front.url else None,
            explicit=front.explicit if front.url else [],
        )
        return {"desired": msgspec.msgpack.encode(state)}

    @operation
    async def serve_apply(
        self, change: bytes, code: dict[str, Any] | None = None, owner: str = "", client: str = ""
    ) -> dict[str, Any]:
        """Make applications and proxies as they are given, all of it or nothing; answer once that is saved.

        The answer has the version of each application, the one that it had before (0: none), and who is deleted.
        """
        try:
            wanted = msgspec.msgpack.decode(change, type=Change)
        except msgspec.ValidationError as error:
            raise ConfigError(f"the scheduler's dask_serve does not understand these applications: {error}") from None
        code = self._controller.uploads.take(code or {})
        specs, editor, history = wanted.applications, self._controller.editor, self._controller.registry.history
        for spec in specs:
            await self._controller.scaling.check(spec)
        needed = [name for spec in specs for deployment in spec.deployments for name in deployment.needs]
        missing = editor.lacks(needed, code)
        if missing:
            return {"missing": missing}
        before = {spec.name: history.current(spec.name) for spec in specs}
        gone = self._others(specs) if wanted.prune else []
        editor.check(specs, code, gone)
        back = await self._start_proxies(wanted)
        try:
            versions = await editor.deploy_all(specs, code, By(owner, client), "deployed", gone=gone)
        except BaseException:
            if back is not None:
                await self._controller.front.start(back, set(wanted.explicit))
            raise
        earlier = {name: 0 if entry is None else entry.version for name, entry in before.items()}
        return {"versions": versions, "before": earlier, "deleted": gone, "url": self._controller.front.url}

    def _others(self, specs: Sequence[ApplicationSpec]) -> list[str]:
        named = {spec.name for spec in specs}
        return sorted(name for name, _ in self._controller.registry.living() if name not in named)

    async def _start_proxies(self, wanted: Change) -> HTTPOptions | None:
        """Start or change the proxies; return what to go back to where the rest fails."""
        front = self._controller.front
        back = front.options if front.url and wanted.explicit else None
        routed = any(spec.route_prefix is not None for spec in wanted.applications)
        if wanted.explicit or (routed and not front.url):
            await front.start(overlaid(wanted.http, [*wanted.explicit, *wanted.preferred]), set(wanted.explicit))
        return back
