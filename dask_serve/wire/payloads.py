"""Payloads of calls from Python: pickle protocol 5 with the buffers out of band, cloudpickle where pickle cannot.

Each payload is serialised by itself, so that a bad argument fails its own call and no other. Buffers are copied
when they are sent: after ``handle.remote(array)`` the caller may write into the array again.

Objects that stand for values elsewhere (refs, Dask futures) are left out of the pickle: `attached(index)` stands in
for each, and `loads` is given their values.
"""

from __future__ import annotations

import copyreg
import functools
import io
import pickle
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from operator import methodcaller
from types import TracebackType
from typing import Any, Protocol

import cloudpickle
import tblib

from ..exceptions import PayloadError, UserCodeError
from .frames import Buffer
from .memory import copied

__all__ = [
    "dump_exception",
    "dumps",
    "dumps_plain",
    "keep_native",
    "load_exception",
    "load_traceback",
    "loads",
    "size_of",
]

#: A frame has at most this many payload parts; more buffers than that are pickled in band.
_MAX_PARTS = 65_000

#: Values of exactly these types stand for nothing elsewhere, have no buffers, and never fail: they need no pickler of
#: their own.
_PLAIN = frozenset({bool, bytes, float, int, str, type(None)})

Reducer = Callable[[Any], Any]
#: Tells how objects of exactly this type are reduced (as in `copyreg`); None: as always.
Reducers = Callable[[type], Reducer | None]

#: What pickle does by itself.
_reduce = methodcaller("__reduce_ex__", 5)

_values = threading.local()


def attached(index: int) -> Any:
    """Stand in a pickle for the value of attachment ``index``; called by `loads` alone."""
    return _values.current[index]


def dumps(obj: object, reducers: Reducers | None = None) -> list[Buffer]:
    """Serialise ``obj``.

    Parameters
    ----------
    obj : object
        Anything that pickle or cloudpickle can serialise.
    reducers : callable, optional
        Called once with each type that occurs: how its objects are reduced, or None for as always.

    Returns
    -------
    list of bytes-like
        The pickle, then its out-of-band buffers.

    Raises
    ------
    PayloadError
        Neither can serialise it; the message is theirs.
    """
    if type(obj) in _PLAIN:
        return [pickle.dumps(obj, 5)]
    try:
        parts = _dump(_Pickler, obj, reducers)
        # Pickle takes what __main__ defines by reference, and the worker's __main__ is another one.
        if b"__main__" not in parts[0]:
            return parts
    except Exception:  # noqa: BLE001 - whatever pickle stumbles over, cloudpickle may manage
        pass
    try:
        return _dump(_CloudPickler, obj, reducers)
    except Exception as error:
        raise PayloadError(f"cannot be pickled: {type(error).__name__}: {error}") from error


def dumps_plain(
    args: tuple[Any, ...], kwargs: dict[str, Any], left_out: dict[type, Callable[[Any], int]] | None = None
) -> list[Buffer] | None:
    """Serialise arguments that are all plain values; None when one of them is not. A quarter of the cost of `dumps`.

    Parameters
    ----------
    args, kwargs : tuple, dict
    left_out : dict of type to callable, optional
        Arguments of exactly these types are left out; the callable returns the number of the attachment.
    """
    for value in (*args, *kwargs.values()) if kwargs else args:
        if type(value) not in _PLAIN and (left_out is None or type(value) not in left_out):
            return None
    if left_out is not None:

        def stand_in(value: Any) -> Any:
            number = left_out.get(type(value))
            return value if number is None else _StandIn(number(value))

        args = tuple(map(stand_in, args))
        kwargs = {name: stand_in(value) for name, value in kwargs.items()}
    return [pickle.dumps((args, kwargs), 5)]


class _StandIn:
    """Becomes `attached` in a pickle."""

    __slots__ = ("place",)

    def __init__(self, place: int) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return attached, (self.place,)


class _Pickler(pickle.Pickler):
    def reduce_with(self, reducers: Reducers) -> None:
        self.dispatch_table = _Table(reducers)


class _Table(dict[type, Reducer]):
    """A dispatch table that is filled as types occur. Pickle looks a class up by its metaclass."""

    def __init__(self, reducers: Reducers) -> None:
        self._reducers = reducers

    def __missing__(self, kind: type) -> Reducer:
        if issubclass(kind, type):
            raise KeyError(kind)
        reduce = self[kind] = self._reducers(kind) or copyreg.dispatch_table.get(kind, _reduce)
        return reduce


class _CloudPickler(cloudpickle.Pickler):
    """Cloudpickle's, which does not look at a dispatch table that is set on a pickler."""

    reducers: Reducers | None = None

    def reduce_with(self, reducers: Reducers) -> None:
        self.reducers = functools.cache(reducers)

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type):
            return keep_native(super().reducer_override(obj))
        reduce = None if self.reducers is None else self.reducers(type(obj))
        return super().reducer_override(obj) if reduce is None else reduce(obj)


def keep_native(reduced: Any) -> Any:
    """Let a class that travels by value stay as it is where it comes home: see `class_setstate`."""
    if isinstance(reduced, tuple) and reduced[-1] is cloudpickle.cloudpickle._class_setstate:
        return (*reduced[:-1], class_setstate)
    return reduced


