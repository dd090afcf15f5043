"""What waits at a router, in the order in which it leaves.

Online requests go before background ones, nearly always, and urgent ones of them before the others: those that are
admitted even where results have no room, because they leave none, or make room.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from itertools import islice
from typing import Any

__all__ = ["BACKGROUND_EVERY", "Backlog"]

#: While both wait, one of this many requests that leave is a background one.
BACKGROUND_EVERY = 10


#: A request for a model that is not loaded where there is room lets so many others go first; so many are looked at.
OVERTAKEN_AT_MOST, LOOKED_AT = 32, 32


class Backlog:
    """Requests that wait, each class first in, first out.

    Requests that are given up stay until they get to the head; whoever gives them up calls `prune` where they pile up.
    """

    __slots__ = ("_background", "_online", "_overtaken", "_passed", "_urgent")

    def __init__(self) -> None:
        self._urgent: deque[Any] = deque()
        self._online: deque[Any] = deque()
        self._background: deque[Any] = deque()
        #: Online requests that have left since a background one did, while one waited.
        self._passed = 0
        #: Requests for loaded models that have passed the one at the head, for which one has to be loaded.
        self._overtaken = 0

    def __len__(self) -> int:
        return len(self._urgent) + len(self._online) + len(self._background)

    def __iter__(self) -> Iterator[Any]:
        """Those that were not given up."""
        for calls in (self._urgent, self._online, self._background):
            for call in calls:
                if not call.dropped:
                    yield call

    def append(self, call: Any) -> None:
        """Take a new request."""
        self._class_of(call).append(call)

    def put_back(self, call: Any) -> None:
        """Take back a request that has been at the head before: in front of all that are younger."""
        calls = self._class_of(call)
        place = 0
        # Several that come back one after the other keep their order. Whoever waits for the first of them may be the
        # one who makes room for the others.
        while place < len(calls) and calls[place].since < call.since:
            place += 1
        calls.insert(place, call)

    def _class_of(self, call: Any) -> deque[Any]:
        if call.background:
            return self._background
        return self._urgent if call.urgent else self._online

    @property
    def urgent(self) -> bool:
        """The next request is urgent, or may be."""
        background = _live(self._background)
        return bool(_live(self._urgent) or (background and background[0].urgent))

    @property
    def background(self) -> bool:
        """The next request is a background one; False also where none waits."""
        return bool(_live(self._background)) and (
            self._passed >= BACKGROUND_EVERY - 1 or not (_live(self._urgent) or _live(self._online))
        )

    @property
    def prefers(self) -> frozenset[str] | None:
        """Where the next background request would best go."""
        background = _live(self._background)
        prefers: frozenset[str] | None = background[0].prefers if background else None
        return prefers

    def pop(self, models: Collection[str] = ()) -> Any:
        """Return the next request that was not given up; there must be one.

        Parameters
        ----------
        models : collection of str
            Those that are loaded where it goes: a request for one of them may pass a few that are for others.
        """
        online, background = _live(self._urgent) or _live(self._online), _live(self._background)
        if online and background and self._passed < BACKGROUND_EVERY - 1:
            self._passed += 1
            calls = online
        else:
            self._passed = 0
            calls = background or online
        return self._pop_for(models, calls) if models and calls[0].model_id else calls.popleft()

    def _pop_for(self, models: Collection[str], calls: deque[Any]) -> Any:
        if calls[0].model_id not in models and self._overtaken < OVERTAKEN_AT_MOST:
            for place, call in enumerate(islice(calls, LOOKED_AT)):
                if call.model_id in models and not call.dropped:
                    self._overtaken += 1
                    del calls[place]
                    return call
        self._overtaken = 0
        return calls.popleft()

    def since(self) -> float:
        """When the oldest request came that was not given up; there must be one."""
        classes = (_live(self._urgent), _live(self._online), _live(self._background))
        return float(min(calls[0].since for calls in classes if calls))

    def prune(self) -> None:
        """Forget those that were given up."""
        self._urgent = deque(call for call in self._urgent if not call.dropped)
        self._online = deque(call for call in self._online if not call.dropped)
        self._background = deque(call for call in self._background if not call.dropped)

    def clear(self) -> None:
        """Forget all."""
        self._urgent.clear()
        self._online.clear()
        self._background.clear()


def _live(calls: deque[Any]) -> deque[Any]:
    while calls and calls[0].dropped:
        calls.popleft()
    return calls
