"""The result store of a worker's process: large results wait here until they are fetched, chained or promoted."""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..wire import payloads
from ..wire.frames import Buffer
from ..wire.memory import copied

__all__ = ["Fetched", "ResultStore", "stores", "taken_here"]


class Fetched(NamedTuple):
    """A stored result, as it was fetched."""

    parts: Sequence[Buffer]
    #: The store has little room left: its owner should keep what it fetched, and release the name.
    tight: bool


class ResultStore:
    """Serialised results by name. They belong to the process: they outlive their replica.

    Any thread may call any method; none takes a lock, since finalisers call `drop`. What came and went is noted in a
    queue, and added up by the reader.

    Attributes
    ----------
    limit : int or None
        Bytes from which on new calls have to wait.
    freed : callable or None
        Called when a result is dropped, in the thread that drops it.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.freed: Callable[[], None] | None = None
        #: Changes since the beginning, to see whether anything happens. A lost count does no harm.
        self.events = 0
        #: Results that tasks of this process took over for Dask.
        self.promoted = 0
        self._results: dict[str, Sequence[Buffer]] = {}
        #: By name: the names that a caller has here.
        self._owners: dict[str, set[str]] = {}
        self._changes: deque[int] = deque()
        self._settled = 0

    def put(self, parts: Sequence[Buffer]) -> str:
        """Keep a result and return its name."""
        name = uuid.uuid4().hex
        self._results[name] = parts
        self._changes.append(payloads.size_of(parts))
        self.events += 1
        return name

    def own(self, name: str, owned: set[str]) -> None:
        """Note a result with its caller; the name leaves that set with the result."""
        owned.add(name)
        self._owners[name] = owned
        if name not in self._results:
            # The caller was faster: it has read the answer, and dropped the result already.
            self.drop(name)

    def get(self, name: str) -> Sequence[Buffer] | None:
        """Return a result, which stays; None when it is not (or no longer) here."""
        self.events += 1
        return self._results.get(name)

    def drop(self, name: str) -> None:
        """Free a result; one that is gone already is no error."""
        parts = self._results.pop(name, None)
        owned = self._owners.pop(name, None)
        if owned is not None:
            owned.discard(name)
        if parts is not None:
            self._changes.append(-payloads.size_of(parts))
            self.events += 1
            if self.freed is not None:
                self.freed()

    def __len__(self) -> int:
        return len(self._results)

    def settle(self) -> int:
        """Add up what came and went, and return the bytes that are held. For one thread only: the door's."""
        changes = self._changes
        while changes:
            self._settled += changes.popleft()
        return self._settled

    @property
    def nbytes(self) -> int:
        """Bytes of all results, as any thread may read them: not exact while others are being added up."""
        return self._settled + sum(tuple(self._changes))

    @property
    def tight(self) -> bool:
        """More than half of the limit is used."""
        return self.limit is not None and self.nbytes > self.limit / 2


#: The stores of this process by incarnation: a result that is here is taken without a connection.
stores: dict[str, ResultStore] = {}


def taken_here(process: str, name: str) -> Fetched | None:
    """Return a result that is in a store of this process; None when it is elsewhere.

    Its buffers are copied: what is made of them may be written to, and others may still take the result.
    """
    store = stores.get(process)
    parts = None if store is None else store.get(name)
    if store is None or parts is None:
        return None
    return Fetched([parts[0], *map(copied, parts[1:])], store.tight)
