"""`dask serve run`: one application, until Ctrl-C."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

import click

from .connecting import Cluster, cluster_options
from .http import http_options
from .loading import load, parse_arguments, reload
from .messages import Misused, command
from .serving import Serving, Stop, check_port

if TYPE_CHECKING:
    from ..policy.desired import Source

__all__ = ["run"]


@command(
    "run main:app",
    "run main:app --port 9000 --workers 4 --reload",
    "run main:build model=small device=cuda",
    "run main:app --scheduler tcp://10.0.0.1:8786 --name shop --route-prefix /shop",
)
@click.argument("target", metavar="MODULE:APP")
@click.argument("arguments", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--name", default="default", show_default=True, help="Name of the application.")
@click.option("--route-prefix", default="/", show_default=True, help="Where HTTP finds the application.")
@http_options
@click.option("--workers", type=click.IntRange(1), help="Workers of the embedded cluster to begin with.")
@click.option("--reload", "watches", is_flag=True, help="Deploy again when a source file changes.")
@click.option(
    "--reload-dir",
    "directories",
    multiple=True,
    type=click.Path(exists=True, file_okay=False),
    help="What --reload watches (the working directory unless set); may be given several times.",
)
@cluster_options
def run(  # noqa: PLR0917 - click passes them by name
    cluster: Cluster,
    target: str,
    arguments: tuple[str, ...],
    name: str,
    route_prefix: str,
    http: dict[str, Any],
    workers: int | None,
    watches: bool,
    directories: tuple[str, ...],
) -> None:
    """Deploy an application and serve it until Ctrl-C.

    MODULE:APP is an application (what .bind() returns), or a function that returns one and gets the arguments
    KEY=VALUE, in the types that it is annotated with. Modules of the working directory are found. Without a scheduler
    a cluster is started on this machine, and ended with this command.
    """
    address = cluster.find()
    if workers is not None and address is not None:
        raise Misused(
            f"--workers is for the embedded cluster, and this runs on the cluster at {address}", "leave it out"
        )
    if directories and not watches:
        raise Misused("--reload-dir says what --reload watches", "write --reload too")
    given = parse_arguments(arguments)
    serving = Serving(None if address is None else cluster, workers)
    with serving.signals(), contextlib.ExitStack() as stack:
        try:
            if watches:
                # A cached module of the same second and size would be taken for the changed one.
                sys.dont_write_bytecode = True
                watch = stack.enter_context(contextlib.closing(_watch(directories)))
            application = load(target, given)
            if address is None:
                check_port(http)
            serving.deploy(application, name, route_prefix, http, _source(target, given))
            if watches:
                serving.follow(watch, lambda: reload(target, given))
            serving.wait()
        except Stop:
            pass
        finally:
            serving.close()


def _source(target: str, arguments: dict[str, str]) -> Source:
    """Say where the code is from as a document does, in which a dollar sign may begin a variable."""
    from ..document.dumping import dump
    from ..policy.desired import Source

    written = {key: text.replace("$", "$$") for key, text in arguments.items()}
    return Source(import_path=target, args="\n".join(dump({"args": written})) if written else "")


def _watch(directories: tuple[str, ...]) -> Any:
    from .watching import Watch

    return Watch(directories or (".",))
