"""Where the records of the server processes go: to where Dask's go."""

from __future__ import annotations

import logging

__all__ = ["join_dask"]


def join_dask() -> None:
    """Give the ``dask_serve`` loggers of a scheduler's or worker's process the handlers and the level of Dask's own.

    They are configured together then, by Dask's ``logging`` settings, and silenced together where a `LocalCluster`
    silences its workers. Loggers that a program has configured by itself stay as they are. Sessions are left alone.
    """
    ours = logging.getLogger("dask_serve")
    if not ours.handlers and ours.level == logging.NOTSET:
        ours.parent = logging.getLogger("distributed")
