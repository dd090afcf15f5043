"""The values of refs and Dask futures among the arguments, straight from the processes that hold them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from ..wire import payloads
from ..wire.messages import Attachment
from .execution import Execution

if TYPE_CHECKING:
    from .user import UserCode

__all__ = ["fetch_all"]


async def fetch_all(execution: Execution) -> list[Any]:
    """Return the values of a call's attachments, on the user loop."""
    attachments = execution.call.attachments
    inline = list(execution.parts[len(execution.parts) - sum(other.parts for other in attachments) :])
    values: list[Any] = []
    elsewhere: dict[int, Attachment] = {}
    for number, attachment in enumerate(attachments):
        if attachment.parts:
            values.append(payloads.loads(inline[: attachment.parts]))
            del inline[: attachment.parts]
        else:
            values.append(None)
            elsewhere[number] = attachment
    if elsewhere:
        user = execution.core.user
        fetched = await asyncio.gather(*(_fetch(user, attachment) for attachment in elsewhere.values()))
        for number, value in zip(elsewhere, fetched, strict=True):
            values[number] = value
    return values


async def _fetch(user: UserCode, attachment: Attachment) -> Any:
    if attachment.key is not None:
        return await user.gather(_as_key(attachment.key))
    fetched = user.door.run(user.door.fetch(attachment.process, attachment.door, attachment.name))
    return payloads.loads(await asyncio.wrap_future(fetched))


def _as_key(key: Any) -> Any:
    """Return a Dask key as it was before it travelled: its tuples became lists."""
    return tuple(map(_as_key, key)) if isinstance(key, list) else key
