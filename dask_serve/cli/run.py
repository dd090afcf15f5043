"""`dask serve run`: one application, until Ctrl-C."""

from __future__ import annotations

from typing import Any

import click

from .connecting import Cluster, cluster_options
from .http import http_options
from .loading import load
from .messages import Misused, command
from .serving import Serving, Stop

__all__ = ["run"]


@command("run main:app", "run main:app --port 9000 --workers 4")
@click.argument("target", metavar="MODULE:APP")
@click.option("--name", default="default", show_default=True, help="Name of the application.")
@click.option("--route-prefix", default="/", show_default=True, help="Where HTTP finds the application.")
@http_options
@click.option("--workers", type=click.IntRange(1), help="Workers of the embedded cluster to begin with.")
@cluster_options
def run(  # noqa: PLR0917 - click passes them by name
    cluster: Cluster, target: str, name: str, route_prefix: str, http: dict[str, Any], workers: int | None
) -> None:
    """Deploy an application and serve it until Ctrl-C.

    MODULE:APP is an application (what .bind() returns) or a function that returns one; modules of the working
    directory are found. Without a scheduler a cluster is started on this machine, and ended with this command.
    """
    address = cluster.find()
    if workers is not None and address is not None:
        raise Misused(
            f"--workers is for the embedded cluster, and this runs on the cluster at {address}", "leave it out"
        )
    serving = Serving(None if address is None else cluster, workers)
    with serving.signals():
        try:
            application = load(target)
            serving.deploy(application, name, route_prefix, http)
            serving.wait()
        except Stop:
            pass
        finally:
            serving.close()
