"""What an application has been: its last versions, and which of them to go back to."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct, structs

from .desired import ApplicationSpec

__all__ = ["CONTROLLER", "By", "Entry", "earlier", "extend", "prove"]


class By(Struct, frozen=True):
    """Who made a change."""

    #: ``user@host``.
    owner: str = ""
    #: Id of the Dask client, which holds its name.
    client: str = ""


#: The controller itself: automatic rollbacks.
CONTROLLER = By("dask_serve")


class Entry(Struct, frozen=True, kw_only=True):
    """One version of an application: what was desired, by whom, since when and why."""

    version: int
    spec: ApplicationSpec
    by: By
    #: Seconds since 1970.
    time: float
    reason: str
    #: All its replicas were ready once.
    ran: bool = False


def extend(
    entries: Sequence[Entry], spec: ApplicationSpec, by: By, reason: str, now: float, *, after: int = 0, keep: int = 10
) -> tuple[Entry, ...]:
    """Return the versions with one more at the end, and without the oldest ones.

    Parameters
    ----------
    entries : sequence of Entry
        The versions so far, the oldest first.
    spec, by, reason, now
        Of the new one.
    after : int
        The new version is higher than this one too.
    keep : int
        How many to keep. The last one that ran is kept beyond that: ten failed attempts do not take away what worked.
    """
    last = max(entries[-1].version if entries else 0, after)
    new = Entry(version=last + 1, spec=spec, by=by, time=now, reason=reason)
    kept = (*entries, new)[-keep:]
    if not any(entry.ran for entry in kept):
        kept = (*[entry for entry in entries if entry.ran][-1:], *kept)
    return kept


def prove(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """Return the versions with a note at the present one that it ran."""
    return (*entries[:-1], structs.replace(entries[-1], ran=True))


def earlier(entries: Sequence[Entry]) -> Entry | None:
    """Return the last version that ran and was another than the present one; None where there is none."""
    if not entries:
        return None
    current = entries[-1].spec
    return next((entry for entry in reversed(entries) if entry.ran and entry.spec != current), None)
