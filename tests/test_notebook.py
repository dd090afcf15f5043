"""A real Jupyter kernel: cells are run one by one, interrupted, run again, and nothing is left at the end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import wait_until

import dask_serve as serve

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

CLASS = """
@serve.deployment
class Model:
    def __call__(self, x):
        return x + {add}

    def __repr__(self):
        return "model"

    async def sleep(self, seconds):
        await asyncio.sleep(seconds)
        return seconds

    def pid(self):
        return os.getpid(), serve.get_replica_context().replica_id
"""

IMPORTS = """
import asyncio, os, time
import dask_serve as serve
from distributed import Client, default_client
"""


class Notebook:
    """Cells of one kernel, run in their order."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._notebook = client.nb

    def start(self, source: str) -> Any:
        """Add a cell and return the coroutine that runs it."""
        cell = nbformat.v4.new_code_cell(source)
        self._notebook.cells.append(cell)
        return self._client.async_execute_cell(cell, len(self._notebook.cells) - 1)

    def run(self, source: str) -> Any:
        """Run a cell; return the data of its last expression."""
        self._client.loop.run_until_complete(self.start(source))
        results = [one for one in self._notebook.cells[-1].outputs if one.output_type == "execute_result"]
        return results[0].data if results else None

    def fails(self, source: str) -> str:
        """Run a cell and return what it raised."""
        with pytest.raises(nbclient.exceptions.CellExecutionError) as caught:
            self.run(source)
        return f"{caught.value.ename}: {caught.value.evalue}"

    def value(self, source: str) -> Any:
        """Run a cell and return its last expression, as text."""
        return self.run(source)["text/plain"]

    def interrupt_when(self, source: str, path: Path) -> str:
        """Run a cell, interrupt the kernel once the cell has made a file, and return the name of what it raised."""

        async def both() -> None:
            cell = asyncio.ensure_future(self.start(source))
            deadline = time.monotonic() + 20
            while not path.exists():
                assert time.monotonic() < deadline
                assert not cell.done()
                await asyncio.sleep(0.01)
            await self._client.km.interrupt_kernel()
            await asyncio.wait_for(cell, 20)

        with pytest.raises(nbclient.exceptions.CellExecutionError) as caught:
            self._client.loop.run_until_complete(both())
        return caught.value.ename

    def close(self) -> None:
        """End the kernel as "shut down" does."""
        if self._client.km is not None:
            self._client.loop.run_until_complete(self._client._async_cleanup_kernel())


