"""The status as a table for people."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from .messages import coloured

if TYPE_CHECKING:
    from ..controller.status import DeploymentStatus, ProxyStatus, ServeStatus

__all__ = ["COLOURS", "columns", "draw"]

#: How states are shown on a terminal.
COLOURS = {
    "running": "green",
    "ready": "green",
    "ok": "green",
    "deploying": "yellow",
    "starting": "yellow",
    "draining": "yellow",
    "deleting": "yellow",
    "unhealthy": "red",
    "failed": "red",
    "wrong": "red",
}
#: Characters of a revision that tell it from others.
BRIEF = 8
#: The last column has at least so many characters.
LEAST = 20


def draw(status: ServeStatus, *, verbose: bool = False) -> str:
    """Return the status as lines for people.

    Parameters
    ----------
    status : ServeStatus
        What is shown.
    verbose : bool
        With replicas, proxies, workers and the last decisions.
    """
    lines = [f"HTTP at {status.url}" if status.url else "HTTP is not served"]
    lines += [coloured(line, "red") for line in status.message.splitlines()]
    rows = [
        [name, deployment, found.status, _ready(found), _revisions(found), _message(found)]
        for name, application in sorted(status.applications.items())
        for deployment, found in application.deployments.items()
    ]
    if rows:
        lines += columns(["APPLICATION", "DEPLOYMENT", "STATE", "REPLICAS", "REVISION", "MESSAGE"], rows)
    else:
        lines.append("no applications")
    if verbose:
        lines += _replicas(status)
        lines += _proxies(status.proxies)
        lines += _section("WORKERS", [str(worker) for worker in status.workers])
        lines += _section("LAST DECISIONS", [str(event) for event in status.events])
    return "\n".join(lines)


def columns(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return lines with aligned columns; on a terminal the last one is cut to what is left of the line."""
    table = [titles, *rows]
    widths = [max(len(row[index]) for row in table) for index in range(len(titles))]
    if sys.stdout.isatty():
        used = sum(width + 2 for width in widths[:-1])
        widths[-1] = max(shutil.get_terminal_size().columns - used - 1, LEAST)
    lines = []
    for row in table:
        cells = [_fit(text, width) for text, width in zip(row, widths, strict=True)]
        lines.append("  ".join(_coloured(text) for text in cells).rstrip())
    return lines


def _fit(text: str, width: int) -> str:
    return f"{text[: width - 1]}…" if len(text) > width else text.ljust(width)


def _coloured(cell: str) -> str:
    return coloured(cell, COLOURS.get(cell.strip()))


def _ready(deployment: DeploymentStatus) -> str:
    scaling = deployment.autoscaling
    bounds = "" if scaling is None else f" of {scaling.min_replicas}-{scaling.max_replicas}"
    return f"{deployment.counts.get('ready', 0)}/{deployment.target}{bounds}"


def _revisions(deployment: DeploymentStatus) -> str:
    """Return the revisions of the replicas, the oldest first: there are two during a rolling update."""
    return ",".join(dict.fromkeys(replica.revision[:BRIEF] for replica in deployment.replicas))


def _message(deployment: DeploymentStatus) -> str:
    """Return the line that says most; of a traceback that is the last."""
    return next(iter((deployment.message or deployment.setback).strip().splitlines()[::-1]), "").strip()


def _replicas(status: ServeStatus) -> list[str]:
    rows = [
        [replica.id, replica.state, replica.worker, replica.revision[:BRIEF], replica.message.strip()]
        for application in status.applications.values()
        for deployment in application.deployments.values()
        for replica in deployment.replicas
    ]
    return ["", *columns(["REPLICA", "STATE", "WORKER", "REVISION", "MESSAGE"], rows)] if rows else []


def _proxies(proxies: Sequence[ProxyStatus]) -> list[str]:
    return _section("PROXIES", [str(proxy) for proxy in proxies])


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return ["", title, *lines] if lines else []
