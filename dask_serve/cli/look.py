"""Commands that look: status, logs, config."""

from __future__ import annotations

import json

import click

from .connecting import Cluster, cluster_options
from .messages import command

__all__ = ["status"]


@command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@cluster_options
def status(cluster: Cluster, as_json: bool) -> None:
    """Show the applications of a cluster, their deployments and replicas."""
    import msgspec

    from .. import api

    with cluster.client() as client:
        found = api.status(client=client)
        click.echo(json.dumps(msgspec.to_builtins(found), indent=2) if as_json else str(found))
