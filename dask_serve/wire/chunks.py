"""Items of a stream in CHUNK frames: what is ready together leaves together.

The header of a CHUNK lists its entries: a number above 0 is one item of that many payload parts; a number below 0 is a
run of so many small items in one part: a pickled list of plain values, or a pickled tuple of pickles. Both sides count
an item with the same bytes against the window, each with at least `LEAST`, so that small items are bounded too.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from . import payloads
from .frames import Buffer
from .messages import LEAST, WINDOW_STEP

__all__ = ["FRAME", "Entry", "freeze", "pack", "thaw"]

#: Small values in one entry: all of them count as consumed when the next entry is begun.
_RUN = WINDOW_STEP // LEAST
#: A frame that has this many bytes is full; a large item has a frame to itself.
FRAME = 64 * 1024
#: A frame has at most 65,535 payload parts.
_PARTS = 60_000

_SHORT = LEAST // 4
_INT = 1 << 63
_NUMBERS = frozenset({bool, float, type(None)})
_TEXTS = frozenset({bytes, str})

#: An item on its way to the door: a plain small value as it is, another small one as a tuple of its pickle, a large one
#: as the list of its payload's parts.
Entry = Any


def freeze(item: Any, dumps: Callable[[Any], list[Buffer]] = payloads.dumps) -> tuple[Entry, int]:
    """Return an item as it is now, whatever user code does to it later, and the bytes that it counts.

    Small values of plain types cannot change, so that they need not be pickled one by one.

    Raises
    ------
    PayloadError
        It cannot be pickled.
    """
    kind = type(item)
    if kind in _NUMBERS or (kind is int and -_INT < item < _INT) or (kind in _TEXTS and len(item) <= _SHORT):
        return item, LEAST
    parts = dumps(item)
    if len(parts) == 1 and len(parts[0]) <= LEAST:
        return (parts[0],), LEAST
    return parts, max(LEAST, payloads.size_of(parts))


def pack(entries: Iterable[Entry]) -> Iterator[tuple[list[int], list[Buffer]]]:
    """Cut frozen items into frames: the entries of the header, and the payload's parts."""
    counts: list[int] = []
    parts: list[Buffer] = []
    size = 0
    for count, entry in _with_runs(entries):
        nbytes = payloads.size_of(entry)
        if counts and (size + nbytes > FRAME or len(parts) + len(entry) > _PARTS):
            yield counts, parts
            counts, parts, size = [], [], 0
        counts.append(count)
        parts.extend(entry)
        size += nbytes
    if counts:
        yield counts, parts


def _with_runs(entries: Iterable[Entry]) -> Iterator[tuple[int, Sequence[Buffer]]]:
    """Join small items of one kind."""
    run: list[Any] = []
    pickled = False
    for entry in entries:
        kind = type(entry)
        if run and (kind is list or (kind is tuple) is not pickled or len(run) == _RUN):
            yield _run(run, pickled)
            run = []
        if kind is list:
            yield len(entry), entry
        elif kind is tuple:
            pickled = True
            run.append(entry[0])
        else:
            pickled = False
            run.append(entry)
    if run:
        yield _run(run, pickled)


def _run(run: list[Any], pickled: bool) -> tuple[int, Sequence[Buffer]]:
    return -len(run), [pickle.dumps(tuple(run) if pickled else run, 5)]


def thaw(count: int, parts: Sequence[Buffer]) -> tuple[list[Any], int, Sequence[Buffer] | None]:
    """Return the items of one entry, and the bytes that they count.

    When one cannot be unpickled these are the items before it, and last the parts of the run that begins with it.

    Raises
    ------
    Exception
        The first one cannot be unpickled.
    """
    if count > 0:
        return [payloads.loads(parts)], max(LEAST, payloads.size_of(parts)), None
    run = pickle.loads(parts[0])
    if type(run) is list:
        return run, LEAST * len(run), None
    items: list[Any] = []
    try:
        items.extend(map(pickle.loads, run))
    except BaseException:
        if not items:
            raise
        return items, LEAST * len(items), [pickle.dumps(run[len(items) :], 5)]
    return items, LEAST * len(items), None
