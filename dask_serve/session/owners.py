"""Which client or worker of this process is connected to the cluster of a handle."""

from __future__ import annotations

from distributed import Client, Worker
from distributed.core import Status

from ..exceptions import NotRunningError
from ..routing.session import Session
from .peers import current_client, current_worker, is_left_behind, stand_ins, was_forked

__all__ = ["find_owner"]

#: States of a Dask worker in which it is connected.
WORKS = (Status.running, Status.paused)
#: Those of a client that can be used. One that looks for its scheduler again goes on knowing where the doors are.
USABLE = ("running", "connecting")


def find_owner(asker: object, address: str | None, cluster: str, client: Client | None) -> Client | Worker:
    """Return through what a handle calls.

    Parameters
    ----------
    asker : object
        The handle, for errors.
    address : str or None
        Of the scheduler; None: any.
    cluster : str
        The scheduler's id, by which it is known where its address is another; "": not known.
    client : distributed.Client, optional
        The one that the handle was given: the first choice outside of workers.

    Raises
    ------
    NotRunningError
        There is none.
    """

    def belongs(owner: Client | Worker) -> bool:
        if address in (None, owner.scheduler.address):
            return True
        return bool(cluster) and Session.of(owner).is_of(cluster)

    worker = current_worker()
    if worker is not None and belongs(worker):
        return worker
    for candidate in [client, current_client(), *list(Client._instances)]:
        if candidate is None or candidate.status not in USABLE or candidate.scheduler is None:
            continue
        if not is_left_behind(candidate) and (candidate is client or belongs(candidate)):
            return candidate
    for stand_in in list(stand_ins):
        if belongs(stand_in):
            return stand_in
    # A thread that user code started in a replica or a task.
    for worker in list(Worker._instances):
        if worker.status in WORKS and not is_left_behind(worker) and belongs(worker):
            return worker
    where = "" if address is None else f" at {address}"
    raise NotRunningError(
        f"{asker!r} belongs to the cluster{where}, and no open Dask client is connected to it here: make one with "
        f"distributed.Client({address or '<scheduler address>'!r})"
        f"{' (this process was forked, and clients do not survive a fork)' if was_forked() else ''}"
    )
