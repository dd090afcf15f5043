"""Commands on documents: deploy, build."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .connecting import Cluster, cluster_options
from .loading import load
from .messages import Failure, Misused, command

if TYPE_CHECKING:
    from ..shipping.graph import Built

__all__ = ["build", "deploy", "read_document"]


@command("deploy shop.yaml --dry-run", "deploy shop.yaml --prune --timeout '5 minutes'", "deploy - < shop.yaml")
@click.argument("document", metavar="FILE", type=click.Path(dir_okay=False, allow_dash=True))
@click.option("--dry-run", is_flag=True, help="Show what would change, and change nothing.")
@click.option("--prune", is_flag=True, help="Delete applications that the document does not name.")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Return once all of it runs.")
@click.option("--timeout", metavar="TIME", help="How long to wait, e.g. 90 or '5 minutes'; no limit unless set.")
@cluster_options
def deploy(  # noqa: PLR0917 - click passes them by name
    cluster: Cluster, document: str, dry_run: bool, prune: bool, wait: bool, timeout: str | None
) -> None:
    """Make the applications of a YAML document run, all of them or none.

    They are imported here; modules of the working directory are found. Applications that the document does not name
    go on, unless --prune is given. The same document again changes nothing.
    """
    from ..document.applying import changes, make
    from ..document.building import build_all
    from ..document.validation import parse

    seconds = _seconds(timeout)
    text = read_document(document)
    checked = parse(text, "standard input" if document == "-" else document)
    # Before anybody is asked: what cannot be imported needs no cluster to be found.
    built = build_all(checked, load)
    with cluster.client() as client:
        lines = client.sync(changes, client, checked, built, prune=prune)
        for line in lines:
            click.echo(line)
        if dry_run:
            click.echo("nothing was changed" if lines else f"nothing would change: all of {checked.name} is so already")
            return
        applied = client.sync(make, client, checked, built, prune=prune, wait=wait, timeout=seconds, tell=click.echo)
        if not lines:
            click.echo(f"nothing has changed: all of {checked.name} was so already")
        for name, version in sorted(applied.versions.items()):
            if version != applied.before[name]:
                click.echo(f"application {name!r} has version {version}")
        for name in applied.deleted:
            click.echo(f"application {name!r} is deleted")


@command(
    "build shop:app -o shop.yaml",
    "build first=shop:app second=shop:build",
    short_help="Write a YAML document for applications.",
)
@click.argument("targets", metavar="[NAME=]MODULE:APP", nargs=-1, required=True)
@click.option("-o", "--output", metavar="FILE", type=click.Path(dir_okay=False), help="Write to this file.")
@click.option("--force", is_flag=True, help="Replace the file if it is there.")
def build(targets: tuple[str, ...], output: str | None, force: bool) -> None:
    """Write a YAML document for applications, with those of their options that differ from the defaults.

    One application is called "default" and has the route "/", unless it is given a name; several are called like the
    names in their modules, and have routes of these names.
    """
    if output is not None and Path(output).exists() and not force:
        raise Misused(f"the file {output} is there already", "give --force to replace it, or another name")
    from ..document.rendering import render

    built = [_built(name, target, alone=len(targets) == 1) for name, target in map(_named, targets)]
    names = [application.spec.name for application in built]
    for name in names:
        if names.count(name) > 1:
            raise Misused(f"there are two applications called {name!r}", "name them: NAME=MODULE:APP")
    head = "Deploy it with `dask serve deploy FILE`. Values may have ${VARIABLES} in them, or ${VARIABLES:-defaults}."
    text = render([application.spec for application in built], head=head, explain=True)
    if output is None:
        click.echo(text, nl=False)
    else:
        Path(output).write_text(text, encoding="utf-8")
        click.echo(f"wrote {output}; deploy it with `dask serve deploy {output}`", err=True)


def read_document(path: str) -> str:
    """Return the text of a file, or of standard input.

    Raises
    ------
    Misused
        It cannot be read.
    """
    if path == "-":
        return sys.stdin.read()
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise Misused(
            f"there is no file {path} (in {Path.cwd()})", "`dask serve build MODULE:APP -o FILE` writes one"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"the document {path} cannot be read: {error}", "it is a text file in UTF-8") from None


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    from dask.utils import parse_timedelta

    try:
        return float(parse_timedelta(text, "s"))
    except (ValueError, KeyError):
        raise Misused(f"--timeout {text} is no time", "write seconds, or text such as '5 minutes'") from None


def _named(text: str) -> tuple[str | None, str]:
    name, found, target = text.partition("=")
    return (name, target) if found else (None, text)


def _built(name: str | None, target: str, *, alone: bool) -> Built:
    from ..policy.desired import Source
    from ..shipping.graph import build as build_application

    application: Any = load(target)
    prefix = "/" if alone else None
    if name is None:
        name = "default" if alone else target.rpartition(":")[2].replace(".", "_")
    prefix = prefix or f"/{name}"
    return build_application(application, name, prefix, source=Source(import_path=target))
