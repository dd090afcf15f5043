"""What decorated methods keep in the object that they belong to, for as long as it lives."""

from __future__ import annotations

import threading
from typing import Any

from ..exceptions import ConfigError

__all__ = ["forget_closed", "kept_by"]

_ATTRIBUTE = "_serve_kept"
_making = threading.Lock()


class _Kept:
    """What is kept in one object: by decorated method and by place, which is a replica, an event loop or None."""

    def __init__(self, owner: int) -> None:
        self.owner = owner
        self.things: dict[tuple[Any, Any], Any] = {}

    def __reduce__(self) -> Any:
        # Locks and loops do not travel; who unpickles or copies the object gets new ones.
        return _Kept, (0,)


def kept_by(instance: Any, what: str) -> dict[tuple[Any, Any], Any]:
    """Return what an object keeps.

    Raises
    ------
    ConfigError
        It can keep nothing; ``what`` says who wanted that.
    """
    if isinstance(instance, type):
        raise ConfigError(
            f"{what} is for methods of objects and for functions, not for the class methods of {instance.__name__}"
        )
    try:
        attributes = vars(instance)
    except TypeError:
        raise ConfigError(
            f"{what} keeps its state in the object, and {type(instance).__name__} has __slots__ and no __dict__; add "
            '"__dict__" to __slots__'
        ) from None
    found = attributes.get(_ATTRIBUTE)
    # A copy of the object has the original's.
    if not isinstance(found, _Kept) or found.owner != id(instance):
        with _making:
            found = attributes.get(_ATTRIBUTE)
            if not isinstance(found, _Kept) or found.owner != id(instance):
                found = attributes[_ATTRIBUTE] = _Kept(id(instance))
    return found.things


def forget_closed(things: dict[Any, Any]) -> None:
    """Forget what belongs to event loops that are closed."""
    for key in list(things):
        if getattr(key[1], "is_closed", bool)():
            del things[key]
