"""What a handle with ``sync=False`` returns before it is awaited."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

__all__ = ["Assigned"]


class Assigned:
    """What a handle with ``sync=False`` returns: awaited, it is the ref."""

    __slots__ = ("ref",)

    def __init__(self, ref: Any) -> None:
        self.ref = ref

    def __await__(self) -> Generator[Any, None, Any]:
        yield from ()
        return self.ref

    def __repr__(self) -> str:
        return f"<to be awaited for {self.ref!r}>"

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"a handle with sync=False returns what has to be awaited before {name!r} can be used: "
            "`ref = await handle.remote(...)`, then `value = await ref`"
        )
