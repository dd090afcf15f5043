"""YAML to plain values, with the line of each.

Plain words mean what they mean in YAML 1.2: ``true`` and ``false`` are the booleans, ``on``, ``no`` and ``1:30`` are
texts. JSON is YAML too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import yaml
from msgspec import Struct

from .problems import Path, Problems

__all__ = ["RESOLVERS", "Plain", "Tree", "read"]

#: Bytes and values of the largest document.
LARGEST, MOST = 2**20, 50_000

_variable = re.compile(
    r"\$(?:\$|\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?P<default>:-(?P<text>[^}]*))?\}|\{(?P<bad>[^}]*)\}?)"
)

_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
_SEQUENCE, _MAPPING = "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"
_PLAIN = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
)


class _Loader(yaml.SafeLoader):
    """Composes nodes; values are made here, not by PyYAML."""

    yaml_implicit_resolvers: dict[str, Any] = {}


for _kind, _pattern, _first in _PLAIN:
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})\Z"), [c if c != "\0" else "" for c in _first]
    )


#: What plain words stand for, as PyYAML keeps it.
RESOLVERS: dict[str, Any] = _Loader.yaml_implicit_resolvers


class Plain(str):
    """A text with variables that stood without quotes: filled in, it may be a number."""

    __slots__ = ()


class Tree(Struct):
    """A document's values.

    Attributes
    ----------
    value
        Dictionaries, lists, texts, numbers, booleans and None.
    raw
        The same before variables were filled in.
    values, keys : dict
        Line and column, from 0 on, of the value and of the key at a path.
    """

    value: Any
    raw: Any
    values: dict[Path, tuple[int, int]]
    keys: dict[Path, tuple[int, int]]

    def position(self, path: Path) -> tuple[int, int]:
        """Return where a value stands, or what it would be in."""
        while path not in self.values and path:
            path = path[:-1]
        return self.values.get(path, (0, 0))

    def key(self, path: Path) -> tuple[int, int]:
        """Return where a key stands."""
        return self.keys.get(path, self.position(path))


def read(text: str, problems: Problems, environment: Mapping[str, str] | None = None) -> Tree:
    """Read a document.

    Parameters
    ----------
    text : str
        YAML or JSON.
    problems : Problems
        Gets what is wrong with it.
    environment : mapping, optional
        The variables that ``${NAME}`` and ``${NAME:-default}`` stand for; by default those of this process.
    """
    if len(text) > LARGEST:
        problems.add((0, 0), (), f"a document has at most {LARGEST} bytes")
        problems.check()
    loader = None
    try:
        # In JSON a tab is only ever between values, where YAML takes none.
        loader = _Loader(text.replace("\t", " ") if text.lstrip().startswith(("{", "[")) else text)
        node = loader.get_single_node()
        reader = _Reader(loader, problems, os.environ if environment is None else environment)
        value = None if node is None else reader.make(node, ())
        raw = None if node is None else _Reader(loader, Problems(problems.name), None).make(node, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        position = (0, 0) if mark is None else (mark.line, mark.column)
        said = ": ".join(part for part in (error.context, error.problem) if part) or "it cannot be read"
        hint = "; inside [] and {}, put ${...} into quotes" if _in_flow(text, position) else ""
        problems.add(position, (), f"this is not YAML: {said}{hint}")
        problems.check()
        raise
    except yaml.reader.ReaderError as error:
        problems.add((text[: error.position].count("\n"), 0), (), f"this is not YAML: {error.reason}")
        problems.check()
        raise
    except RecursionError:
        problems.add((0, 0), (), "too much is nested in it")
        problems.check()
        raise
    finally:
        if loader is not None:
            loader.dispose()
    return Tree(value, raw, reader.values, reader.keys)


class _Reader:
    """Makes values of nodes."""

    def __init__(self, loader: _Loader, problems: Problems, environment: Mapping[str, str] | None) -> None:
        self.values: dict[Path, tuple[int, int]] = {}
        self.keys: dict[Path, tuple[int, int]] = {}
        self._loader = loader
        self._problems = problems
        self._environment = environment
        self._open: list[yaml.Node] = []
        self._made = 0

    def make(self, node: yaml.Node, path: Path) -> Any:
        position = (node.start_mark.line, node.start_mark.column)
        self.values[path] = position
        self._made += 1
        if self._made > MOST or any(node is other for other in self._open):
            self._problems.add(position, path, "an alias repeats what it is in" if self._made <= MOST else "too long")
            self._problems.check()
        self._open.append(node)
        try:
            if not isinstance(node, yaml.ScalarNode) and node.tag not in (_SEQUENCE, _MAPPING):
                self._problems.add(position, path, f"the tag {node.tag!r} means nothing here: leave it out")
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                return [self.make(item, (*path, index)) for index, item in enumerate(node.value)]
            return self._scalar(node, path)
        finally:
            self._open.pop()

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        made: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key, item in node.value:
            position = (key.start_mark.line, key.start_mark.column)
            if key.tag == _MERGE:
                self._merge(item, path, merged)
                continue
            if not isinstance(key, yaml.ScalarNode):
                self._problems.add(position, path, "a key is a text")
                continue
            name = _text(key.value)
            name_path: Path = (*path, name)
            if name in made:
                first = self.keys[name_path][0] + 1
                self._problems.add(position, name_path, f"it is given twice, in line {first} too")
            self.keys[name_path] = position
            made[name] = self.make(item, name_path)
        return {**merged, **made}

    def _merge(self, node: yaml.Node, path: Path, into: dict[str, Any]) -> None:
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for part in parts:
            if not isinstance(part, yaml.MappingNode):
                self._problems.add((part.start_mark.line, part.start_mark.column), path, "<< takes a mapping")
                continue
            known = dict(self.values), dict(self.keys)
            for name, value in self._mapping(part, path).items():
                into.setdefault(name, value)
            # What stands in the mapping itself goes first.
            self.values.update(known[0])
            self.keys.update(known[1])

    def _scalar(self, node: yaml.ScalarNode, path: Path) -> Any:
        tag, text = node.tag, _text(node.value)
        if self._environment is None and node.style is None and "$" in text:
            return Plain(text)
        if self._environment is not None and "$" in text:
            text = _variable.sub(lambda found: self._fill(found, node, path), text)
            if node.style is None and tag == _TEXT:
                # What a variable holds is a number or a text, as if it stood here.
                tag = self._loader.resolve(yaml.ScalarNode, text, (True, False))
        return self._value(tag, text, node, path)

    def _value(self, tag: str, text: str, node: yaml.ScalarNode, path: Path) -> Any:
        kind = tag.rpartition(":")[2] if tag.startswith("tag:yaml.org,2002:") else tag
        if kind in ("str", "merge"):
            return text
        try:
            if kind == "null":
                return None
            if kind == "bool":
                return {"true": True, "false": False}[text.lower()]
            if kind == "int":
                return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
            if kind == "float":
                return float(text.replace(".", "") if text.lower().lstrip("+-") in (".inf", ".nan") else text)
        except (ValueError, KeyError):
            pass
        position = (node.start_mark.line, node.start_mark.column)
        self._problems.add(position, path, f"{text!r} cannot be read with the tag {tag!r}: leave the tag out")
        return text

    def _fill(self, found: re.Match[str], node: yaml.ScalarNode, path: Path) -> str:
        assert self._environment is not None
        name = found["name"]
        position = (node.start_mark.line, node.start_mark.column)
        if name is None:
            if found["bad"] is None:
                return "$"
            self._problems.add(
                position, path, f"{found[0]!r} names no variable: write ${{NAME}} or ${{NAME:-default}}, or $$ for a $"
            )
            return found[0]
        value = self._environment.get(name)
        if value or (value is not None and found["default"] is None):
            return value
        if found["default"] is not None:
            return found["text"]
        self._problems.add(
            position,
            path,
            f"the environment variable {name} is not set: set it, or write a default, ${{{name}:-...}}, or "
            f"$${{{name}}} for the text itself",
        )
        return found[0]


def _in_flow(text: str, position: tuple[int, int]) -> bool:
    """Whether a parser may have stumbled over the brace of a variable."""
    return "${" in "".join(text.splitlines()[position[0] : position[0] + 1])[: position[1] + 1]


def _text(text: str) -> str:
    """Put pairs of surrogates together, as JSON writes characters beyond 16 bits."""
    if any("\ud800" <= char <= "\udfff" for char in text):
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
