"""From a document to applications: what it names is imported, and its options take the place of the code's."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ..deployment import Application, Deployment
from ..exceptions import ConfigError
from ..policy.desired import Source
from ..shipping.graph import Built, build
from .declaration import ApplicationEntry, given
from .dumping import dump
from .problems import Path, Problems
from .validation import Checked

__all__ = ["build_all"]

#: Returns the application that an import path and arguments name.
Load = Callable[[str, Mapping[str, Any]], Application]


def build_all(checked: Checked, load: Load, without: Collection[str] = ()) -> list[Built]:
    """Import the applications of a document.

    Parameters
    ----------
    checked : Checked
        The document.
    load : callable
        Gets an import path and arguments, and returns an application or raises.
    without : collection of str
        Names of applications to leave out.

    Raises
    ------
    DocumentError
        Something cannot be imported, or does not fit the code; the error lists all of that.
    """
    problems = checked.problems()
    found: list[Built] = []
    for index, entry in enumerate(checked.document.applications):
        if entry.name not in without:
            built = _build(checked, entry, ("applications", index), load, problems)
            found += [] if built is None else [built]
    problems.check()
    return found


def _build(checked: Checked, entry: ApplicationEntry, path: Path, load: Load, problems: Problems) -> Built | None:
    position = checked.tree.position
    try:
        application = load(entry.import_path, entry.args)
    except Exception as error:  # noqa: BLE001 - user code may raise anything
        problems.add(position((*path, "import_path")), (*path, "import_path"), _message(error))
        return None
    overrides = _Overrides(checked, entry, path, problems)
    source = Source(import_path=entry.import_path, args=_raw(checked, path), overrides=overrides.names())
    try:
        built = build(application, entry.name, entry.route_prefix, change=overrides.change, source=source)
    except ConfigError as error:
        problems.add(position(path), path, str(error))
        return None
    overrides.check()
    return built


def _message(error: Exception) -> str:
    # Those of the command line keep their text there.
    return str(getattr(error, "message", "") or error or type(error).__name__)


def _raw(checked: Checked, path: Path) -> str:
    """Return the arguments as they are written: values of variables may be secrets."""
    raw = checked.tree.raw
    for part in path:
        raw = raw[part]
    args = raw.get("args")
    return "\n".join(dump({"args": args})) if args else ""


class _Overrides:
    """The options that a document has for the deployments of one application."""

    def __init__(self, checked: Checked, entry: ApplicationEntry, path: Path, problems: Problems) -> None:
        self._entries: dict[str, tuple[Any, Path]] = {
            deployment.name: (deployment, (*path, "deployments", index))  # type: ignore[attr-defined]
            for index, deployment in enumerate(entry.deployments)
        }
        self._checked = checked
        self._problems = problems
        self._seen: list[str] = []

    def names(self) -> dict[str, list[str]]:
        """Return the names of the options by deployment."""
        found = {name: sorted(given(entry)) for name, (entry, _) in self._entries.items()}
        return {name: options for name, options in found.items() if options}

    def change(self, name: str, deployment: Deployment) -> Deployment:
        """Return the deployment with its options."""
        self._seen.append(name)
        entry, path = self._entries.get(name, (None, ()))
        if entry is None:
            return deployment
        try:
            return deployment.options(**given(entry))
        except ConfigError as error:
            self._problems.add(self._checked.tree.position(path), path, str(error))
            return deployment

    def check(self) -> None:
        """Find those that no deployment has."""
        for name, (_, path) in self._entries.items():
            if name not in self._seen:
                near = difflib.get_close_matches(name, self._seen, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(map(repr, sorted(self._seen)))}"
                where = (*path, "name")
                text = f"the application has no deployment {name!r}; {hint}"
                self._problems.add(self._checked.tree.position(where), where, text)
