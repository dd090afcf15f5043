"""Values to YAML that `nodes.read` reads as the same values."""

from __future__ import annotations

from typing import Any

import yaml

from .nodes import RESOLVERS, Plain

__all__ = ["WIDTH", "dump"]

#: Characters of a line, where there is a choice.
WIDTH = 118


class _Dumper(yaml.SafeDumper):
    """Puts texts into quotes that YAML 1.1 or 1.2 would take for something else."""

    yaml_implicit_resolvers = {
        first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *RESOLVERS.get(first, [])]
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *RESOLVERS}
    }

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.Node:
    # A variable in quotes is a text whatever it holds; and only these say which characters there are.
    style = '"' if "$" in text or not text.isprintable() else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _plain(dumper: _Dumper, text: Plain) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", str(text))


_Dumper.add_representer(str, _text)
_Dumper.add_representer(Plain, _plain)


def dump(value: dict[str, Any]) -> list[str]:
    """Return the lines of a mapping."""
    text: str = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=WIDTH, default_flow_style=False
    )
    # Not splitlines, for which there are more ends of lines than YAML has.
    return text.rstrip("\n").split("\n")
