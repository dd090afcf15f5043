"""Code on its way from a session to the controller."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .asking import ask_again
from .pieces import AT_ONCE, cut

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["send_code"]


async def send_code(client: Client, code: Mapping[str, bytes], missing: Iterable[str]) -> dict[str, Any]:
    """Return what stands for the code of ``missing`` in `serve_deploy` and `serve_apply`.

    That is the code itself, or if it is large the name and the size of its upload.
    """
    return {revision: await _upload(client, code[revision]) for revision in missing}


async def _upload(client: Client, blob: bytes) -> Any:
    parts = cut(blob)
    if len(parts) == 1:
        return parts[0]
    upload = uuid.uuid4().hex

    async def send(number: int) -> None:
        where = {"upload": upload, "number": number, "client": str(client.id)}
        await ask_again(client, "serve_upload", part=parts[number], **where)

    for start in range(0, len(parts), AT_ONCE):
        await asyncio.gather(*(send(number) for number in range(start, min(start + AT_ONCE, len(parts)))))
    return upload, len(parts)
