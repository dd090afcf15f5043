"""The result store of a worker's process: large results wait here until they are fetched, chained or promoted."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from ..wire.frames import Buffer

__all__ = ["INLINE_BELOW", "ResultStore", "stores", "taken_here"]

#: Results of at least this many bytes stay in the store; smaller ones travel in the answer.
INLINE_BELOW = 64 * 1024


class ResultStore:
    """Serialised results by name. They belong to the process: they outlive their replica.

    Every method is a few dictionary operations, so any thread may call it.
    """

    def __init__(self) -> None:
        self._results: dict[str, Sequence[Buffer]] = {}
        #: By name: the names that a caller has here.
        self._owners: dict[str, set[str]] = {}

    def put(self, parts: Sequence[Buffer]) -> str:
        """Keep a result and return its name."""
        name = uuid.uuid4().hex
        self._results[name] = parts
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
        return self._results.get(name)

    def drop(self, name: str) -> None:
        """Free a result; one that is gone already is no error."""
        self._results.pop(name, None)
        owned = self._owners.pop(name, None)
        if owned is not None:
            owned.discard(name)

    def __len__(self) -> int:
        return len(self._results)

    @property
    def nbytes(self) -> int:
        """Bytes of all results."""
        return sum(len(part) for parts in list(self._results.values()) for part in parts)


#: The stores of this process by incarnation: a result that is here is taken without a connection.
stores: dict[str, ResultStore] = {}


def taken_here(process: str, name: str) -> Sequence[Buffer] | None:
    """Return a result that is in a store of this process; None when it is elsewhere.

    Its buffers are copied: what is made of them may be written to, and others may still take the result.
    """
    store = stores.get(process)
    parts = None if store is None else store.get(name)
    return None if parts is None else [parts[0], *map(bytearray, parts[1:])]
