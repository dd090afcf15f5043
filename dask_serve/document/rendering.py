"""From what is desired to a document."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence
from typing import Any

import msgspec

from ..config import DeploymentOptions, HTTPOptions, RuntimeEnv
from ..controller.desired import DesiredState
from ..options import documented
from ..policy.desired import ApplicationSpec, DeploymentSpec
from .declaration import VERSION
from .dumping import WIDTH, dump
from .shipped import SCHEMA

__all__ = ["render", "render_desired", "render_plain"]


def render(
    specs: Sequence[ApplicationSpec],
    http: tuple[HTTPOptions, Collection[str]] = (HTTPOptions(), ()),
    *,
    notes: dict[str, str] | None = None,
    head: str = "",
    explain: bool = False,
) -> str:
    """Return a document.

    Parameters
    ----------
    specs : sequence of ApplicationSpec
        Its applications.
    http : tuple
        Options of the proxies, and the names of those that the document is to have.
    notes : dict, optional
        Comments at applications, by name.
    head : str
        A comment at the beginning.
    explain : bool
        A comment at each option says what it means.
    """
    lines = [f"# yaml-language-server: $schema={SCHEMA.as_uri()}", *_comment(head), f"version: {VERSION}"]
    options = {name: getattr(http[0], name) for name in HTTPOptions.__struct_fields__ if name in http[1]}
    if options:
        lines += ["", "http:", *_indented(_options(options, HTTPOptions, explain))]
    elif explain:
        lines += ["", "# Options of the proxies, those of serve.start:", "# http:", "#   port: 8000"]
    lines += ["", "applications:"] if specs else ["", "applications: []"]
    for spec in specs:
        entry = _application(spec, explain, (notes or {}).get(spec.name, ""))
        lines += [f"  - {entry[0]}", *_indented(entry[1:], 4), ""]
    return "\n".join(line.rstrip() for line in lines).rstrip() + "\n"


def render_plain(document: dict[str, Any], head: str = "") -> str:
    """Return a document of plain values, none of which is a variable."""
    body: list[str] = []
    for name, value in document.items():
        body += ["", *dump({name: _text(value)})] if body else dump({name: _text(value)})
    lines = [f"# yaml-language-server: $schema={SCHEMA.as_uri()}", *_comment(head), *body]
    return "\n".join(line.rstrip() for line in lines).rstrip() + "\n"


def render_desired(state: DesiredState) -> str:
    """Return what is desired on a cluster as a document; what was deployed from Python is said to be."""
    notes = {}
    for entry in state.applications:
        if entry.spec.source is None:
            who = f" by {entry.by.owner}" if entry.by.owner else ""
            notes[entry.spec.name] = (
                f"Deployed from Python{who}, so that its import path is not known: name it to use this document."
            )
    specs = [entry.spec for entry in state.applications]
    return render(specs, (state.http or HTTPOptions(), state.explicit), notes=notes)


def _application(spec: ApplicationSpec, explain: bool, note: str) -> list[str]:
    source = spec.source
    lines = [
        *dump({"name": _text(spec.name)}),
        *_comment(note),
        *dump({"import_path": None if source is None else source.import_path, "route_prefix": spec.route_prefix}),
    ]
    if source is not None and source.args:
        # As written: variables are not filled in.
        lines += source.args.splitlines()
    overrides = {} if source is None else source.overrides
    entries = []
    for deployment in spec.deployments:
        options = _chosen(deployment, overrides.get(deployment.name, ()))
        body = [*dump({"name": deployment.name}), *_options(options, DeploymentOptions, explain)]
        entries += [f"  - {body[0]}", *_indented(body[1:], 4)]
    return [*lines, "deployments:", *entries]


def _chosen(deployment: DeploymentSpec, given: Collection[str]) -> dict[str, Any]:
    """Return the options that differ from the defaults, and those that a document gave."""
    options, defaults = deployment.options, DeploymentOptions()
    chosen = {}
    for name in options.__struct_fields__:
        value = getattr(options, name)
        if value != getattr(defaults, name) or name in given:
            chosen[name] = value
    if isinstance(value := chosen.get("runtime_env"), RuntimeEnv):
        empty = RuntimeEnv()
        differ = [field for field in value.__struct_fields__ if getattr(value, field) != getattr(empty, field)]
        chosen["runtime_env"] = {field: getattr(value, field) for field in differ}
    scaling = options.autoscaling_config
    if scaling is not None:
        usual = type(scaling)()
        differ = [n for n in scaling.__struct_fields__ if getattr(scaling, n) != getattr(usual, n)]
        chosen["autoscaling_config"] = {name: getattr(scaling, name) for name in differ}
        # Each of the two stands for both.
        chosen.pop("num_replicas" if differ else "autoscaling_config", None)
    else:
        chosen.pop("autoscaling_config", None)
    return chosen


def _options(options: dict[str, Any], kind: type[msgspec.Struct], explain: bool) -> list[str]:
    meanings = documented(kind) if explain else {}
    lines = []
    for name, value in options.items():
        if name in meanings:
            first = meanings[name].split(". ")[0].rstrip(".:")
            lines += _comment(first.replace("``", ""))
        lines += dump({name: _text(value)})
    return lines


def _text(value: Any) -> Any:
    """Return plain values that are read as what they are."""
    value = msgspec.json.decode(msgspec.json.encode(value))
    return _escaped(value)


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("$", "$$") if "${" in value or "$$" in value else value
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    if isinstance(value, dict):
        return {name: _escaped(item) for name, item in value.items()}
    return value


def _comment(text: str) -> list[str]:
    return [f"# {line}" for part in text.splitlines() for line in textwrap.wrap(part, WIDTH - 12)]


def _indented(lines: Sequence[str], by: int = 2) -> list[str]:
    return [" " * by + line if line else line for line in lines]
