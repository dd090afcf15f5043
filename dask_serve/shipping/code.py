"""Shipping user code by value, and the revision that names it.

What a deployment consists of, its class or function with the bound arguments, becomes one opaque blob of bytes.
The application's own modules travel inside it, so that workers need not have the files and a changed file is
really new code on a worker that has seen the old one. Only the replica's process ever opens the blob.
"""

from __future__ import annotations

import builtins
import contextlib
import inspect
import io
import pickle
import sys
import threading
import types
import warnings
from typing import TYPE_CHECKING, Any

import cloudpickle
from dask.utils import format_bytes
from distributed import Future
from msgspec import Struct

from ..exceptions import ConfigError
from ..wire.payloads import keep_native
from .apps import remaking
from .blame import blame
from .modules import Modules, Source, imports, package_of, sources_of
from .own import is_own, own_modules

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

__all__ = ["LARGE", "Packed", "bound_handle", "open_blob", "own_modules", "pack", "resolved_key", "unpack"]

#: Bound arguments that make more bytes than this are warned about.
LARGE = 10_000_000

#: What to do about something that cannot be pickled.
REPAIR = (
    "Create it in `__init__`, which runs on the worker, instead of in the class, the module or the arguments of "
    "`.bind()`."
)

#: What replaces an object while it is pickled: a callable that workers can import, and its arguments. For functions:
#: the annotations that they travel with.
Reducers = dict[type, "Callable[[Any], Any]"]

#: Registration of modules with cloudpickle is process-wide, so that only one pack may be at work.
_lock = threading.RLock()


class Packed(Struct, frozen=True):
    """A deployment's code and bound arguments, ready to travel."""

    blob: bytes
    #: Dask keys of the futures among the bound arguments; `unpack` wants their values.
    keys: list[str]

    @property
    def nbytes(self) -> int:
        """Size of the blob."""
        return len(self.blob)


# -- placeholders ------------------------------------------------------------------------------------------------------


class _Unpacking(threading.local):
    values: Mapping[str, Any] | None = None
    handle: Callable[[str, str], Any] | None = None
    modules: Modules | None = None


_unpacking = _Unpacking()


def resolved_key(key: str) -> Any:
    """Stand in a blob for a Dask future, and become its value in `unpack`."""
    values = _unpacking.values
    if values is None or key not in values:
        raise LookupError(f"the value of the Dask future {key!r}, which is a bound argument, was not fetched")
    return values[key]


def bound_handle(app: str, deployment: str) -> Any:
    """Stand in a blob for a bound application, and become the handle of its deployment in `unpack`.

    The blob does not hold the scheduler's address: workers may know it by another name than the session does.
    """
    if _unpacking.handle is not None:
        return _unpacking.handle(app, deployment)
    from ..handle import DeploymentHandle

    return DeploymentHandle(app, deployment)


def take_sources(sources: dict[str, Any]) -> None:
    """Stand in a blob, before its functions, for the modules that they import while they run."""
    if _unpacking.modules is not None:
        _unpacking.modules.take(sources["modules"], sources["__file__"])


class _Sources:
    """Travels as `take_sources`."""

    def __init__(self, sources: dict[str, Source]) -> None:
        self._sources = sources

    def __reduce__(self) -> tuple[Any, ...]:
        modules = {name: (source.text, source.is_package) for name, source in self._sources.items()}
        # Where they lie is not what they are: see `revision`.
        return take_sources, ({"modules": modules, "__file__": {n: s.file for n, s in self._sources.items()}},)


class _Classes:
    """Travels, behind everything else, as the classes that travel by value."""


class _Refused(pickle.PicklingError):
    """Our own refusal, which needs no search for the culprit."""


_MODULE_INTERNALS = frozenset({"__builtins__", "__cached__", "__loader__", "__spec__"})


