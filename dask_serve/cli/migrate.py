"""The command that translates configuration files of Ray Serve."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .documents import read_document
from .messages import Failure, Misused, coloured, command

if TYPE_CHECKING:
    from ..shipping.migration import Note

__all__ = ["migrate"]


@command("migrate ray.yaml -o serve.yaml", "migrate ray.yaml --strict")
@click.argument("file", metavar="FILE", type=click.Path(dir_okay=False, allow_dash=True))
@click.option("-o", "--output", metavar="FILE", type=click.Path(dir_okay=False), help="Write to this file.")
@click.option("--force", is_flag=True, help="Replace the file if it is there.")
@click.option("--strict", is_flag=True, help="Fail where something of the file has no counterpart.")
def migrate(file: str, output: str | None, force: bool, strict: bool) -> None:
    """Translate a file of Ray Serve into a YAML document.

    What has no counterpart, and what means something else here, is listed on stderr, and stands as comments at the
    head of the document. `dask serve deploy` takes it.
    """
    if output is not None and Path(output).exists() and not force:
        raise Misused(f"the file {output} is there already", "give --force to replace it, or another name")
    from ..document.rendering import render_plain
    from ..document.validation import parse
    from ..shipping.migration import migrate as translate

    where = "standard input" if file == "-" else file
    migrated = translate(_loaded(read_document(file), where))
    text = render_plain(migrated.document, head=_head(where, migrated.notes))
    # What it writes is a document: whatever is wrong with it is told now, and not when it is deployed.
    parse(text, output or "the document")
    for note in migrated.notes:
        click.echo(f"{note.path}: {coloured(note.kind, _COLOURS[note.kind])}: {note.text}", err=True)
    dropped = sum(note.kind == "dropped" for note in migrated.notes)
    if strict and dropped:
        counterpart = "key of it has" if dropped == 1 else "keys of it have"
        raise Failure(f"{where}: {dropped} {counterpart} no counterpart", "leave out --strict to do without them")
    if output is None:
        click.echo(text, nl=False)
    else:
        Path(output).write_text(text, encoding="utf-8")
        click.echo(
            f"wrote {output}, {dropped} dropped, {len(migrated.notes) - dropped} changed; "
            f"look at it with `dask serve deploy {output} --dry-run`",
            err=True,
        )


_COLOURS = {"dropped": "red", "changed": "yellow"}


def _loaded(text: str, where: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        first = " ".join(str(error).split())
        raise Failure(f"{where} is no YAML: {first}", "give a file that `serve deploy` of Ray takes") from None


def _head(where: str, notes: list[Note]) -> str:
    head = [f"Made of {where} by `dask serve migrate`."]
    if notes:
        head.append("What is not as it was there:")
    return "\n".join([*head, *(f"- {note}" for note in notes)])
