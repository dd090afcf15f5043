"""A document deployed in a process of its own, for the controller, which imports no user code.

``python -m dask_serve.cli.child`` takes a `Task` as JSON from standard input, and writes an `Outcome` as JSON to
standard output; whatever user code prints goes to standard error.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import msgspec

from ..controller.child import Mistake, Outcome, Task
from ..exceptions import ServeError

if TYPE_CHECKING:
    from ..document.validation import Checked

__all__ = ["main"]

#: Seconds between two looks whether the scheduler is there.
LOOK = 0.5


def main() -> None:
    """Do what standard input says."""
    # What is imported may print.
    answer = os.dup(1)
    os.dup2(2, 1)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    task = msgspec.json.decode(sys.stdin.buffer.read(), type=Task)
    sys.stdin.close()
    try:
        outcome = _deploy(task)
    except ServeError as error:
        outcome = _refusal(error)
    except Exception as error:  # noqa: BLE001 - the controller tells it to whoever asked
        outcome = Outcome(error=type(error).__name__, message=f"{type(error).__name__}: {error}")
    with os.fdopen(answer, "wb") as stream:
        stream.write(msgspec.json.encode(outcome))


def _end_with(parent: int) -> None:
    """End when the scheduler is gone, however it went: nobody would take the answer, or end a module that hangs."""
    while os.getppid() == parent:
        time.sleep(LOOK)
    os._exit(1)


def _refusal(error: ServeError) -> Outcome:
    problems = getattr(error, "problems", ())
    return Outcome(
        error=type(error).__name__,
        message=str(error),
        problems=[Mistake(p.line, p.column, p.field, p.message) for p in problems],
    )


def _deploy(task: Task) -> Outcome:
    from ..document.declaration import HTTPEntry
    from ..document.validation import parse

    checked = parse(task.document, task.name)
    if not task.http:
        document = msgspec.structs.replace(checked.document, http=HTTPEntry())
        checked = msgspec.structs.replace(checked, document=document)
    return _make(task, checked)


def _make(task: Task, checked: Checked) -> Outcome:
    from distributed import Client
    from distributed.security import Security

    from ..controller.applying import desired
    from ..document.applying import changes, make
    from ..document.building import build_all
    from .loading import load

    options: dict[str, Any] = {"timeout": task.connect_timeout, "set_as_default": False, "name": "dask-serve-document"}
    security = Security(**task.security) if task.security else None
    kept: list[str] = []
    if task.since is None:
        # Nobody is asked for what cannot be built.
        built = build_all(checked, load)
    with Client(task.scheduler, security=security, **options) as client:
        if task.since is not None:
            now = client.sync(desired, client)
            kept = sorted(entry.spec.name for entry in now.applications if entry.time > task.since)
            built = build_all(checked, load, without=kept)
        lines = client.sync(changes, client, checked, built, prune=task.prune)
        if task.dry_run:
            return Outcome(changes=lines)
        made = client.sync(make, client, checked, built, prune=task.prune, wait=False)
        return Outcome(
            changes=lines, versions=made.versions, before=made.before, deleted=made.deleted, url=made.url, kept=kept
        )


if __name__ == "__main__":
    main()
