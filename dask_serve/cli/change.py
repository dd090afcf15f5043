"""Commands that change what runs: scale, rollback, drain, delete, shutdown."""

from __future__ import annotations

import click

from .connecting import Cluster, cluster_options
from .messages import command

__all__ = ["delete", "drain", "rollback", "scale", "shutdown"]


@command("scale shop/Model 4")
@click.argument("deployment", metavar="APPLICATION/DEPLOYMENT")
@click.argument("number", type=click.IntRange(1), metavar="NUMBER")
@click.option("--no-wait", is_flag=True, help="Do not wait until the replicas are ready.")
@cluster_options
def scale(cluster: Cluster, deployment: str, number: int, no_wait: bool) -> None:
    """Change how many replicas a deployment has.

    Those that stay are not restarted. The change is a version of the application, which `rollback` takes back; the
    next deployment makes the number what the code says. The name of the application is enough where it has one
    deployment only.
    """
    from .. import versions

    with cluster.client() as client:
        versions.scale(deployment, number, wait=not no_wait, client=client)
        click.echo(str(versions.history(deployment.partition("/")[0], client=client)[-1]))


@command("rollback shop", "rollback shop --version 3")
@click.argument("name")
@click.option("--version", type=click.IntRange(1), help="To this version (the last other one that ran unless set).")
@cluster_options
def rollback(cluster: Cluster, name: str, version: int | None) -> None:
    """Make the application NAME again what it was."""
    from .. import versions

    with cluster.client() as client:
        versions.rollback(name, version, client=client)
        click.echo(str(versions.history(name, client=client)[-1]))


@command("drain tcp://10.0.0.7:40123", "drain gpu-3 --stay")
@click.argument("worker")
@click.option("--stay", is_flag=True, help="Take it back: the worker may hold replicas again.")
@cluster_options
def drain(cluster: Cluster, worker: str, stay: bool) -> None:
    """Bring WORKER (its address or name) to hold no replicas.

    Replicas start elsewhere first. The worker goes on as a worker of Dask, and gets no new replicas until --stay.
    """
    from ..session.peers import ask

    with cluster.client() as client:
        answer = client.sync(ask, client.scheduler, "serve_drain", worker=worker, stay=stay)
    click.echo(f"{answer['worker']} {'may hold replicas again' if stay else 'holds no replicas'}")


@command("delete shop")
@click.argument("name")
@cluster_options
def delete(cluster: Cluster, name: str) -> None:
    """Delete the application NAME, once its replicas have drained."""
    from .. import api

    with cluster.client() as client:
        api.delete(name, client=client)
        click.echo(f"deleted {name}")


@command(short_help="Delete all applications, and end the proxies of a cluster.")
@cluster_options
def shutdown(cluster: Cluster) -> None:
    """Delete all applications and end the proxies of a cluster; its scheduler and workers go on."""
    from .. import api

    with cluster.client() as client:
        api.shutdown(client=client)
        click.echo("dask_serve is shut down")