def _make_module(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    if _unpacking.modules is not None:
        _unpacking.modules.add(module)
    return module


def _module_setstate(module: types.ModuleType, state: dict[str, Any]) -> None:
    vars(module).update(state, __builtins__=builtins)
    if _unpacking.modules is not None:
        _unpacking.modules.move(vars(module))


class _Pickler(cloudpickle.Pickler):
    def __init__(self, file: Any, reducers: Reducers) -> None:
        super().__init__(file, protocol=5)
        self._reducers = reducers
        self.keys: dict[str, None] = {}
        #: What functions import while they run.
        self.imported: set[str] = set()
        #: Nobody sends objects of the deployment's own class.
        self.target: Any = None
        #: Classes that travel by value, by module and name.
        self.classes: dict[str, dict[str, type]] = {}

    def reducer_override(self, obj: Any) -> Any:
        reduce = self._reducers.get(type(obj))
        if isinstance(obj, types.FunctionType):
            reduced = super().reducer_override(obj)
            if isinstance(reduced, tuple):
                # It travels by value.
                self.imported.update(imports(obj.__code__, package_of(obj.__globals__)))
                if reduce is not None:
                    reduced[2][1]["__annotations__"] = reduce(obj)
            return reduced
        if isinstance(obj, type):
            self._note(obj)
        elif isinstance(obj, _Classes):
            known = {name: dict(sorted(kinds.items())) for name, kinds in sorted(self.classes.items())}
            return dict, (known,)
        if reduce is not None and (reduced := reduce(obj)) is not NotImplemented:
            return reduced
        if isinstance(obj, Future):
            if not isinstance(obj.key, str):
                raise _Refused(
                    f"a Dask future with the key {obj.key!r} (a part of a collection) cannot be bound; bind "
                    "`client.compute(collection)` or `client.scatter(value)`"
                )
            self.keys[obj.key] = None
            return resolved_key, (obj.key,)
        if isinstance(obj, types.ModuleType) and cloudpickle.cloudpickle._is_registered_pickle_by_value(obj):
            # In two steps, unlike cloudpickle's way, because modules that import each other form circles.
            state = {name: value for name, value in vars(obj).items() if name not in _MODULE_INTERNALS}
            return _make_module, (obj.__name__,), state, None, None, _module_setstate
        return keep_native(super().reducer_override(obj))

    def _note(self, kind: type) -> None:
        module, name = kind.__module__, kind.__name__
        if kind is self.target or module not in cloudpickle.list_registry_pickle_by_value():
            return
        if kind.__qualname__ == name and vars(sys.modules.get(module, object)).get(name) is kind:
            self.classes.setdefault(module, {})[name] = kind


class _Unpickler(pickle.Unpickler):
    def __init__(self, blob: bytes, modules: Modules) -> None:
        super().__init__(io.BytesIO(blob))
        self._modules = modules

    def find_class(self, module: str, name: str) -> Any:
        if module == "cloudpickle.cloudpickle" and name in {"_make_function", "_function_setstate"}:
            return getattr(self._modules, name.strip("_"))
        return super().find_class(module, name)


# -- the application's own modules -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _by_value() -> Iterator[None]:
    with _lock:
        before = cloudpickle.list_registry_pickle_by_value()
        mine = [module for module in own_modules() if module.__name__ not in before]
        try:
            for module in mine:
                cloudpickle.register_pickle_by_value(module)
            yield
        finally:
            after = cloudpickle.list_registry_pickle_by_value()
            for module in mine:
                if module.__name__ in after:
                    cloudpickle.unregister_pickle_by_value(module)


# -- pack and unpack ---------------------------------------------------------------------------------------------------


def pack(
    target: Any,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    where: str = "the deployment",
    reducers: Reducers | None = None,
    repair: str = REPAIR,
) -> Packed:
    """Pickle a deployment's class or function with its bound arguments, code of own modules included.

    Parameters
    ----------
    target : class or function
        What replicas run.
    args, kwargs : tuple, dict
        Bound arguments. Dask futures in them, however deep, travel as their keys.
    where : str
        What is being packed, for messages.
    reducers : dict, optional
        What to put in place of objects of certain types.
    repair : str
        What to do about something that cannot be pickled, for the message.

    Raises
    ------
    ConfigError
        Something cannot be pickled; the message says which attribute, argument or global variable.

    Warns
    -----
    UserWarning
        Bound arguments make 10 MB or more.
    """
    kwargs = dict(kwargs or {})
    reducers = reducers or {}
    with _by_value():
        try:
            buffer, pickler = _dump(target, args, kwargs, reducers, {})
            sources = sources_of(pickler.imported, is_own)
            if sources:
                buffer, pickler = _dump(target, args, kwargs, reducers, sources)
        except Exception as error:  # __reduce__ of user code raises what it likes
            raise ConfigError(
                f"{where} cannot be sent to the workers: {_explain((target, args, kwargs), reducers, error, repair)}"
            ) from error
        packed = Packed(blob=buffer.getvalue(), keys=list(pickler.keys))
        if packed.nbytes >= LARGE:
            _warn_large(target, args, kwargs, reducers, where)
    return packed


def _dump(
    target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], reducers: Reducers, sources: dict[str, Source]
) -> tuple[io.BytesIO, _Pickler]:
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, reducers)
    pickler.target = target
    pickler.dump((_Sources(sources) if sources else None, target, args, kwargs, _Classes()))
    return buffer, pickler


