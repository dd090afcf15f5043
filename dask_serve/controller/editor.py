"""Changes of what is desired: one after the other, each checked, then saved, then made."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distributed.protocol import to_serialize

from ..config import HTTPOptions
from ..exceptions import ApplicationNotFoundError, ConfigError
from ..policy.desired import ApplicationSpec, deployment_id, with_replicas
from ..policy.history import By, Entry, earlier
from ..policy.reconcile import ATTEMPTS, Attempts
from .events import brief
from .history import signed
from .pieces import Parts
from .registry import Registry
from .store import HTTP, Store, StoreError
from .targets import Targets

__all__ = ["Editor"]

logger = logging.getLogger("dask_serve.controller")


class Editor:
    """Changes what is desired, for any number of sessions at the same time.

    Whoever comes last wins, for each application as a whole. A change that cannot be saved is not made.

    Parameters
    ----------
    registry : Registry
        What is desired.
    wake : callable
        Called after each change.
    note : callable
        Told of each change: kind, subject and text, as `Events.add`.
    """

    def __init__(
        self, registry: Registry, wake: Callable[[], None], note: Callable[[str, str, str], None] = lambda *_: None
    ) -> None:
        self.registry = registry
        self._note = note
        self.history = registry.history
        #: What is wrong with the state file, for the status.
        self.trouble: list[str] = []
        self.store: Store | None = None
        self._targets = Targets(registry)
        self._wake = wake
        self._lock = asyncio.Lock()
        self._loads: dict[str, asyncio.Task[Any]] = {}
        self._flush: asyncio.Task[None] | None = None

    # -- the state file

    def open(self, store: Store) -> HTTP | None:
        """Take over what a state file holds, and save every change there from now on; return the proxies that ran."""
        try:
            saved = store.open()
        except StoreError as error:
            self.trouble = [f"{error}. Nothing is saved: applications do not come back when the scheduler does"]
            logger.error(self.trouble[0])
            return None
        self.store = store
        self.history.stored = saved.code
        self.trouble = saved.trouble
        for text in self.trouble:
            logger.error("%s", text)
        for app, entries in saved.versions.items():
            self._restore(app, entries)
        self._targets.restore(store, saved.targets)
        if saved.versions:
            names = ", ".join(map(repr, sorted(saved.versions)))
            logger.warning("applications of the last scheduler are restored from %s: %s", store.path, names)
        return saved.http

    def _restore(self, app: str, entries: tuple[Entry, ...]) -> None:
        self.history.put(app, entries)
        spec = entries[-1].spec
        self.registry.restore(spec)
        for deployment in spec.deployments:
            missing = ""
            if deployment.keys:
                missing = (
                    f"the Dask values that are bound into it ({', '.join(map(str, deployment.keys))}) were lost with "
                    "the last scheduler: compute them again, and deploy again"
                )
            elif not self.history.stored.issuperset(deployment.needs):
                missing = "its code is not in the state file: deploy it again"
            if missing:
                # Nothing to be tried: it has failed before it began.
                key = deployment_id(app, deployment.name), deployment.revision
                self.registry.attempts[key] = Attempts(failures=ATTEMPTS, last=time.monotonic(), message=missing)

    async def close(self, *, remove: bool = False) -> None:
        """Write what is left to be written."""
        if self._flush is not None:
            await asyncio.gather(self._flush, return_exceptions=True)
        await self._targets.close()
        if self.store is not None:
            await self.store.close(remove=remove)

    def flush(self) -> None:
        """Save what the controller changed by itself; does not wait for it."""
        self._targets.look()
        if not self.history.unsaved:
            return
        if self.store is None:
            self.history.unsaved.clear()
        elif self._flush is None or self._flush.done():
            self._flush = asyncio.get_running_loop().create_task(self._save_unsaved())

    async def _save_unsaved(self) -> None:
        while self.history.unsaved:
            async with self._lock:
                app = self.history.unsaved.pop()
                try:
                    await self._save(app, self.history.of(app))
                except StoreError as error:
                    logger.error("application %r: %s", app, error)

    async def _save(self, app: str, entries: Sequence[Entry]) -> None:
        await self._save_all({app: entries}, {})

    async def _save_all(self, versions: Mapping[str, Sequence[Entry]], code: Mapping[str, Any]) -> None:
        if self.store is None:
            return
        keep = self.history.revisions(but=versions.keys())
        specs = [spec for entries in versions.values() for entry in entries for spec in entry.spec.deployments]
        keep |= {name for spec in specs for name in spec.needs}
        await self.store.save_all(versions, {**self.registry.code, **code}, keep)
        self.history.stored = self.store.code

    async def save_http(self, options: HTTPOptions | None, explicit: Sequence[str] = ()) -> None:
        """Save what proxies there are."""
        if self.store is not None:
            try:
                await self.store.save_http(options, explicit)
            except StoreError as error:
                # They run, and that is what was asked for.
                logger.error("%s", error)

    # -- applications

    def lacks(self, revisions: Sequence[str], code: Mapping[str, Any] | None = None) -> list[str]:
        """Return those revisions whose code is neither here nor on disk."""
        return [r for r in revisions if not (r in (code or ()) or r in self.registry.code or r in self.history.stored)]

    async def deploy(self, spec: ApplicationSpec, code: Mapping[str, Any], by: By, reason: str = "deployed") -> int:
        """Make an application as it is given; return the number of its version.

        Raises
        ------
        ConfigError
            It cannot be; nothing has changed.
        StoreError
            It could not be saved; nothing has changed.
        """
        async with self._lock:
            return (await self._replace([spec], code, by, reason))[spec.name]

    async def deploy_all(
        self,
        specs: Sequence[ApplicationSpec],
        code: Mapping[str, Any],
        by: By,
        reason: str,
        *,
        gone: Sequence[str] = (),
    ) -> dict[str, int]:
        """Make some applications as they are given, and take others away, all of that or nothing.

        Parameters
        ----------
        specs : sequence of ApplicationSpec
            What they are to be.
        code, by, reason
            As of `deploy`.
        gone : sequence of str
            Names of those that are to go; nobody waits for the end of their replicas.

        Returns
        -------
        dict
            The number of the present version of each of ``specs``.

        Raises
        ------
        ConfigError, StoreError
            As of `deploy`.
        """
        async with self._lock:
            return await self._replace(specs, code, by, reason, gone)

    def check(self, specs: Sequence[ApplicationSpec], code: Mapping[str, Any], gone: Sequence[str] = ()) -> None:
        """Raise ConfigError where `deploy_all` would."""
        routes = {name: route for name, route in self.registry.routes().items() if name not in gone}
        routes |= {spec.name: spec.route_prefix for spec in specs}
        for spec in specs:
            self.registry.check(spec, code, routes)

    async def _replace(
        self,
        specs: Sequence[ApplicationSpec],
        code: Mapping[str, Any],
        by: By,
        reason: str,
        gone: Sequence[str] = (),
        *,
        kind: str = "deployed",
    ) -> dict[str, int]:
        self.check(specs, code, gone)
        while True:
            before = {spec.name: self.history.of(spec.name) for spec in specs}
            # The same again is no other version: it belongs to whoever made it.
            new = {
                spec.name: self.history.extended(spec, by, reason)
                for spec in specs
                if not before[spec.name] or before[spec.name][-1].spec != spec
            }
            if new or gone:
                await self._save_all({**new, **dict.fromkeys(gone, ())}, code)
            # The controller may have changed one itself while this was written.
            if all(self.history.of(name) is entries for name, entries in before.items()):
                break
        after = {**before, **new}
        for name in gone:
            if name in self.registry.applications:
                self.registry.delete(name)
            self.history.remove(name, by)
            self._note("deleted", name, f"deleted by {by.owner or 'unknown'}")
        # Whoever takes over a route comes after those that had it.
        for spec in specs:
            self.history.put(spec.name, after[spec.name])
            self.registry.replace(spec, code)
            if spec.name in new:
                text = f"version {new[spec.name][-1].version}, {reason} by {by.owner or 'unknown'}"
                self._note(kind, spec.name, text)
        self._wake()
        return {name: entries[-1].version for name, entries in after.items()}

    async def rollback(self, app: str, version: int | None, by: By, has_key: Callable[[str], bool]) -> int:
        """Make an application again what it was; return the number of the version that this is.

        Raises
        ------
        ApplicationNotFoundError
            There is none of that name.
        ConfigError
            There is no such version, or it cannot come back.
        """
        async with self._lock:
            entry = self._earlier(app, version)
            gone = [key for spec in entry.spec.deployments for key in spec.keys if not has_key(key)]
            if gone:
                raise ConfigError(
                    f"version {entry.version} of application {app!r} cannot come back: the Dask values that were bound "
                    f"into it are gone ({', '.join(gone)})"
                )
            if self.lacks([name for spec in entry.spec.deployments for name in spec.needs]):
                raise ConfigError(
                    f"version {entry.version} of application {app!r} cannot come back: its code was dropped to save "
                    "memory; with a state file all of it is kept"
                )
            return (await self._replace([entry.spec], {}, by, f"rolled back to {entry.version}", kind="rolled_back"))[
                app
            ]

    async def scale(self, app: str, deployment: str, number: int, by: By) -> int:
        """Change how many replicas a deployment has; return the number of the version that this is.

        Raises
        ------
        ApplicationNotFoundError
            There is no such application or deployment.
        ConfigError
            The deployment follows its load, or the number is none.
        """
        async with self._lock:
            current = self.history.current(app)
            application = self.registry.applications.get(app)
            if current is None or application is None or application.deleting:
                raise ApplicationNotFoundError(self.not_found(app))
            spec, before = with_replicas(application.spec, deployment, number)
            # It stays the application of the session that deployed it, and ends with that.
            by = By(by.owner, current.by.client)
            return (
                await self._replace([spec], {}, by, f"scaled {deployment} from {before} to {number}", kind="scaled")
            )[app]

    def _earlier(self, app: str, version: int | None) -> Entry:
        entries = self.history.of(app)
        if not entries:
            raise ApplicationNotFoundError(self.not_found(app))
        known = ", ".join(str(entry.version) for entry in entries)
        if version is None:
            found = earlier(entries)
            if found is None:
                raise ConfigError(
                    f"application {app!r} has no other version that ran; versions: {known}. One of them can be named "
                    "with version="
                )
            return found
        for entry in entries:
            if entry.version == version:
                return entry
        raise ConfigError(f"application {app!r} has no version {version}; versions: {known}")

    async def delete(self, app: str, by: By, *, own: bool = False) -> bool:
        """Take an application away; return once its replicas have ended, and whether it was taken away.

        Parameters
        ----------
        app : str
            Its name.
        by : By
            Who wants it.
        own : bool
            Only if its present version is theirs.

        Raises
        ------
        ApplicationNotFoundError
            There is none of that name.
        """
        async with self._lock:
            application = self.registry.applications.get(app)
            if application is None:
                raise ApplicationNotFoundError(self.not_found(app))
            current = self.history.current(app)
            if own and current is not None and current.by.client != by.client:
                return False
            await self._save(app, ())
            replicas = self.registry.delete(app)
            self.history.remove(app, by)
            self._note("deleted", app, f"deleted by {by.owner or 'unknown'}")
            self._wake()
        replaced = asyncio.ensure_future(application.replaced.wait())
        try:
            for replica in replicas:
                ended = asyncio.ensure_future(replica.ended.wait())
                await asyncio.wait({ended, replaced}, return_when=asyncio.FIRST_COMPLETED)
                # Deployed again at once, it may have taken this one over.
                if replica.state == "draining":
                    await ended
                ended.cancel()
        finally:
            replaced.cancel()
        return True

    def told(self, app: str) -> str:
        """Say what became of an application, by whom and when."""
        entry = self.history.current(app)
        if entry is not None:
            return f"version {entry.version}, {signed(entry.reason, entry.by.owner, entry.time)}"
        gone = self.history.answer(app).deleted
        return "" if gone is None else signed("it was deleted", gone.by.owner, gone.time)

    def not_found(self, app: str) -> str:
        """Say that there is no such application, and why where that is known."""
        known = ", ".join(map(repr, sorted(self.registry.applications))) or "none"
        told = self.told(app)
        return f"there is no application {app!r}{f' ({told})' if told else ''}; applications: {known}"

    def taken_back(self, app: str, spec: ApplicationSpec, why: str) -> None:
        """Note that the controller gave up ``spec``, and that the application is again what the registry has now."""
        if self.history.current(app) is not None:
            self.history.note(self.registry.applications[app].spec, f"automatic rollback: {why}")
        self._note("taken_back", app, f"the update failed and is taken back: {brief(why)}")

    # -- code

    async def code(self, revision: str) -> Any:
        """Return the code of a revision, from memory or from disk; None where it is nowhere.

        Raises
        ------
        StoreError
            It cannot be read.
        """
        found = self.registry.code.get(revision)
        if found is not None or self.store is None or revision not in self.history.stored:
            return found
        # Many replicas ask at the same time.
        load = self._loads.get(revision)
        if load is None:
            load = self._loads[revision] = asyncio.get_running_loop().create_task(self._load(revision, self.store))
            load.add_done_callback(lambda _: self._loads.pop(revision, None))
        return await asyncio.shield(load)

    async def _load(self, revision: str, store: Store) -> Any:
        blob = Parts([to_serialize(part) for part in await store.load(revision)])
        # Until the registry is tidied, if no replica needs it.
        self.registry.code[revision] = blob
        return blob
