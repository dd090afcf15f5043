"""What a document would change, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from ..config import RESTARTING_OPTIONS, HTTPOptions
from ..controller.desired import DesiredState
from ..policy.desired import ApplicationSpec, DeploymentSpec
from .nodes import read
from .problems import Problems

__all__ = ["difference"]


def difference(
    now: DesiredState, specs: Sequence[ApplicationSpec], http: tuple[HTTPOptions, Sequence[str]], prune: bool = False
) -> list[str]:
    """Return a line for each thing that would change; none where nothing would.

    Parameters
    ----------
    now : DesiredState
        What is desired on the cluster.
    specs : sequence of ApplicationSpec
        What is to be desired.
    http : tuple
        Options of the proxies, and the names of those that are to change.
    prune : bool
        Other applications are to go.
    """
    before = {entry.spec.name: entry.spec for entry in now.applications}
    lines = list(_http(now, *http, routed=any(spec.route_prefix is not None for spec in specs)))
    for spec in specs:
        lines += _application(before.get(spec.name), spec)
    if prune:
        names = {spec.name for spec in specs}
        lines += [f"- application {name!r}" for name in sorted(before.keys() - names)]
    return lines


def _http(now: DesiredState, wanted: HTTPOptions, explicit: Sequence[str], *, routed: bool) -> Iterator[str]:
    if now.http is None:
        if explicit or routed:
            yield "+ proxies"
        yield from (f"    {name}: {_shown(getattr(wanted, name))}" for name in sorted(explicit))
        return
    for name in sorted(explicit):
        before, after = getattr(now.http, name), getattr(wanted, name)
        if before != after:
            yield f"~ http {name}: {_shown(before)} → {_shown(after)}"


def _application(before: ApplicationSpec | None, after: ApplicationSpec) -> Iterator[str]:
    if before is None:
        route = f" at {after.route_prefix}" if after.route_prefix else ""
        yield f"+ application {after.name!r}{route}"
        for deployment in after.deployments:
            number = deployment.options.num_replicas
            yield f"    + deployment {deployment.name!r}, replicas: {number}"
        return
    if before == after:
        return
    yield f"~ application {after.name!r}"
    for name in ("route_prefix", "ingress"):
        yield from _change(name, getattr(before, name), getattr(after, name))
    # No argument is the same as none that is known.
    paths = (getattr(spec.source, "import_path", None) for spec in (before, after))
    yield from _change("import_path", *paths)
    yield from _change("args", _arguments(before), _arguments(after))
    old = {deployment.name: deployment for deployment in before.deployments}
    new = {deployment.name: deployment for deployment in after.deployments}
    for name, spec in new.items():
        if name not in old:
            yield f"    + deployment {name!r}, replicas: {spec.options.num_replicas}"
        elif old[name] != spec:
            yield from _deployment(old[name], spec)
    for name in old:
        if name not in new:
            yield f"    - deployment {name!r}"
    if getattr(before.source, "overrides", None) != getattr(after.source, "overrides", None):
        yield "    which options are the document's, and which are the code's"


def _arguments(spec: ApplicationSpec) -> Any:
    """Return the arguments as they are written, variables not filled in."""
    if spec.source is None or not spec.source.args:
        return None
    return read(spec.source.args, Problems(spec.name)).raw["args"]


def _change(name: str, before: Any, after: Any) -> Iterator[str]:
    if before != after:
        yield f"    {name}: {_shown(before)} → {_shown(after)}"


def _deployment(before: DeploymentSpec, after: DeploymentSpec) -> Iterator[str]:
    restarts = before.revision != after.revision
    yield f"    ~ deployment {after.name!r}{', its replicas are replaced' if restarts else ', in place'}"
    by_option = False
    for name in after.options.__struct_fields__:
        old, new = getattr(before.options, name), getattr(after.options, name)
        if old != new:
            by_option = by_option or name in RESTARTING_OPTIONS
            yield f"        {name}: {_shown(old)} → {_shown(new)}"
    if restarts and not by_option:
        yield "        its code or what is bound into it"


def _shown(value: Any) -> str:
    # Texts with variables are of a class of their own.
    text = msgspec.json.encode(value, enc_hook=str).decode()
    return text if len(text) <= 80 else f"{text[:77]}..."
