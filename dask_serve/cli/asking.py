"""Asking all workers of a cluster at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["Answer", "ask_workers"]

#: Seconds that workers have to answer: one that hangs must not hide what the others say.
ANSWER = 5.0


class Answer(NamedTuple):
    """What a worker answered."""

    worker: str
    #: None where there was an error.
    value: Any
    error: BaseException | None
    #: When it was asked and when it had answered, in seconds since 1970.
    asked: float
    answered: float


def ask_workers(client: Client, function: Callable[..., Any], *arguments: Any) -> list[Answer]:
    """Call a function of this package in each worker; each is asked by itself."""

    async def ask(worker: str) -> Answer:
        asked = time.time()
        try:
            running = client._run(function, *arguments, workers=[worker], on_error="return")
            value = (await asyncio.wait_for(running, ANSWER)).get(worker)
        except (OSError, asyncio.TimeoutError) as error:
            value = error
        broken = value if isinstance(value, BaseException) else None
        return Answer(worker, None if broken is not None else value, broken, asked, time.time())

    async def ask_all() -> list[Answer]:
        workers = await client.scheduler.ncores()
        return list(await asyncio.gather(*map(ask, workers)))

    answers: list[Answer] = client.sync(ask_all)
    return answers
