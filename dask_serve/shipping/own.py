"""Which modules are the application's own: they travel with it."""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import sys
import sysconfig
import types
from pathlib import Path

__all__ = ["is_own", "own_modules"]

#: Packages that are never the application's own, wherever they lie (an editable install, a checkout).
FOREIGN = frozenset({"dask_serve", "distributed", "dask"})


def own_modules() -> list[types.ModuleType]:
    """Modules whose files lie under the working directory or beside the main program, and are no installed package."""
    roots = _roots()
    found = []
    for module in list(sys.modules.values()):
        if not isinstance(module, types.ModuleType) or module.__name__ == "__main__":
            continue
        if sys.modules.get(module.__name__) is not module or module.__name__.partition(".")[0] in FOREIGN:
            continue
        # Through the dictionary, because modules that load lazily do so at the first attribute.
        file = vars(module).get("__file__")
        if isinstance(file, str) and file.endswith(tuple(importlib.machinery.SOURCE_SUFFIXES)) and _own(file, roots):
            found.append(module)
    return found


def _roots() -> frozenset[str]:
    roots = set()
    with contextlib.suppress(OSError):
        roots.add(str(Path.cwd()))
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    if main:
        roots.add(str(Path(main).absolute().parent))
    return frozenset(roots)


@functools.lru_cache(maxsize=8192)
def _own(file: str, roots: frozenset[str]) -> bool:
    path = Path(file).absolute()
    if not any(path.is_relative_to(root) for root in roots):
        return False
    if {"site-packages", "dist-packages"} & set(path.parts):
        return False
    return not any(path.is_relative_to(directory) for directory in _library_directories())


@functools.cache
def _library_directories() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    return tuple({str(Path(paths[name]).resolve()) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def is_own(name: str, file: str) -> bool:
    """Whether a module is the application's own, by its name and file."""
    return name.partition(".")[0] not in FOREIGN and _own(file, _roots())
