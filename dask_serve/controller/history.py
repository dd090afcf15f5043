"""The last versions of each application, in the memory of the controller."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any

import msgspec
from msgspec import Struct

from ..policy.desired import ApplicationSpec
from ..policy.history import CONTROLLER, By, Entry, extend, prove
from .pieces import nbytes_of

__all__ = ["Deletion", "History", "Revision", "decode_history", "encode_history", "signed", "told_of", "when"]

#: Deletions that are remembered, for those who waited for what was deleted.
DELETIONS = 100
#: Bytes of code that only earlier versions need and that are held in memory, where there is no state file.
KEPT_BYTES = 256 << 20


class Revision(Struct, frozen=True, kw_only=True):
    """One version of an application, as `serve.history` returns it.

    Attributes
    ----------
    version : int
        Counts from 1; what `serve.rollback` takes.
    owner : str
        Who made it, ``user@host``; ``dask_serve`` for what the controller did by itself.
    client : str
        Id of the Dask client that was used; it holds the client's name.
    time : float
        When, in seconds since 1970.
    reason : str
        ``deployed``, ``rolled back to 3``, or why the controller did it.
    ran : bool
        All its replicas were ready once.
    current : bool
        It is the present one.
    deployments : dict
        Hashes of code, bound arguments and options by deployment: replicas restart where they differ.
    """

    version: int
    owner: str
    client: str
    time: float
    reason: str
    ran: bool
    current: bool
    deployments: dict[str, str]

    def __str__(self) -> str:
        state = ", the present one" if self.current else ""
        ran = "" if self.ran else ", never ran fully"
        return f"version {self.version}{state}: {signed(self.reason, self.owner, self.time)}{ran}"


class Deletion(Struct, frozen=True):
    """Somebody deleted an application."""

    version: int
    by: By
    time: float


class Answer(Struct, frozen=True, kw_only=True):
    """What the controller tells of an application's past."""

    revisions: list[Revision]
    deleted: Deletion | None = None


encode_history = msgspec.msgpack.Encoder().encode
decode_history = msgspec.msgpack.Decoder(Answer).decode


def told_of(entry: Entry) -> dict[str, Any]:
    """Return what the status tells of the present version of an application."""
    return {
        "version": entry.version,
        "owner": entry.by.owner,
        "client": entry.by.client,
        "deployed_at": entry.time,
        "reason": entry.reason,
    }


def when(moment: float) -> str:
    """Return a moment as local date and time."""
    return datetime.fromtimestamp(moment).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def signed(reason: str, owner: str, moment: float) -> str:
    """Say in one line what was done, by whom and when."""
    # Of a traceback the last line says most.
    first, *rest = reason.strip().splitlines() or [""]
    brief = f"{first} ... {rest[-1].strip()}" if rest else first
    return f"{brief} by {owner or 'unknown'} at {when(moment)}"


class History:
    """Versions by application; nothing here waits or saves.

    Parameters
    ----------
    keep : int, default 10
        How many versions of each application.
    """

    def __init__(self, keep: int = 10) -> None:
        self.keep = keep
        #: Applications whose versions changed here and are not saved yet.
        self.unsaved: set[str] = set()
        #: Revisions whose code is on disk.
        self.stored: frozenset[str] = frozenset()
        self._entries: dict[str, tuple[Entry, ...]] = {}
        self._deleted: dict[str, Deletion] = {}

    def of(self, app: str) -> tuple[Entry, ...]:
        """Return the versions of an application, the oldest first."""
        return self._entries.get(app, ())

    def current(self, app: str) -> Entry | None:
        """Return the present version."""
        entries = self._entries.get(app)
        return entries[-1] if entries else None

    def extended(self, spec: ApplicationSpec, by: By, reason: str) -> tuple[Entry, ...]:
        """Return what the versions will be with this one; nothing changes here."""
        gone = self._deleted.get(spec.name)
        after = 0 if gone is None else gone.version
        return extend(self.of(spec.name), spec, by, reason, time.time(), after=after, keep=self.keep)

    def put(self, app: str, entries: tuple[Entry, ...]) -> None:
        """Take over the versions of an application, which are on disk where there is one."""
        self._entries[app] = entries

    def note(self, spec: ApplicationSpec, reason: str, by: By = CONTROLLER) -> Entry:
        """Note that the controller itself changed what is desired; it is saved soon after.

        For automatic rollbacks: call it where the application's spec is replaced, then wake the reconciler.
        """
        entries = self.extended(spec, by, reason)
        self.put(spec.name, entries)
        self.unsaved.add(spec.name)
        return entries[-1]

    def prove(self, app: str) -> None:
        """Note that all replicas of the present version were ready."""
        entries = self._entries.get(app)
        if entries and not entries[-1].ran:
            self.put(app, prove(entries))
            self.unsaved.add(app)

    def remove(self, app: str, by: By) -> None:
        """Forget an application, but for who deleted it."""
        entries = self._entries.pop(app, ())
        self.unsaved.discard(app)
        if entries:
            self._deleted.pop(app, None)
            self._deleted[app] = Deletion(entries[-1].version, by, time.time())
            while len(self._deleted) > DELETIONS:
                del self._deleted[next(iter(self._deleted))]

    def answer(self, app: str) -> Answer:
        """Return what can be told of an application."""
        entries = self.of(app)
        revisions = [
            Revision(
                version=entry.version,
                owner=entry.by.owner,
                client=entry.by.client,
                time=entry.time,
                reason=entry.reason,
                ran=entry.ran,
                current=entry is entries[-1],
                deployments={spec.name: spec.revision for spec in entry.spec.deployments},
            )
            for entry in entries
        ]
        return Answer(revisions=revisions, deleted=self._deleted.get(app))

    def revisions(self, but: Collection[str] = ()) -> set[str]:
        """Return the names of the code that versions need, those of applications ``but`` left out."""
        return {
            name
            for app, entries in self._entries.items()
            if app not in but
            for entry in entries
            for spec in entry.spec.deployments
            for name in spec.needs
        }

    def kept(self, code: Mapping[str, Any], needed: set[str]) -> dict[str, Any]:
        """Return the code to hold in memory: what is needed now, and of earlier versions what is nowhere else."""
        hot = {revision: blob for revision, blob in code.items() if revision in needed}
        rest = code.keys() - hot.keys() - self.stored
        if not rest:
            return hot
        room = KEPT_BYTES
        newest = sorted((entry for entries in self._entries.values() for entry in entries), key=lambda e: -e.time)
        for entry in newest:
            for name in [name for spec in entry.spec.deployments for name in spec.needs]:
                if name in rest:
                    rest = rest - {name}
                    room -= nbytes_of(code[name])
                    if room >= 0:
                        hot[name] = code[name]
        return hot
