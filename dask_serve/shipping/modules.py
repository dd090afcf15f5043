"""Modules of the application that its code imports while it runs, and classes of it that callers send by name.

What code refers to travels by value. An ``import`` inside a function refers to nothing yet: the files of such modules
travel as source, with those that they import in turn, and the functions of the revision have an ``__import__`` that
looks there first. So each revision has modules of its own, whatever the worker has of that name.
"""

from __future__ import annotations

import builtins
import dis
import functools
import importlib.machinery
import importlib.util
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle

__all__ = ["Modules", "Source", "imports", "package_of", "sources_of"]


class Source(NamedTuple):
    """A module as it travels."""

    text: str
    is_package: bool
    #: Where it lies in the session; empty: a directory without ``__init__.py``.
    file: str = ""


_IMPORT = dis.opmap["IMPORT_NAME"]


# -- in the session ----------------------------------------------------------------------------------------------------


def imports(code: types.CodeType, package: str) -> Iterator[str]:
    """Return the full names of what code may import: modules, and names in them that may be modules.

    Parameters
    ----------
    code : code
        Of a function or a module, with those within it.
    package : str
        What relative imports start from.
    """
    last: list[Any] = [None, None]
    # Most code imports nothing, and to take it apart takes a while.
    for instruction in dis.get_instructions(code) if _IMPORT in code.co_code[::2] else ():
        if instruction.opname == "EXTENDED_ARG":
            continue
        if instruction.opname == "IMPORT_NAME":
            level, names = last
            try:
                name = importlib.util.resolve_name("." * level + instruction.argval, package)
            except (ImportError, TypeError, ValueError):
                continue
            yield name
            yield from (f"{name}.{each}" for each in names or () if each != "*")
        last = [last[1], instruction.argval]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from imports(constant, package)


def sources_of(names: Iterable[str], is_own: Callable[[str, str], bool]) -> dict[str, Source]:
    """Read the modules among ``names`` that are the application's own, and those that they import. Runs none of them.

    Parameters
    ----------
    names : iterable of str
        Full names; what is no module is passed over.
    is_own : callable
        Whether a module is the application's own, by its name and file.
    """
    found: dict[str, Source] = {}
    seen: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        source = _source(name, is_own)
        if source is None:
            continue
        found[name] = source
        text, is_package, file = source
        parent = name.rpartition(".")[0]
        if parent:
            todo.append(parent)
        try:
            code = compile(text, file or name, "exec", dont_inherit=True)
        except (SyntaxError, ValueError):
            # It fails where it is imported, as it would here.
            continue
        todo += imports(code, name if is_package else parent)
    return dict(sorted(found.items()))


def _source(name: str, is_own: Callable[[str, str], bool]) -> Source | None:
    spec = _find(name)
    if spec is None:
        return None
    is_package = spec.submodule_search_locations is not None
    if spec.origin is None:
        places = list(spec.submodule_search_locations or ())
        own = places and all(is_own(name, str(Path(place, "__init__.py"))) for place in places)
        return Source("", True) if own else None
    if not spec.origin.endswith(tuple(importlib.machinery.SOURCE_SUFFIXES)) or not is_own(name, spec.origin):
        return None
    try:
        return Source(importlib.util.decode_source(Path(spec.origin).read_bytes()), is_package, spec.origin)
    except (OSError, UnicodeDecodeError, SyntaxError):
        return None


def _find(name: str) -> importlib.machinery.ModuleSpec | None:
    """Find a module without importing its parents."""
    path: list[str] | None = None
    spec = None
    parts = name.split(".")
    for number in range(len(parts)):
        full = ".".join(parts[: number + 1])
        if full in sys.builtin_module_names or full in sys.stdlib_module_names:
            return None
        try:
            spec = importlib.machinery.PathFinder.find_spec(full, path)
        except (ImportError, AttributeError, ValueError, OSError):
            return None
        if spec is None:
            return None
        locations = spec.submodule_search_locations
        path = None if locations is None else list(locations)
        if path is None and number < len(parts) - 1:
            return None
    return spec


# -- on the worker -----------------------------------------------------------------------------------------------------

#: Modules that are being executed are in `sys.modules` for so long, where much that declares classes looks.
_executing = threading.RLock()


