"""The revision of a deployment: a name for its code that is the same whenever the code is.

Pickles of equal classes differ: cloudpickle gives each class a random id, notebooks give each run of a cell a file
name, sets have no order, and interned strings change the memo. So the blob is opened with a stand-in for everything
it imports, which runs nothing, and what it would have built is hashed.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
from typing import TYPE_CHECKING, Any

import msgspec

from ..config import RESTARTING_OPTIONS, DeploymentOptions

if TYPE_CHECKING:
    from .code import Packed

__all__ = ["fingerprint", "revision"]

#: Where cloudpickle's constructors take the random id of a class.
_TRACKER_ID = {"_make_skeleton_class": 4, "_make_skeleton_enum": 5, "_make_typevar": 5}

#: Depend on where the code stands and on what else this process has imported, not on what the code does.
_VOLATILE = frozenset(
    {"__file__", "__path__", "__firstlineno__", "__static_attributes__", "_cloudpickle_submodules", "_routes_version"}
)


def revision(packed: Packed, options: DeploymentOptions, identity: str = "", environment: str = "") -> str:
    """Name what replicas run: equal names need no restart.

    Parameters
    ----------
    packed : Packed
        Code and bound arguments.
    options : DeploymentOptions
        Those in `config.RESTARTING_OPTIONS` count. ``version`` takes the place of the code.
    identity : str
        Name of application and deployment; two deployments of one ``version`` are still two.
    environment : str
        Name of what the process is to have, if anything.
    """
    code = f"version:{identity}:{options.version}" if options.version is not None else fingerprint(packed.blob)
    chosen = {name: getattr(options, name) for name in RESTARTING_OPTIONS}
    text = msgspec.json.encode([code, chosen, *([environment] if environment else [])], order="deterministic")
    return hashlib.blake2b(text, digest_size=12).hexdigest()


def fingerprint(blob: bytes) -> str:
    """Hash what a pickle would build, without building it."""
    try:
        digest = _Digest()
        digest.feed(_Opener(io.BytesIO(blob)).load())
        return digest.hexdigest()
    except (RecursionError, pickle.UnpicklingError, AttributeError, TypeError):
        # Something unusual in it: correct all the same, at the price of a restart too many.
        return hashlib.blake2b(blob, digest_size=16).hexdigest()


class _Node:
    """Stands for an object that unpickling would build: the callable, its arguments and what happens to it later."""

    name = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Node:
        node = object.__new__(cls)
        node.parts = [args, kwargs]
        if cls.name.endswith("setstate") and args and isinstance(args[0], _Node):
            # A pickle throws the answer of these away: they are called for what they do to their first argument.
            args[0].parts.append((cls.name, args[1:]))
        return node

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    parts: list[Any]

    def __call__(self, *args: Any) -> _Node:
        if self.name.endswith("_builtin_type") and self.parts[0] == ("CodeType",):
            args = _without_position(args)
        return _CallOf(self, *args)

    def __setstate__(self, state: Any) -> None:
        self.parts.append(("state", state))

    def __setitem__(self, key: Any, value: Any) -> None:
        self.parts.append(("item", key, value))

    def append(self, value: Any) -> None:
        self.parts.append(("append", value))

    def add(self, value: Any) -> None:
        self.parts.append(("add", value))


class _CallOf(_Node):
    name = "call"


def _without_position(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Take file name and first line out of the arguments of a code object."""
    first_line = 13 if len(args) >= 18 else 12
    return tuple(value for index, value in enumerate(args) if index not in (10, first_line))


class _Opener(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[_Node]:
        return type("_Node", (_Node,), {"name": f"{module}:{name}"})


class _Digest:
    def __init__(self, seen: dict[int, int] | None = None) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        #: Ordinals of mutable objects by id, which is safe as all that is fed lives as long as the root does.
        self._seen = {} if seen is None else seen

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def feed(self, obj: Any) -> None:
        if isinstance(obj, str):
            self._bytes(b"s", obj.encode("utf-8", "surrogatepass"))
        elif isinstance(obj, (bytes, bytearray)):
            self._bytes(type(obj).__name__.encode(), obj)
        elif isinstance(obj, type):
            self._bytes(b"g", getattr(obj, "name", obj.__name__).encode())
        elif isinstance(obj, bool) or obj is None or obj is Ellipsis or isinstance(obj, (float, complex)):
            self._bytes(b"c", repr(obj).encode())
        elif isinstance(obj, int):
            self._bytes(b"i", format(obj, "x").encode())
        elif isinstance(obj, tuple):
            self._sequence(b"t", obj)
        elif isinstance(obj, frozenset):
            self._unordered(obj)
        elif id(obj) in self._seen:
            self._bytes(b"m", str(self._seen[id(obj)]).encode())
        else:
            self._seen[id(obj)] = len(self._seen)
            self._mutable(obj)

    def _mutable(self, obj: Any) -> None:
        if isinstance(obj, dict):
            self._sequence(b"d", [_without_id(*item) for item in obj.items() if not _is_volatile(item[0])])
        elif isinstance(obj, list):
            self._sequence(b"l", obj)
        elif isinstance(obj, set):
            self._unordered(obj)
        elif isinstance(obj, _Node):
            self._node(obj)
        else:
            raise TypeError(f"unexpected {type(obj)} in a pickle")

    def _node(self, node: _Node) -> None:
        args, kwargs, *later = node.parts
        drop = _TRACKER_ID.get(node.name.rpartition(":")[2])
        if drop is not None and node.name.startswith("cloudpickle"):
            args = args[:drop] + args[drop + 1 :]
        self._bytes(b"n", node.name.encode())
        self._sequence(b"a", args)
        self._sequence(b"k", tuple(kwargs.items()))
        self._sequence(b"e", later)

    def _bytes(self, kind: bytes, data: bytes | bytearray) -> None:
        self._hash.update(b"%s%d:" % (kind, len(data)))
        self._hash.update(data)

    def _sequence(self, kind: bytes, items: Any) -> None:
        self._hash.update(b"%s%d(" % (kind, len(items)))
        for item in items:
            self.feed(item)

    def _unordered(self, items: Any) -> None:
        digests = []
        for item in items:
            inner = _Digest(dict(self._seen))
            inner.feed(item)
            digests.append(inner.hexdigest())
        self._bytes(b"u", "".join(sorted(digests)).encode())


def _is_volatile(key: Any) -> bool:
    return isinstance(key, str) and key in _VOLATILE


def _without_id(key: Any, value: Any) -> tuple[Any, Any]:
    """Take the address of a class out of the names that pydantic's schemas have for it."""
    if isinstance(key, str) and key in _REFERENCES and isinstance(value, str):
        return key, _address.sub("", value)
    return key, value


_REFERENCES = frozenset({"ref", "schema_ref"})
_address = re.compile(r":\d{9,}")
