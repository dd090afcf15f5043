"""Generators of user code, as one kind of asynchronous source that can be closed at any moment.

Leaving a generator to the garbage collector would run its ``finally`` some time later, on whatever thread; here it has
run when the request is answered.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator
from contextlib import asynccontextmanager, suppress
from typing import Any

__all__ = ["END", "opened"]

#: What a source returns after its last chunk.
END: Any = object()

Next = Callable[[], Coroutine[Any, Any, Any]]
InPool = Callable[[Callable[[], Any]], Coroutine[Any, Any, Any]]


@asynccontextmanager
async def opened(generator: Any, in_pool: InPool) -> AsyncIterator[Next]:
    """Give the coroutine function that returns the next chunk, or `END`; close the generator at the end.

    Parameters
    ----------
    generator : generator or async generator
    in_pool : coroutine function
        Runs a function on the replica's pool, where the steps of a plain generator belong as any ``def`` does.
    """
    source = _Async(generator) if inspect.isasyncgen(generator) else _Blocking(generator, in_pool)
    try:
        yield source.next
    finally:
        await source.close()


class _Async:
    """An asynchronous generator."""

    def __init__(self, generator: Any) -> None:
        self._generator: AsyncGenerator[Any, None] = generator
        self.close = generator.aclose

    async def next(self) -> Any:
        return await anext(self._generator, END)


class _Blocking:
    """A plain generator, each step of it on the pool."""

    def __init__(self, generator: Generator[Any, None, None], in_pool: InPool) -> None:
        self._generator = generator
        self._in_pool = in_pool
        self._closed = False

    async def next(self) -> Any:
        return await self._in_pool(self._step)

    async def close(self) -> None:
        self._closed = True
        await self._in_pool(self._close)

    def _step(self) -> Any:
        # The request may have been cancelled while the step waited for a thread, or ran; a generator that runs can only
        # be closed by the thread that runs it.
        if self._closed:
            return END
        chunk = next(self._generator, END)
        if self._closed:
            self._close()  # type: ignore[unreachable]  # set meanwhile, by another thread
        return chunk

    def _close(self) -> None:
        with suppress(ValueError):  # it runs: the step that runs it closes it
            self._generator.close()
