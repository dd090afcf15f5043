"""The status as notebooks show it: tables in the colours of the page, light or dark; everything is escaped.

No script and no style sheet: a notebook keeps the text for years, and may drop both. Colours that tell something are
readable on white and on black; all others are the page's own.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from html import escape

from dask.utils import format_bytes

from .history import signed
from .status import (
    ApplicationStatus,
    DeploymentStatus,
    ErrorStatus,
    ProxyStatus,
    ReplicaStatus,
    ServeStatus,
    clock,
)

__all__ = ["of_application", "of_deployment", "of_service"]

_COLOURS = {
    "running": "#2e9e5b",
    "ready": "#2e9e5b",
    "deploying": "#2f81d6",
    "starting": "#2f81d6",
    "unhealthy": "#c77700",
    "draining": "#c77700",
    "failed": "#d64545",
    "deleting": "#8a8f98",
}
_GREY = "#8a8f98"
_LINE = "1px solid rgba(128,128,128,.35)"
_CELL = f"padding:.25em .8em .25em 0;border:0;border-bottom:{_LINE};text-align:left;vertical-align:top"
_NUMBER = _CELL.replace("text-align:left", "text-align:right")
#: Replicas that are shown of a deployment; the others are counted.
SHOWN = 20


def of_service(status: ServeStatus) -> str:
    """Return all of it."""
    where = _link(status.url) if status.url else "HTTP is not served"
    parts = [f'<div style="margin-bottom:.5em"><b>dask_serve</b> {_quiet("·")} {where}{_proxies(status.proxies)}</div>']
    if status.message:
        parts.append(_notice(status.message, "unhealthy"))
    if not status.applications:
        parts.append(f"<div>{_quiet('no applications')}</div>")
    parts += [_application(name, application, status) for name, application in status.applications.items()]
    if status.events:
        lines = "".join(f"<div>{_text(str(event))}</div>" for event in reversed(status.events))
        parts.append(_folded(f"decisions: {len(status.events)}, the last one first", lines))
    return _page(parts)


def of_application(name: str, application: ApplicationStatus) -> str:
    """Return one application."""
    return _page([_application(name, application)])


def of_deployment(name: str, deployment: DeploymentStatus) -> str:
    """Return one deployment."""
    return _page(_deployment(name, deployment))


def _application(name: str, application: ApplicationStatus, service: ServeStatus | None = None) -> str:
    route = (
        "" if application.route_prefix is None else f" {_quiet('at')} <code>{_text(application.route_prefix)}</code>"
    )
    version = ""
    if application.version:
        told = signed(application.reason, application.owner, application.deployed_at)
        version = f"<div>{_quiet(f'version {application.version}, {told}')}</div>"
    head = f"<div><b>{_text(name or application.ingress)}</b> {_badge(application.status)}{route}</div>{version}"
    loads = {} if service is None else {id: str(load) for id, load in service.loads.items()}
    rows = []
    for other, deployment in application.deployments.items():
        rows += _deployment(other, deployment, loads.get(f"{name}/{other}", ""))
    style = f"border-left:3px solid {_colour(application.status)};padding-left:.8em;margin:0 0 1em 0"
    return f'<div style="{style}">{head}{"".join(rows)}</div>'


def _deployment(name: str, deployment: DeploymentStatus, load: str = "") -> list[str]:
    ready = deployment.counts.get("ready", 0)
    told = [f"{ready} of {deployment.target} ready"]
    if deployment.in_flight or deployment.queued:
        told.append(f"{deployment.in_flight} in flight, {deployment.queued} queued")
    if deployment.revision:
        told.append(f"revision {deployment.revision[:8]}")
    title = f"{_text(name)} " if name else ""
    head = f'<div style="margin-top:.7em">{title}{_badge(deployment.status)} {_quiet(" · ".join(told))}</div>'
    parts = [head]
    notes = [deployment.decision, deployment.setback if deployment.setback not in deployment.message else "", load]
    if deployment.autoscaling is not None:
        scaling = deployment.autoscaling
        notes.append(f"{deployment.target} of {scaling.min_replicas} to {scaling.max_replicas}: {scaling.why}")
    parts += [f"<div>{_quiet(note)}</div>" for note in notes if note]
    if deployment.message:
        parts.append(_notice(deployment.message, deployment.status))
    if deployment.replicas:
        parts.append(_replicas(deployment.replicas, deployment.revision))
    parts += [_error(error) for error in reversed(deployment.errors)]
    return parts


def _replicas(replicas: Sequence[ReplicaStatus], revision: str) -> str:
    extra = {
        "models": any(replica.models for replica in replicas),
        "devices": any(replica.devices for replica in replicas),
        "environment": any(replica.environment for replica in replicas),
        "note": any(replica.message or replica.revision != revision for replica in replicas),
    }
    names = ["replica", "state", "since", "in flight", "queued", "memory", "worker"]
    names += [name for name, there in extra.items() if there]
    head = "".join(
        f'<th style="{_NUMBER if name in _NUMBERS else _CELL};color:{_GREY};font-weight:normal">{name}</th>'
        for name in names
    )
    rows = []
    for replica in replicas[:SHOWN]:
        note = replica.message
        if replica.revision != revision:
            note = f"revision {replica.revision[:8]}{': ' if note else ''}{note}"
        cells = [
            _td(f"<code>{_text(replica.id.rpartition('/')[2])}</code>"),
            _td(_badge(replica.state)),
            _td(f'<span title="{_text(clock(replica.since))}">{_ago(replica.since)}</span>' if replica.since else ""),
            _td(str(replica.in_flight), _NUMBER),
            _td(str(replica.queued), _NUMBER),
            _td(format_bytes(replica.memory) if replica.memory else "", _NUMBER),
            _td(f"<code>{_text(replica.worker)}</code>"),
        ]
        if extra["models"]:
            cells.append(_td(_text(", ".join(replica.models))))
        if extra["devices"]:
            cells.append(_td(_text(", ".join(replica.devices))))
        if extra["environment"]:
            cells.append(_td(f"<code>{_text(replica.environment)}</code>"))
        if extra["note"]:
            cells.append(_td(_text(note)))
        rows.append(f"{_ROW}{''.join(cells)}</tr>")
    more = len(replicas) - SHOWN
    rest = f"<div>{_quiet(f'and {more} more')}</div>" if more > 0 else ""
    return f'<div style="overflow-x:auto">{_TABLE}{_ROW}{head}</tr>{"".join(rows)}</table>{rest}</div>'


# Notebooks stripe rows, in a colour that is right for one of their two themes.
_ROW = '<tr style="background:transparent">'
_TABLE = '<table style="border-collapse:collapse;margin:.3em 0;font-size:inherit;color:inherit;background:transparent">'
_NUMBERS = ("in flight", "queued", "memory")


def _error(error: ErrorStatus) -> str:
    more = f", {error.count} requests" if error.count > 1 else ""
    when = _quiet(f"{clock(error.time)}, request {error.request_id} in {error.replica}{more}")
    red = _COLOURS["failed"]
    head = f'<span style="color:{red}">{_text(error.summary)}</span> {when}'
    return _folded(
        head, f'<pre style="margin:.3em 0;white-space:pre-wrap">{_text(error.traceback)}</pre>', escaped=True
    )


def _proxies(proxies: Sequence[ProxyStatus]) -> str:
    if not proxies:
        return ""
    states: dict[str, int] = {}
    for proxy in proxies:
        states[proxy.state] = states.get(proxy.state, 0) + 1
    told = ", ".join(f"{number} {state}" for state, number in states.items())
    return f" {_quiet(f'· proxies: {told}')}"


# -- pieces ------------------------------------------------------------------------------------------------------------


def _page(parts: Iterable[str]) -> str:
    return f'<div style="font-size:13px;line-height:1.5;color:inherit">{"".join(parts)}</div>'


def _text(text: object) -> str:
    return escape(str(text), quote=True)


def _colour(state: str) -> str:
    return _COLOURS.get(state, _GREY)


def _badge(state: str) -> str:
    colour = _colour(state)
    dot = f'<span style="display:inline-block;width:.6em;height:.6em;border-radius:50%;background:{colour}"></span>'
    return f'<span style="white-space:nowrap">{dot} <span style="color:{colour}">{_text(state)}</span></span>'


def _quiet(text: str) -> str:
    return f'<span style="color:{_GREY}">{_text(text)}</span>'


def _notice(text: str, state: str) -> str:
    style = f"margin:.3em 0;padding:.4em .7em;border-left:3px solid {_colour(state)};white-space:pre-wrap"
    if "Traceback" in text:
        style += ";font-family:monospace"
    return f'<div style="{style};background:rgba(128,128,128,.12);overflow-x:auto">{_text(text)}</div>'


def _folded(title: str, inside: str, escaped: bool = False) -> str:
    head = title if escaped else _quiet(title)
    return f'<details style="margin:.2em 0"><summary style="cursor:pointer">{head}</summary>{inside}</details>'


def _td(inside: str, style: str = _CELL) -> str:
    return f'<td style="{style}">{inside}</td>'


def _link(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        return f"<code>{_text(url)}</code>"
    return f'<a href="{_text(url)}" target="_blank" style="color:inherit">{_text(url)}</a>'


def _ago(since: float) -> str:
    seconds = max(0, int(time.time() - since))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"