def unpack(
    blob: bytes,
    values: Mapping[str, Any] | None = None,
    handle: Callable[[str, str], Any] | None = None,
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Open what `pack` made, as `open_blob` does, and return the first three."""
    return open_blob(blob, values, handle)[:3]


def open_blob(
    blob: bytes,
    values: Mapping[str, Any] | None = None,
    handle: Callable[[str, str], Any] | None = None,
    moved: Iterable[tuple[str, str]] = (),
) -> tuple[Any, tuple[Any, ...], dict[str, Any], Modules]:
    """Open what `pack` made.

    Parameters
    ----------
    blob : bytes
        `Packed.blob`.
    values : dict, optional
        Values of `Packed.keys`.
    handle : callable, optional
        Makes the handle of a bound application from the names of application and deployment.
    moved : iterable of (str, str), optional
        Directories of the session, with what they are here: ``__file__`` is in the latter.

    Returns
    -------
    target, args, kwargs, modules
        The class or function, its bound arguments, and the modules of its code.
    """
    before = _unpacking.values, _unpacking.handle, _unpacking.modules
    modules = Modules(moved)
    _unpacking.values, _unpacking.handle, _unpacking.modules = values or {}, handle, modules
    try:
        with remaking():
            opened = _Unpickler(blob, modules).load()
    finally:
        _unpacking.values, _unpacking.handle, _unpacking.modules = before
    if len(opened) == 3:
        # Of an earlier version, from a state file.
        return (*opened, modules)
    _, target, args, kwargs, modules.classes = opened
    return target, args, kwargs, modules


# -- what went wrong, and what is large --------------------------------------------------------------------------------


class _Counter(io.RawIOBase):
    """A file that keeps nothing but the number of bytes."""

    size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.size += size
        return size


def _measure(obj: Any, reducers: Reducers) -> int:
    counter = _Counter()
    _Pickler(counter, reducers).dump(obj)
    return counter.size


def _named_arguments(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    try:
        parameters = [p for p in inspect.signature(target).parameters.values() if p.kind in _POSITIONAL]
    except (TypeError, ValueError):
        parameters = []
    for index, value in enumerate(args):
        name = f" ({parameters[index].name!r})" if index < len(parameters) else ""
        yield f"bound argument {index}{name}", value
    for key, value in kwargs.items():
        yield f"bound argument {key!r}", value


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _warn_large(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], reducers: Reducers, where: str) -> None:
    sizes = [(_measure(value, reducers), label) for label, value in _named_arguments(target, args, kwargs)]
    total = sum(size for size, _ in sizes)
    if total < LARGE:
        return
    size, label = max(sizes)
    warnings.warn(
        f"{where}: bound arguments of {format_bytes(total)} travel through the scheduler (the largest is {label}, "
        f"{format_bytes(size)}). Put them on the cluster first and bind the future: "
        "`.bind(client.scatter(value))`; or load them in `__init__` from a path that workers can read.",
        UserWarning,
        stacklevel=2,
    )


def _explain(
    packed: tuple[Any, tuple[Any, ...], dict[str, Any]], reducers: Reducers, error: Exception, repair: str
) -> str:
    target, args, kwargs = packed
    if isinstance(error, _Refused):
        return str(error)
    parts: list[tuple[str, Any]] = [*_named_arguments(target, args, kwargs)]
    kind = "class" if isinstance(target, type) else "function"
    parts.append((f"{kind} {getattr(target, '__name__', '')}", target))
    for label, value in parts:
        reason = _failure(value, reducers)
        if reason is not None:
            path, culprit, reason = blame(label, value, reason, lambda child: _failure(child, reducers))
            return (
                f"{path}, a {type(culprit).__module__}.{type(culprit).__qualname__}, cannot be pickled "
                f"({_first_line(reason)}). {repair}"
            )
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _failure(obj: Any, reducers: Reducers) -> Exception | None:
    try:
        _measure(obj, reducers)
    except Exception as error:  # noqa: BLE001  # as in pack
        return error
    return None
