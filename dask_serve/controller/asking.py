"""Asking the controller from a session, also while its scheduler is restarted."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from ..session.peers import ask

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["ask_again"]

#: Seconds that a scheduler may be away while a session waits, as for Dask's own clients, and between two tries.
AWAY, RETRY = 30.0, 0.2


async def ask_again(
    client: Client, op: str, again: dict[str, Any] | None = None, /, **arguments: Any
) -> dict[str, Any]:
    """Ask what may be asked twice, ``again`` with other arguments: a scheduler that went away may come back."""
    began: float | None = None
    while True:
        try:
            return await ask(client.scheduler, op, **arguments)
        except OSError:
            now = time.monotonic()
            began = began or now
            if client.status in ("closing", "closed") or now - began > AWAY:
                raise
        arguments.update(again or {})
        await asyncio.sleep(RETRY)
