"""Memory for large payloads, used again once nobody looks at it any more: fresh pages cost more than copying does.

The system clears each page before a process sees it, one by one as they are touched: 1 to 2 ms per MB, where copying
takes 0.05. And malloc gives large blocks back when they are freed, so that every large payload has fresh pages; below
Dask's nannies (``MALLOC_TRIM_THRESHOLD_``) it always does. So blocks are mapped here, in huge pages where the system
has them, and what nobody refers to any more lies idle for a while and is taken for the next payload of that size.

A block is idle once its owner is gone: the object that all views of it (memoryviews, arrays) refer to. That is told by
a finaliser, which may run in any thread between any two steps of any code: so nothing here takes a lock.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import mmap
import os
import time
import weakref
from collections import deque

__all__ = ["IDLE_LIMIT", "IDLE_SECONDS", "allocate", "copied", "idle_bytes", "limit_idle"]

#: Smaller ones come from malloc, which by default does not map those by themselves either.
POOLED_FROM = 128 * 1024
#: The most bytes that lie idle in a process.
IDLE_LIMIT = 256 << 20
#: Seconds until what lies idle is given back to the system.
IDLE_SECONDS = 5.0

_PAGE = 4096
_HUGE = 2 << 20


def allocate(nbytes: int) -> memoryview:
    """Return writable memory, whose content is anything.

    It is used again for something else when neither this view nor anything made of it is left.

    Parameters
    ----------
    nbytes : int
        How many bytes.

    Raises
    ------
    MemoryError
        The system has not that much.
    """
    if nbytes < POOLED_FROM:
        return memoryview(bytearray(nbytes))
    size = _rounded(nbytes)
    block = _pool.take(size) or _map(size)
    if block is None:
        return memoryview(bytearray(nbytes))
    owner = (ctypes.c_char * size).from_buffer(block)
    # At the end of the interpreter the system takes everything back.
    weakref.finalize(owner, _give_back, size, block).atexit = False
    return memoryview(owner).cast("B")[:nbytes]


def copied(data: bytes | bytearray | memoryview) -> bytearray | memoryview:
    """Return a writable copy."""
    if len(data) < POOLED_FROM:
        return bytearray(data)
    copy = allocate(len(data))
    copy[:] = data
    return copy


def idle_bytes() -> int:
    """Return how many bytes lie idle in this process."""
    return _pool.nbytes()


def limit_idle(nbytes: int) -> None:
    """Let no more than this lie idle from now on; what another part of the process asked for counts if it is less."""
    _pool.limit = min(_pool.limit, nbytes)
    _pool.trim(0.0)


def _rounded(nbytes: int) -> int:
    """Return the size of blocks for so many bytes: four sizes between two powers of two, of whole pages.

    What is not touched of a block takes no memory, apart from the rest of a page. Linux begins a mapping at a huge page
    if it consists of such.
    """
    step = 1 << ((nbytes - 1).bit_length() - 3)
    step = max(step, _HUGE if nbytes >= _HUGE else _PAGE)
    return -(-nbytes // step) * step


def _map(size: int) -> mmap.mmap | None:
    """Return a fresh block; None where there is no such thing, or no more of it."""
    try:
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (AttributeError, OSError, ValueError):  # Windows has no such mappings
        return None
    if size >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        # Without huge pages it is as good, only slower the first time.
        with contextlib.suppress(OSError):
            block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _give_back(size: int, block: mmap.mmap) -> None:
    # Whatever is the pool now: after a fork it is another one.
    _pool.put(size, block)


class _Pool:
    """Idle blocks by size.

    All that several threads do at once is one step of a deque; there is one for each size from the beginning, as a
    dictionary must not grow while it is looked through. The limit is checked before a block is put, so that as many
    threads as put one at the same time may exceed it; `trim` finds that.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._idle: dict[int, deque[tuple[float, mmap.mmap]]] = {}
        size = POOLED_FROM
        while size <= IDLE_LIMIT:
            self._idle[size] = deque()
            size = _rounded(size + 1)
        self._tended = False

    def nbytes(self) -> int:
        return sum([size * len(blocks) for size, blocks in self._idle.items()])

    def take(self, size: int) -> mmap.mmap | None:
        """Return the block of this size that was used last: its pages may still be in a cache."""
        blocks = self._idle.get(size)
        try:
            return blocks.pop()[1] if blocks else None
        except IndexError:  # another thread was faster
            return None

    def put(self, size: int, block: mmap.mmap) -> None:
        """Keep a block for the next one; without room it goes back to the system."""
        blocks = self._idle.get(size)
        if blocks is None or self.nbytes() + size > self.limit:
            return
        blocks.append((time.monotonic(), block))
        if not self._tended:
            self._tended = True
            try:
                # Not `threading.Thread`, which takes locks that this thread may hold already.
                _thread.start_new_thread(self._tend, ())
            except RuntimeError:  # the interpreter ends, or there are too many threads
                self._tended = False

    def trim(self, before: float) -> None:
        """Give back to the system what has been idle since before that time, and what is above the limit."""
        for blocks in self._idle.values():
            try:
                while blocks and (blocks[0][0] < before or self.nbytes() > self.limit):
                    blocks.popleft()
            except IndexError:  # another thread took the last one of that size
                continue

    def _tend(self) -> None:
        """Be the thread that gives back in time; it ends when nothing is idle."""
        while True:
            time.sleep(IDLE_SECONDS / 4)
            self.trim(time.monotonic() - IDLE_SECONDS)
            if not self.nbytes():
                # The flag first: what is put after the second look starts another thread.
                self._tended = False
                if not self.nbytes():
                    return
                self._tended = True


_pool = _Pool(IDLE_LIMIT)


def _after_fork() -> None:
    """Begin anew in a child: the parent's idle blocks would be copied page by page, and its thread is not here."""
    global _pool
    _pool = _Pool(_pool.limit)


os.register_at_fork(after_in_child=_after_fork)
