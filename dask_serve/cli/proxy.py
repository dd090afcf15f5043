"""`dask serve proxy`: proxies on this node for a cluster elsewhere."""

from __future__ import annotations

import signal
from typing import Any

import click

from .connecting import CONNECT_WITHIN, Cluster, cluster_options
from .http import http_options
from .messages import command

__all__ = ["proxy"]


@command(
    "proxy --scheduler tcp://10.0.0.1:8786 --host 0.0.0.0 --port 8000 --num-proxies 4",
    short_help="Serve HTTP on this node for a cluster elsewhere.",
)
@cluster_options
@http_options
@click.option("--service-file", metavar="PATH", help="File for users to read where HTTP is served: JSON with its url.")
def proxy(cluster: Cluster, http: dict[str, Any], service_file: str | None) -> None:
    """Serve HTTP on this node, until SIGTERM or Ctrl-C, for the applications of a cluster elsewhere.

    Options are those of serve.start on the cluster, but for the addresses to listen on; what is given here goes first.
    Dask's configuration of this node (serve.http) says where to listen, unless options do. Files (certificates,
    tokens) are this node's. While the scheduler is away the proxies go on with what they know.
    """
    import asyncio

    from ..controller.remote import configured_here
    from ..controller.service_file import check

    if service_file is not None:
        check(service_file)
    http = {**configured_here(), **http}
    cluster.greet()
    asyncio.run(_serve_here(cluster, http, service_file))


async def _serve_here(cluster: Cluster, http: dict[str, Any], service_file: str | None) -> None:
    import asyncio

    from ..controller.remote import RemoteProxies

    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, ended.set)
    proxies = RemoteProxies(cluster.address, http, cluster.security, service_file)
    try:
        click.echo(f"serving at {await proxies.start(timeout=CONNECT_WITHIN)}")
        following = loop.create_task(proxies.follow(click.echo))
        ending = loop.create_task(ended.wait())
        await asyncio.wait({following, ending}, return_when=asyncio.FIRST_COMPLETED)
        if following.done():
            following.result()
        following.cancel()
        click.echo("draining")
    finally:
        await proxies.stop()