def class_setstate(kind: type, state: Any) -> Any:
    """Do what cloudpickle does, but to a class that a module of this process has.

    Its functions would be replaced by copies, which know only copies of the module's variables.
    """
    found: Any = sys.modules.get(kind.__module__)
    for name in kind.__qualname__.split("."):
        found = getattr(found, name, None)
    if found is kind:
        return kind
    return cloudpickle.cloudpickle._class_setstate(kind, state)


def _dump(kind: Any, obj: object, reducers: Reducers | None) -> list[Buffer]:
    buffers: list[pickle.PickleBuffer] = []
    if kind is _Pickler and not reducers:
        pickled = pickle.dumps(obj, 5, buffer_callback=buffers.append)
    else:
        file = io.BytesIO()
        pickler = kind(file, protocol=5, buffer_callback=buffers.append)
        if reducers:
            pickler.reduce_with(reducers)
        pickler.dump(obj)
        pickled = file.getvalue()
    if not buffers:
        return [pickled]
    if len(buffers) > _MAX_PARTS:
        return _dump_in_band(kind, obj, reducers)
    parts: list[Buffer] = [pickled]
    parts.extend(_copy(buffer) for buffer in buffers)
    return parts


def _dump_in_band(kind: Any, obj: object, reducers: Reducers | None) -> list[Buffer]:
    file = io.BytesIO()
    pickler = kind(file, protocol=5)
    if reducers:
        pickler.reduce_with(reducers)
    pickler.dump(obj)
    return [file.getvalue()]


def _copy(buffer: pickle.PickleBuffer) -> Buffer:
    with buffer.raw() as view:
        return copied(view)


class Names(Protocol):
    """What names in a pickle mean here, where that is something else than what can be imported."""

    @property
    def names(self) -> Sequence[bytes]:
        """Names of the modules in question."""

    def find(self, module: str, name: str) -> Any:
        """Return what is meant; LookupError: what can be imported."""


def loads(parts: Sequence[Buffer], values: Sequence[Any] = (), names: Names | None = None) -> Any:
    """Rebuild what `dumps` serialised; ``values`` are those of its attachments, in their order."""
    if not values:
        return pickle.loads(parts[0], buffers=parts[1:]) if names is None else _loads(parts, names)
    outer = getattr(_values, "current", ())
    _values.current = values
    try:
        return _loads(parts, names)
    finally:
        _values.current = outer


def _loads(parts: Sequence[Buffer], names: Names | None) -> Any:
    if names is None or not _mentions(parts[0], names.names):
        return pickle.loads(parts[0], buffers=parts[1:])
    return _Finder(io.BytesIO(parts[0]), parts[1:], names).load()


def _mentions(pickled: Buffer, names: Sequence[bytes]) -> bool:
    if len(pickled) > _SEARCHED:
        return True
    data = bytes(pickled)
    return any(name in data for name in names)


#: Bytes of a pickle that is searched for names before it is opened in the way that takes longer.
_SEARCHED = 65536


class _Finder(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, buffers: Sequence[Buffer], names: Names) -> None:
        super().__init__(file, buffers=buffers)
        self._names = names

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._names.find(module, name)
        except LookupError:
            return super().find_class(module, name)


def size_of(parts: Sequence[Buffer]) -> int:
    """Bytes of a payload."""
    return sum(map(len, parts))


def dump_exception(error: BaseException) -> tuple[str, list[Buffer]]:
    """Serialise an exception of user code: its traceback as text, and itself (nothing if it cannot be pickled).

    What would end the caller (``SystemExit``, ``KeyboardInterrupt``) or its loops (``StopIteration``) stays behind too.
    """
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    if not isinstance(error, Exception) or isinstance(error, (StopIteration, StopAsyncIteration)):
        return text, []
    try:
        parts = dumps(error)
        # Many exceptions pickle and then fail to unpickle (arguments that __init__ does not take).
        if not isinstance(loads(parts), BaseException):
            return text, []
    except Exception:  # noqa: BLE001 - user code runs in there
        return text, []
    return text, parts


def load_exception(text: str, parts: Sequence[Buffer]) -> BaseException:
    """Rebuild an exception of user code: a new object each time, with the remote traceback as its cause."""
    error: Any = None
    if parts:
        try:
            error = loads(parts)
        except Exception:  # noqa: BLE001 - user code runs in there
            error = None
    if not isinstance(error, BaseException):
        lines = text.strip().splitlines()
        return UserCodeError(f"{lines[-1] if lines else 'user code failed'}\n\nIn the replica:\n{text}")
    # Not by plain assignment, which frozen dataclasses and the like refuse.
    BaseException.__setattr__(error, "__cause__", RemoteTraceback(text))
    return error


def load_traceback(text: str) -> TracebackType | None:
    """Make a traceback from the text of one; of several, the last, which is that of the exception itself."""
    begin = text.rfind("Traceback (most recent call last)")
    try:
        made: TracebackType = tblib.Traceback.from_string(text[begin:], strict=False).as_traceback()
    except tblib.TracebackParseError:
        return None
    return made


class RemoteTraceback(Exception):
    """The cause of an exception that came from a replica: its traceback there, as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"