class Modules:
    """The modules of one replica's code.

    Attributes
    ----------
    sources : dict of str to Source
        What can be imported, by full name.
    classes : dict of str to (dict of str to type)
        Classes that came by value, by module and name.
    moved : list of (str, str)
        Directories of the session, with what they are here.
    """

    def __init__(self, moved: Iterable[tuple[str, str]] = ()) -> None:
        self.sources: dict[str, Source] = {}
        self.classes: dict[str, dict[str, type]] = {}
        self.moved = list(moved)
        self._loaded: dict[str, types.ModuleType] = {}
        #: Those of them that can be used without a lock.
        self._complete: dict[str, types.ModuleType] = {}
        self._running: set[str] = set()
        self._builtins = {**vars(builtins), "__import__": self._import}

    def make_function(
        self, code: types.CodeType, namespace: dict[str, Any], name: Any, defaults: Any, closure: Any
    ) -> types.FunctionType:
        """Do what cloudpickle does for a function that travels by value, here."""
        namespace["__builtins__"] = self._builtins if self.sources else builtins
        self.move(namespace)
        return types.FunctionType(code, namespace, name, defaults, closure)

    def function_setstate(self, function: types.FunctionType, state: Any) -> None:
        """Do the second part of it."""
        # What the function itself mentions comes a second time.
        self.move(state[1]["__globals__"])
        cloudpickle.cloudpickle._function_setstate(function, state)
        # Functions that it defines in turn begin with what stands there.
        function.__globals__["__builtins__"] = self._builtins if self.sources else builtins

    def take(self, sources: dict[str, tuple[str, bool]], files: dict[str, str]) -> None:
        """Take over what can be imported."""
        self.sources = {name: Source(*source, file=files[name]) for name, source in sources.items()}

    def add(self, module: types.ModuleType) -> None:
        """A module came by value: who imports it gets that one."""
        self._loaded[module.__name__] = module

    def move(self, namespace: dict[str, Any]) -> None:
        """Let the file of a module be where it is here."""
        file = namespace.get("__file__")
        if self.moved and isinstance(file, str):
            namespace["__file__"] = self._here(file)

    def find(self, module: str, name: str) -> Any:
        """Return what callers mean by the name of something in one of these modules; LookupError: nothing of theirs."""
        top, *rest = name.split(".")
        known = self.classes.get(module, {})
        if top in known:
            found: Any = known[top]
        elif module in self.sources:
            found = getattr(self._load(module), top)
        else:
            raise LookupError(module)
        for each in rest:
            found = getattr(found, each)
        return found

    @functools.cached_property
    def names(self) -> tuple[bytes, ...]:
        """The names of modules that stand in pickles of what `find` finds."""
        return tuple(name.encode() for name in {*self.sources, *self.classes})

    def _here(self, file: str) -> str:
        for origin, place in self.moved:
            if file == origin or file.startswith(origin + "/"):
                return place + file[len(origin) :]
        return file

    def _import(
        self,
        name: str,
        namespace: Mapping[str, Any] | None = None,
        local: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        full = name
        if level:
            package = package_of(namespace or {})
            if package.partition(".")[0] in self.sources:
                full = importlib.util.resolve_name("." * level + name, package)
        if full not in self.sources:
            return builtins.__import__(name, namespace, local, fromlist or (), level)
        module = self._complete.get(full) or self._load(full)
        if not fromlist:
            return self._loaded[full.partition(".")[0]]
        for each in fromlist:
            if not hasattr(module, each) and f"{full}.{each}" in self.sources:
                self._load(f"{full}.{each}")
        return module

    def _load(self, name: str) -> types.ModuleType:
        with _executing:
            parent, _, last = name.rpartition(".")
            if parent:
                self._load(parent)
            if name in self._loaded:
                module = self._loaded[name]
                if parent and not hasattr(self._loaded[parent], last):
                    setattr(self._loaded[parent], last, module)
                # Unless this is one of those that it imports, in its turn.
                if name not in self._running:
                    self._complete[name] = module
                return module
            text, is_package, file = self.sources[name]
            module = types.ModuleType(name)
            spec = importlib.machinery.ModuleSpec(name, None, origin=file or None, is_package=is_package)
            vars(module).update(
                __builtins__=self._builtins,
                __package__=name if is_package else parent,
                __spec__=spec,
            )
            if file:
                module.__file__ = self._here(file)
            if is_package:
                module.__path__ = []
            self._loaded[name] = module
            self._running.add(name)
            if parent:
                setattr(self._loaded[parent], last, module)
            try:
                self._execute(module, text, file or name)
            except BaseException:
                del self._loaded[name]
                raise
            finally:
                self._running.discard(name)
            self._complete[name] = module
            return module

    def _execute(self, module: types.ModuleType, text: str, file: str) -> None:
        name = module.__name__
        before = sys.modules.get(name)
        sys.modules[name] = module
        try:
            exec(compile(text, file, "exec", dont_inherit=True), vars(module))  # noqa: S102 - that is what import does
        finally:
            if before is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = before
        # Not twice the same class.
        for top, kind in self.classes.get(name, {}).items():
            if hasattr(module, top):
                setattr(module, top, kind)


def package_of(namespace: Mapping[str, Any]) -> str:
    """Return what relative imports of code with these globals start from."""
    package = namespace.get("__package__")
    if package is None:
        name = str(namespace.get("__name__", ""))
        package = name if "__path__" in namespace else name.rpartition(".")[0]
    return str(package)
