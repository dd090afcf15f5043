"""The processes of an embedded cluster: one host (scheduler, controller, supervisor) and its workers.

``host`` is started by the session (`dask_serve.embedded`), starts ``worker`` processes before anything heavy is
imported, and keeps as many of them alive as wanted (``workers``). Each process holds a *lifeline* to the one that
started it: the end of file on it means that this one is gone, however it died.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

__all__ = ["python_command"]

_BOOT = (
    "import importlib, json, sys; _, path, module, *arguments = sys.argv; sys.path[:] = json.loads(path); "
    "sys.argv[:] = [module]; importlib.import_module(module).main(*arguments)"
)


def python_command(module: str, *arguments: str) -> list[str]:
    """Build the command line that runs ``module.main(*arguments)`` with this process's ``sys.path``.

    ``python -m`` would put the working directory first, where a file of the user's may hide a module of the
    standard library; ``PYTHONPATH`` would reach the programs that user code starts.
    """
    path = [entry or str(Path.cwd()) for entry in sys.path if isinstance(entry, str)]
    home = str(Path(__file__).parents[2])
    if home not in path:
        path.append(home)
    return [sys.executable, "-c", _BOOT, json.dumps(path), module, *arguments]
