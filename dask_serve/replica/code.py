"""Code, and files that go with it, on their way from the controller: large ones come in parts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

__all__ = ["fetch_code"]

#: Parts that are under way at a time.
FETCHED = 4


async def fetch_code(ask: Callable[[int], Awaitable[dict[str, Any] | None]]) -> tuple[dict[str, Any], Any]:
    """Return the controller's last answer, and what was asked for; None if it is not there.

    Parameters
    ----------
    ask : coroutine function
        Asks the controller for the part of a number.
    """
    reply = await ask(0) or {}
    if "code" not in reply or reply["parts"] == 1:
        return reply, reply.get("code")
    code = bytearray(reply["code"])
    for start in range(1, reply["parts"], FETCHED):
        numbers = range(start, min(start + FETCHED, reply["parts"]))
        for answer in await asyncio.gather(*map(ask, numbers)):
            if not answer or "code" not in answer:
                return answer or {}, None
            # One by one: a copy of all at once would hold the interpreter.
            code += answer["code"]
    return reply, code
