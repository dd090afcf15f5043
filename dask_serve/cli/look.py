"""Commands that look: status, config."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from .connecting import Cluster, cluster_options
from .messages import Failure, Misused, command

if TYPE_CHECKING:
    from distributed import Client

    from ..controller.status import ServeStatus

__all__ = ["config", "is_well", "status"]

#: Seconds after which `--watch` draws again, where nothing has happened but loads.
AGAIN = 2.0


@command("status", "status shop -v", "status --json", "status --watch", "status --check && echo all is well")
@click.argument("application", required=False, metavar="[APPLICATION]")
@click.option("-v", "--verbose", is_flag=True, help="Show replicas, proxies, workers and the last decisions too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; with --watch, one line for each change.")
@click.option("--yaml", "as_yaml", is_flag=True, help="Print YAML; with --watch, one document for each change.")
@click.option("-w", "--watch", is_flag=True, help="Show changes as they happen, until Ctrl-C.")
@click.option("--check", is_flag=True, help="Exit with 1 unless all applications run.")
@cluster_options
def status(  # noqa: PLR0917 - click passes them by name
    cluster: Cluster,
    application: str | None,
    verbose: bool,
    as_json: bool,
    as_yaml: bool,
    watch: bool,
    check: bool,
) -> None:
    """Show what runs on a cluster and how it fares.

    The exit code is 0 whatever the state, unless --check is given.
    """
    if as_json and as_yaml:
        raise Misused("--json and --yaml are two formats", "give one of them")
    if watch and check:
        raise Misused("--watch ends with Ctrl-C, and --check with an exit code", "give one of them")
    # Whoever watches has seen enough; that is no failure.
    with contextlib.suppress(KeyboardInterrupt) if watch else contextlib.nullcontext(), cluster.client() as client:
        if watch and sys.stdout.isatty():
            click.clear()
        for everything in _statuses(client, cluster, watch):
            found = _only(everything, application)
            _show(found, verbose=verbose, as_json=as_json, as_yaml=as_yaml, watch=watch)
    if check and not is_well(found):
        raise click.exceptions.Exit(1)


@command("config", "config > shop.yaml", short_help="Print what is desired on a cluster, as a YAML document.")
@cluster_options
def config(cluster: Cluster) -> None:
    """Print what is desired on a cluster, as a document for `dask serve deploy`.

    What was deployed from Python has no import path in it, and is said to have none.
    """
    import msgspec

    from ..controller.desired import DesiredState
    from ..document.rendering import render_desired
    from ..session.peers import ask

    with cluster.client() as client:
        answer = client.sync(ask, client.scheduler, "serve_desired")
        click.echo(render_desired(msgspec.msgpack.decode(answer["desired"], type=DesiredState)), nl=False)


def is_well(status: ServeStatus) -> bool:
    """Whether dask_serve runs and all its applications do."""
    return not status.message and all(one.status == "running" for one in status.applications.values())


def _statuses(client: Client, cluster: Cluster, watch: bool) -> Iterator[ServeStatus]:
    """Return the status, and with ``watch`` each that is new."""
    from .. import api
    from ..controller.status import decode_status
    from ..session.peers import probe

    found = api.status(client=client)
    yield found
    while watch:
        try:
            answer = client.sync(probe, client.scheduler, "serve_watch", since=found.version, timeout=AGAIN)
        except OSError as error:
            raise Failure(f"the scheduler at {cluster.address} is gone ({error})", "is it still running?") from error
        if answer is None:
            raise Failure(f"dask_serve does not run any more on the cluster at {cluster.address}")
        latest = decode_status(answer["status"])
        # Its numbers count anew after a restart.
        if latest != found:
            found = latest
            yield found


def _only(status: ServeStatus, application: str | None) -> ServeStatus:
    """Return the status without other applications."""
    if application is None:
        return status
    if application not in status.applications:
        known = ", ".join(status.applications) or "none"
        raise Failure(f"there is no application {application!r}", f"applications: {known}")
    import msgspec

    return msgspec.structs.replace(
        status,
        applications={application: status.applications[application]},
        events=[event for event in status.events if event.subject.partition("/")[0] == application],
    )


def _show(status: ServeStatus, *, verbose: bool, as_json: bool, as_yaml: bool, watch: bool) -> None:
    if as_json or as_yaml:
        click.echo(_written(status, as_yaml=as_yaml, watch=watch))
        return
    from .table import draw

    table = draw(status, verbose=verbose)
    if watch and sys.stdout.isatty():
        # Drawn over the last one, and what is left below it erased: no flicker.
        click.echo("\x1b[H" + "\n".join(f"{line}\x1b[K" for line in table.splitlines()) + "\n\x1b[J", nl=False)
    else:
        click.echo(f"{table}\n" if watch else table)


def _written(status: ServeStatus, *, as_yaml: bool, watch: bool) -> str:
    import msgspec

    plain: Any = msgspec.to_builtins(status)
    if not as_yaml:
        return json.dumps(plain, indent=None if watch else 2)
    import yaml

    return str(yaml.safe_dump(plain, sort_keys=False, explicit_start=watch)).rstrip()
