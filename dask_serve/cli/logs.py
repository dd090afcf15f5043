"""`dask serve logs`: the last log records of replicas, proxies and the controller."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from .asking import ask_workers
from .connecting import Cluster, cluster_options
from .messages import Failure, coloured, command

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["logs"]

#: Seconds between two looks for new records.
LOOK = 0.5
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
COLOURS = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}


@command(
    "logs",
    "logs shop/Model --follow",
    "logs shop/Model/3f6912 --tail 20 --level warning",
    "logs shop --json",
    short_help="Show the last log records of replicas, proxies and controller.",
)
@click.argument("what", metavar="[APPLICATION[/DEPLOYMENT[/REPLICA]]]", default="")
@click.option("-f", "--follow", is_flag=True, help="Go on with new records, until Ctrl-C.")
@click.option("-n", "--tail", type=click.IntRange(0), default=100, show_default=True, help="How many of the last ones.")
@click.option("--level", type=click.Choice(LEVELS, case_sensitive=False), default="DEBUG", help="From this level on.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
@cluster_options
def logs(  # noqa: PLR0917 - click passes them by name
    cluster: Cluster, what: str, follow: bool, tail: int, level: str, as_json: bool
) -> None:
    """Show the last log records of replicas, of the proxies and of the controller.

    Each process keeps its last 2000 in memory, at the levels that its loggers have. Those of a process that ended are
    gone, and what processes log before they have a replica is in the workers' own output. What replicas print is there
    too, and the lines of the access log, where that is on (`access_log` of the proxies).
    """
    with contextlib.suppress(KeyboardInterrupt) if follow else contextlib.nullcontext(), cluster.client() as client:
        source = Source(client)
        found = _chosen(source.read(), what, level)
        if what and not found and not source.runs(what):
            raise Failure(f"there is no {what}, nor a record of it", "`dask serve status` tells what runs")
        _print(found[len(found) - tail :] if tail < len(found) else found, as_json)
        while follow:
            time.sleep(LOOK)
            _print(_chosen(source.read(), what, level), as_json)


class Source:
    """Where the records of a cluster come from; each is read once.

    Parameters
    ----------
    client : Client
        Of the cluster.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        #: Number of the last record of each process.
        self._known: dict[str, int] = {}

    def read(self) -> list[dict[str, Any]]:
        """Return the records that are new, the oldest first."""
        answers = [(self._controller(), "controller"), *self._workers()]
        found: list[dict[str, Any]] = []
        seen = set()
        for answer, source in answers:
            # A scheduler and workers of one process have the same ones.
            if not answer or answer["id"] in seen:
                continue
            seen.add(answer["id"])
            found += ({"source": source, **record} for record in answer["records"])
            if answer["records"]:
                self._known[answer["id"]] = answer["records"][-1]["number"]
        return sorted(found, key=lambda record: record["time"])

    def runs(self, what: str) -> bool:
        """Whether there is such an application, deployment or replica."""
        from .. import api

        app, _, rest = what.partition("/")
        deployment, _, replica = rest.partition("/")
        application = api.status(client=self._client).applications.get(app)
        if application is None or not deployment:
            return application is not None
        found = application.deployments.get(deployment)
        return found is not None and (not replica or any(one.id == what for one in found.replicas))

    def _controller(self) -> dict[str, Any]:
        from ..session.peers import ask

        try:
            return dict(self._client.sync(ask, self._client.scheduler, "serve_logs", known=self._known))
        except OSError as error:
            raise Failure(f"the scheduler does not answer any more ({error})", "is it still running?") from error

    def _workers(self) -> Iterable[tuple[dict[str, Any], str]]:
        from ..records import told_since

        answers = ask_workers(self._client, told_since, self._known)
        return [(answer.value, answer.worker) for answer in answers if answer.value]


def _chosen(found: Iterable[dict[str, Any]], what: str, level: str) -> list[dict[str, Any]]:
    least = LEVELS.index(level.upper())
    return [record for record in found if _is_about(record, what) and _rank(record["level"]) >= least]


def _is_about(record: dict[str, Any], what: str) -> bool:
    if not what:
        return True
    named = record.get("replica", "")
    if not named and "deployment" in record:
        # A line of the access log.
        named = f"{record['application']}/{record['deployment']}"
    if named:
        return bool(named == what or named.startswith(f"{what}/"))
    # The controller's own: they name what they are about.
    if not record["logger"].startswith("dask_serve"):
        return False
    return (
        what in record["message"] if "/" in what else f"{what}/" in record["message"] or repr(what) in record["message"]
    )


def _rank(level: str) -> int:
    return LEVELS.index(level) if level in LEVELS else 1


def _print(found: Iterable[dict[str, Any]], as_json: bool) -> None:
    for record in found:
        request = record.get("request", "")
        if as_json:
            # The same names as those of `dask_serve.logs.JSONFormatter`.
            told = {key: value for key, value in record.items() if key not in {"number", "request"}}
            click.echo(json.dumps({**told, "request_id": request} if request else told))
            continue
        when = datetime.fromtimestamp(record["time"]).astimezone().strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
        who = record.get("replica") or record["source"]
        line = f"{when} {record['level']:<7} {who} {record['logger']}: {record['message']}"
        if request and request not in record["message"]:
            first, *rest = line.split("\n", 1)
            line = "\n".join([f"{first} [{request}]", *rest])
        click.echo(coloured(line, COLOURS.get(record["level"])))
