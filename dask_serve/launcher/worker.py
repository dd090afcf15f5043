"""A worker process of an embedded cluster.

It is started while the scheduler is still being imported, imports the same, and waits on its lifeline for one line
of JSON with the options of its `distributed.Worker`. The end of file on the lifeline means that the host is gone.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
import threading
import time
import warnings
from typing import Any

__all__ = ["main"]

#: Seconds between the host's death and the hard end of a worker that user code keeps alive.
ORPHAN_GRACE = 10.0
#: Seconds that one step of a worker's own shutdown may take; the host kills what takes longer.
CLOSE_TIMEOUT = 5.0


def main(lifeline: str) -> None:
    """Run a worker until the scheduler closes it, SIGTERM arrives or the host is gone."""
    # The process belongs to user code, whose warnings are to be seen; those of Dask's own start are noise.
    warnings.filterwarnings("ignore", module="distributed")
    from distributed.compatibility import asyncio_run
    from distributed.config import get_loop_factory

    fd = int(lifeline)
    line = _read_line(fd)
    if not line:
        return
    message = json.loads(line)
    orphaned = threading.Event()
    arguments = (fd, message["directory"], orphaned)
    threading.Thread(target=_watch, args=arguments, name="dask-serve-lifeline", daemon=True).start()
    asyncio_run(_run(message["worker"]), loop_factory=get_loop_factory())
    if orphaned.is_set():
        shutil.rmtree(message["directory"], ignore_errors=True)


def _read_line(fd: int) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        chunk = os.read(fd, 65536)
        if not chunk:
            return b""
        line += chunk
    return line


def _watch(fd: int, directory: str, orphaned: threading.Event) -> None:
    """End the process some time after the host died, whatever user code still runs in it."""
    while os.read(fd, 1024):
        pass
    orphaned.set()
    time.sleep(ORPHAN_GRACE)
    shutil.rmtree(directory, ignore_errors=True)
    os._exit(1)


async def _run(options: dict[str, Any]) -> None:
    from distributed import Worker

    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    worker = Worker(**options)
    stopped = asyncio.ensure_future(stop.wait())
    finished = asyncio.ensure_future(_until_finished(worker))
    await asyncio.wait({stopped, finished}, return_when=asyncio.FIRST_COMPLETED)
    if finished.done():
        finished.result()
        return
    for name in ("distributed.worker", "distributed.core", "distributed.comm"):
        # A heartbeat that is on its way when the connection closes is no error here.
        logging.getLogger(name).setLevel(logging.CRITICAL)
    await worker.close(timeout=CLOSE_TIMEOUT, reason="embedded cluster closes")
    finished.cancel()


async def _until_finished(worker: Any) -> None:
    await worker
    await worker.finished()
