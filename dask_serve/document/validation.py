"""A document is checked as a whole: every mistake, with its line and field."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Mapping
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Struct

from .. import __version__
from ..config import HTTPOptions
from ..exceptions import ConfigError
from ..options import described
from ..policy.routes import check_prefix
from ..shipping.spellings import advice, translate
from .declaration import VERSION, ApplicationEntry, DeploymentEntry, Document, HTTPEntry, given
from .nodes import Tree, read
from .problems import Path, Problems

__all__ = ["Checked", "parse"]

#: Keys of Ray Serve's own documents.
_RAYS = {
    "proxy_location",
    "http_options",
    "grpc_options",
    "logging_config",
    "tracing_config",
    "target_capacity",
    "controller_options",
}
_MISSING = object()


class Checked(Struct, frozen=True):
    """A document without mistakes.

    Attributes
    ----------
    name : str
        Of the document, for messages.
    document : Document
        What it holds.
    tree : Tree
        Where that stands.
    """

    name: str
    document: Document
    tree: Tree

    @property
    def http(self) -> dict[str, Any]:
        """The options of the proxies that are given."""
        return given(self.document.http)

    def problems(self) -> Problems:
        """Return a place for what is found later."""
        return Problems(self.name)


def parse(text: str, name: str = "the document", environment: Mapping[str, str] | None = None) -> Checked:
    """Read a document and check it, without importing anything that it names.

    Parameters
    ----------
    text : str
        YAML or JSON.
    name : str
        For messages.
    environment : mapping, optional
        Variables; by default those of this process.

    Raises
    ------
    DocumentError
        It has mistakes; the error lists all of them.
    """
    problems = Problems(name)
    tree = read(text, problems, environment)
    _check_version(tree, problems)
    document = _Checker(tree, problems).struct(Document, tree.value, ())
    _check_names(tree, problems)
    problems.check()
    assert document is not None
    return Checked(name, document, tree)


def _check_version(tree: Tree, problems: Problems) -> None:
    """A document of another form is one mistake, and not a hundred."""
    if tree.value is None:
        problems.add((0, 0), (), f"it is empty; it begins with `version: {VERSION}`")
    elif not isinstance(tree.value, dict):
        problems.add(tree.position(()), (), f"a document is a mapping that begins with `version: {VERSION}`")
    elif tree.value.get("version") != VERSION and _RAYS & tree.value.keys():
        key = min(_RAYS & tree.value.keys())
        problems.add(
            tree.key((key,)),
            (key,),
            "this looks like a document of Ray Serve: `dask serve migrate` translates those that have a meaning here",
        )
    elif "version" not in tree.value:
        problems.add((0, 0), ("version",), f"it is missing: begin the document with `version: {VERSION}`")
    elif tree.value["version"] != VERSION or isinstance(tree.value["version"], (bool, float)):
        problems.add(
            tree.position(("version",)),
            ("version",),
            f"the document has version {tree.value['version']!r}, and dask_serve {__version__} reads version {VERSION}:"
            " write it anew (`dask serve build` begins one), or use the dask_serve that it was written for",
        )
    else:
        return
    problems.check()


class _Checker:
    """Converts values to the classes of `declaration`, and goes on after a mistake."""

    def __init__(self, tree: Tree, problems: Problems) -> None:
        self._tree = tree
        self._problems = problems

    def struct(self, kind: Any, value: Any, path: Path) -> Any:
        """Return a ``kind``, or None after mistakes."""
        if not isinstance(value, dict):
            self._wrong(path, f"it is a mapping of names to values, not {_shown(value)}")
            return None
        before = len(self._problems.found)
        for name in value:
            if name not in kind.__struct_fields__:
                self._problems.add(self._tree.key((*path, name)), (*path, name), _unknown(kind, name))
        hints = get_type_hints(kind, include_extras=True)
        made = {
            name: self._value(kind, name, hints[name], value[name], (*path, name))
            for name in kind.__struct_fields__
            if name in value
        }
        for name in _required(kind):
            if name not in value:
                self._wrong(path, f"{name!r} is missing")
        if len(self._problems.found) > before:
            return None
        try:
            if kind is HTTPEntry:
                # What belongs together there.
                HTTPOptions(**made)
            return kind(**made)
        except ValueError as error:
            self._wrong(path, str(error))
            return None

    def _value(self, kind: Any, name: str, hint: Any, value: Any, path: Path) -> Any:
        for option in _options_of(hint):
            if isinstance(option, type) and issubclass(option, Struct) and isinstance(value, dict):
                return self.struct(option, value, path)
            if get_origin(option) is list and isinstance(value, list):
                (item,) = get_args(option)
                if isinstance(item, type) and issubclass(item, Struct):
                    return [self.struct(item, one, (*path, index)) for index, one in enumerate(value)]
        if name == "args" and isinstance(value, dict):
            return value
        try:
            if kind is DeploymentEntry and name == "memory":
                # Text, too.
                translate({name: value}, {})
            return msgspec.convert(value, hint)
        except ConfigError as error:
            self._wrong(path, str(error))
            return None
        except msgspec.ValidationError as error:
            text, _, where = str(error).partition(" - at `$")
            inner = (*path, *_path_of(where.rstrip("`")))
            if self._problems.has(inner):
                # A variable that is not set: its name is none of the option's values either.
                return None
            got = self._at(inner, path, value)
            for theirs, ours in (("`object`", "a mapping"), ("`array`", "a list"), ("`null`", "null")):
                text = text.replace(theirs, ours)
            wants = described(kind, name) or text[:1].lower() + text[1:]
            if "`str" in text and re.search(r"got (`int`|`float`|`bool`|null)", text):
                wants += "; put it in quotes"
            self._wrong(inner, f"{_shown(got)} is not valid: {wants}")
            return None

    def _at(self, inner: Path, path: Path, value: Any) -> Any:
        for part in inner[len(path) :]:
            value = value[part]
        return value

    def _wrong(self, path: Path, message: str) -> None:
        self._problems.add(self._tree.position(path), path, message)


def _options_of(hint: Any) -> list[Any]:
    """Return the members of a union, and what annotations are about."""
    if get_origin(hint) is Annotated:
        return _options_of(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return [option for part in get_args(hint) for option in _options_of(part)]
    return [hint]


def _required(kind: Any) -> list[str]:
    return [field.name for field in msgspec.structs.fields(kind) if field.required]


def _path_of(text: str) -> Path:
    """Take a path of msgspec apart, as far as it is told: ``.a[0]``."""
    parts: list[str | int] = []
    for name, index in re.findall(r"\.([^.\[\]]+)|\[(\.\.\.|\d+)\]", text):
        if index == "...":
            break
        parts.append(name or int(index))
    return tuple(parts)


def _unknown(kind: Any, name: str) -> str:
    known = kind.__struct_fields__
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"there is no such key; did you mean {near[0]!r}?"
    told = advice(name) if kind is DeploymentEntry else None
    if told is not None:
        return f"there is no such option: {told}"
    for other, where in _HOMES.items():
        if name in other.__struct_fields__ and other is not kind:
            return f"it is a key of {where}"
    return f"there is no such key; those there are: {', '.join(known)}"


#: Where keys belong that somebody puts into another place.
_HOMES: dict[Any, str] = {
    ApplicationEntry: "an application, in the list `applications`",
    DeploymentEntry: "a deployment, in the list `deployments` of an application",
    HTTPEntry: "`http`",
    Document: "the document as a whole",
}


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_names(tree: Tree, problems: Problems) -> None:
    """Names and routes can be used, and are there once; looked for in what is there, whatever else is wrong with it."""
    names, routes = _Once("an application of that name"), _Once("an application with that route")
    for path, application in _entries(tree.value, "applications", ()):
        name = application.get("name", "default")
        names.see(name, tree, problems, (*path, "name"))
        if isinstance(name, str) and ("/" in name or "#" in name):
            problems.add(tree.position((*path, "name")), (*path, "name"), 'a name has no "/" and "#" in it')
        target = application.get("import_path")
        if isinstance(target, str) and not re.fullmatch(r"[\w.]+:[\w.]+", target):
            where: Path = (*path, "import_path")
            problems.add(tree.position(where), where, f"{target!r} is not an import path: write MODULE:NAME")
        route = application.get("route_prefix", "/")
        if isinstance(route, str):
            where = (*path, "route_prefix")
            routes.see(route, tree, problems, where)
            try:
                check_prefix(route)
            except ConfigError as error:
                problems.add(tree.position(where), where, str(error))
        deployments = _Once("a deployment of that name")
        for inner, deployment in _entries(application, "deployments", path):
            deployments.see(deployment.get("name"), tree, problems, (*inner, "name"))


def _entries(value: Any, name: str, path: Path) -> list[tuple[Path, dict[str, Any]]]:
    entries = value.get(name)
    found = enumerate(entries if isinstance(entries, list) else ())
    return [((*path, name, index), entry) for index, entry in found if isinstance(entry, dict)]


class _Once:
    """Values that may be there once."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._lines: dict[str, int] = {}

    def see(self, value: Any, tree: Tree, problems: Problems, path: Path) -> None:
        if not isinstance(value, str):
            return
        position = tree.position(path)
        if value in self._lines:
            problems.add(position, path, f"there is {self._what} already, {value!r} in line {self._lines[value]}")
        else:
            self._lines[value] = position[0] + 1