@pytest.fixture
def notebook(tmp_path: Path) -> Iterator[Notebook]:
    """A notebook with its kernel, in an empty directory."""
    loop = asyncio.new_event_loop()
    client = nbclient.NotebookClient(
        nbformat.v4.new_notebook(),
        timeout=60,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.loop = loop
    environment = {**os.environ, "PYTHONPATH": str(Path(serve.__file__).parent.parent), "IPYTHONDIR": str(tmp_path)}

    async def opened() -> None:
        client.create_kernel_manager()
        await client.async_start_new_kernel(cwd=str(tmp_path), env=environment)
        await client.async_start_new_kernel_client()

    loop.run_until_complete(opened())
    notebook = Notebook(client)
    notebook.run(IMPORTS)
    try:
        yield notebook
    finally:
        notebook.close()
        loop.close()


def family(pid: int) -> list[psutil.Process]:
    """The processes that descend from a process."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def gone(processes: list[psutil.Process]) -> bool:
    return not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes)


def test_a_notebook(notebook, tmp_path):
    """Without any cluster: the first cell makes one, as `Client()` would."""
    notebook.run(CLASS.format(add=1))
    deploy = 'handle = serve.run(Model.bind(), route_prefix=None, timeout="30s")\nhandle'
    assert notebook.value(deploy) == "<DeploymentHandle default/Model>"
    # Blocking and awaiting, side by side.
    assert notebook.value("handle.remote(1).result(timeout=10)") == "2"
    assert notebook.value("await handle.remote(2)") == "3"
    assert notebook.value("ref = handle.remote(3)\nawait ref, ref.result(), await ref") == "(4, 4, 4)"
    own = "h = Model.get_handle(sync=False)\nref = await h.remote(4)\nawait ref, await (await h.remote(ref))"
    assert notebook.value(own) == "(5, 6)"
    assert notebook.value("await asyncio.gather(*[handle.remote(i) for i in range(3)])") == "[1, 2, 3]"
    # How a ref is shown; it stays unknown to the scheduler.
    shown = notebook.run("ref = handle.remote(1)\nref.result()\nref")
    assert shown["text/html"].startswith("<code>&lt;DeploymentResponse: finished, __call__, request: ")
    notebook.run(
        "def promoted(dask_scheduler):\n    return [key for key in dask_scheduler.tasks if 'call' in str(key)]"
    )
    assert notebook.value("client = default_client()\nclient.run_on_scheduler(promoted)") == "[]"
    assert notebook.value("client.gather([handle.remote(i) for i in range(3)])") == "[1, 2, 3]"

    # The unchanged cell changes nothing, whatever else the notebook defines meanwhile; a redefinition does.
    before = notebook.value("handle.pid.remote().result()")
    notebook.run("unrelated = 1")
    notebook.run(CLASS.format(add=1))
    notebook.run(deploy)
    assert notebook.value("handle.pid.remote().result()") == before
    notebook.run(CLASS.format(add=100))
    notebook.run(deploy)
    assert notebook.value("handle.remote(1).result()") == "101"
    after = notebook.value("handle.pid.remote().result()")
    assert after != before

    # Interrupting a cell that waits leaves everything alive. Blocking was only looking; whoever awaits, and is
    # cancelled, wants the result no more.
    for wait_for, error, status in (
        ("ref.result()", {"KeyboardInterrupt"}, "'pending'"),
        ("await ref", {"KeyboardInterrupt", "CancelledError"}, "'cancelled'"),
    ):
        marker = tmp_path / f"marker-{status}"
        cell = f'ref = handle.sleep.remote(3600)\nopen({str(marker)!r}, "w").close()\n{wait_for}'
        assert notebook.interrupt_when(cell, marker) in error
        assert notebook.value("handle.pid.remote().result(timeout=10)") == after
        assert notebook.value("await handle.remote(1)") == "101"
        assert notebook.value("ref.status") == status
        notebook.run("ref.cancel()")
    assert notebook.value("len(default_client().scheduler_info()['workers']) > 0") == "True"

    # Nothing remains of what was started.
    kernel = int(notebook.value("os.getpid()"))
    started = family(kernel)
    assert len(started) >= 3
    notebook.run("serve.shutdown()")
    wait_until(lambda: gone(started))
    # A block has a cluster of its own, which ends with it, however that is.
    block = (
        "with serve.run(Model.bind(), route_prefix=None) as handle:\n    first = handle.remote(1).result()\n    1 / 0"
    )
    assert notebook.fails(block) == "ZeroDivisionError: division by zero"
    assert notebook.value("first") == "101"
    wait_until(lambda: gone(family(kernel)))
    # And the next cell starts over.
    assert notebook.value("serve.run(Model.bind(), route_prefix=None).remote(1).result(timeout=10)") == "101"
    started = family(kernel)
    assert len(started) >= 3
    notebook.close()
    wait_until(lambda: gone(started))


def test_a_notebook_with_a_client(notebook):
    """A synchronous client of the user's own; a cluster of the user's own, which outlives the service."""
    notebook.run('client = Client(n_workers=1, threads_per_worker=2, dashboard_address=":0")')
    notebook.run(CLASS.format(add=1))
    notebook.run("with serve.run(Model.bind(), route_prefix=None) as handle:\n    first = handle.remote(1).result()")
    assert notebook.value("first, sorted(serve.status().applications)") == "(2, [])"
    failing = "with serve.run(Model.bind(), route_prefix=None) as handle:\n    1 / 0"
    assert notebook.fails(failing) == "ZeroDivisionError: division by zero"
    assert notebook.value("sorted(serve.status().applications), client.status") == "([], 'running')"
    assert notebook.fails(f"async {failing}").endswith("write `with serve.run(...) as handle:`")
    notebook.run("serve.delete('default')")
    notebook.run("handle = serve.run(Model.bind(), route_prefix=None)")
    shown = notebook.run("serve.status()")
    assert "<table" in shown["text/html"]
    assert "application default: running" in shown["text/plain"]
    assert notebook.value("await handle.remote(1), client.submit(lambda x: x, handle.remote(2)).result()") == "(2, 3)"
    notebook.run("serve.shutdown()")
    assert notebook.value("client.submit(abs, -1).result()") == "1"
    notebook.run("client.shutdown()")


def test_a_notebook_with_an_asynchronous_client(notebook):
    notebook.run('client = await Client(n_workers=1, threads_per_worker=2, dashboard_address=":0", asynchronous=True)')
    notebook.run(CLASS.format(add=1))
    assert notebook.value("handle = await serve.run(Model.bind(), route_prefix=None)\nawait handle.remote(1)") == "2"
    assert (
        notebook.value("await handle.remote(1).result(timeout=10), await client.gather(handle.remote(2))") == "(2, 3)"
    )
    within = 'async with serve.run(Model.bind(), "other", None) as other:\n    value = await other.remote(5)'
    assert notebook.value(f"{within}\nvalue, sorted((await serve.status()).applications)") == "(6, ['default'])"
    failing = 'async with serve.run(Model.bind(), "other", None) as other:\n    1 / 0'
    assert notebook.fails(failing) == "ZeroDivisionError: division by zero"
    assert notebook.value("sorted((await serve.status()).applications)") == "['default']"
    assert notebook.fails(failing.removeprefix("async ")).endswith("write `async with serve.run(...) as handle:`")
    assert notebook.value("await (await (await Model.get_handle(sync=False)).remote(3))") == "4"
    before = notebook.value("await handle.pid.remote()")
    notebook.run("handle = await serve.run(Model.bind(), route_prefix=None)")
    assert notebook.value("await handle.pid.remote()") == before
    notebook.run("await serve.shutdown()")
    notebook.run("await client.shutdown()")
