"""Handles in every place: loops, threads, processes, Dask tasks, other Dask actors, forks."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from distributed import Client, LocalCluster, get_client
from helpers import local_client

import dask_serve as serve
from dask_serve.exceptions import NotRunningError
from dask_serve.handle import DeploymentHandle

LARGE = 100_000


@serve.deployment(threads=2)
class Model:
    def __call__(self, x):
        return x + 1

    async def after(self, delay, value):
        await asyncio.sleep(delay)
        return value

    def large(self):
        return b"x" * LARGE

    def size(self, value):
        return len(value)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """Two workers, processes with one thread each."""
    with local_client(2, 1) as client:
        yield client


@pytest.fixture(scope="module")
def handle(client):
    return serve.run(Model.bind(), route_prefix=None, client=client)


# -- this process ------------------------------------------------------------------------------------------------------


def use(handle: DeploymentHandle) -> list[Any]:
    """Call it from plain code in all the ways there are."""
    found: list[Any] = [handle.remote(1).result(20)]
    found.append([ref.result(20) for ref in [handle.remote(i) for i in range(3)]])
    found.append(handle.remote(handle.remote(1)).result(20))
    large = handle.large.remote()
    found.append(handle.size.remote(large).result(20))
    found.append(len(large.result(20)))
    return found


USED = [2, [1, 2, 3], 3, LARGE, LARGE]


async def use_async(handle: DeploymentHandle) -> list[Any]:
    """Call it from a coroutine."""
    found: list[Any] = [await handle.remote(1)]
    found.append(await asyncio.gather(*[handle.remote(i) for i in range(3)]))
    found.append(await handle.remote(handle.remote(1)))
    large = handle.large.remote()
    found.append(await handle.size.remote(large))
    found.append(len(await large))
    return found


def test_threads_and_loops_at_once(client, handle):
    """The main thread, other threads, loops with the requests on the background loop, and loops that carry them."""

    async def carried() -> list[Any]:
        own = handle.options(sync=False)
        refs = [await own.remote(i) for i in range(20)]
        return [await ref for ref in refs]

    def loops() -> None:
        for _ in range(3):
            assert asyncio.run(use_async(handle)) == USED
            assert asyncio.run(carried()) == list(range(1, 21))

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        running = [pool.submit(loops) for _ in range(3)] + [pool.submit(use, handle) for _ in range(3)]
        assert use(handle) == USED
        assert [future.result(60) for future in running] == [None] * 3 + [USED] * 3


@pytest.mark.parametrize("dumps", [pickle.dumps, cloudpickle.dumps])
def test_after_pickling(client, handle, dumps):
    copy = pickle.loads(dumps(handle.options(request_timeout_s=20)))
    assert use(copy) == USED


# -- Dask --------------------------------------------------------------------------------------------------------------


class Ordinary:
    """An ordinary Dask actor that calls a deployment."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self.handle = handle
        assert handle.remote(1).result(20) == 2

    def plain(self):
        return use(self.handle)

    async def coroutine(self):
        return await use_async(self.handle)

    async def blocking(self):
        return self.handle.remote(1).result()

    def at_once(self, i):
        return self.handle.after.remote(0.1, i).result(20)


def test_in_another_actor(client, handle):
    actor = client.submit(Ordinary, handle, actor=True, pure=False).result(30)
    assert actor.plain().result(30) == USED
    assert actor.coroutine().result(30) == USED
    # On the worker's event loop nothing may block: an error, not a deadlock.
    with pytest.raises(serve.ServeError, match="await"):
        actor.blocking().result(30)
    calls = [actor.at_once(i) for i in range(8)]
    assert [call.result(30) for call in calls] == list(range(8))
    # The worker's only thread is free for tasks meanwhile.
    pending = actor.at_once(1)
    assert client.submit(lambda: 5, pure=False, workers=[actor._address]).result(10) == 5
    assert pending.result(30) == 1


def test_in_tasks_of_workers_with_one_thread(client, handle):
    async def coroutine(handle):
        return await use_async(handle)

    assert client.submit(use, handle, pure=False).result(30) == USED
    assert client.submit(coroutine, handle, pure=False).result(30) == USED

    def depends_on_a_task(handle, x):
        return handle.remote(get_client().submit(lambda: x, pure=False)).result(20)

    # More tasks than threads, and each waits for a task that needs one.
    futures = [client.submit(depends_on_a_task, handle, i, pure=False) for i in range(6)]
    assert client.gather(futures) == list(range(1, 7))


# -- other processes ---------------------------------------------------------------------------------------------------


def _connect(address: str) -> None:
    global _client
    _client = Client(address)


def _use_with_a_client(handle: DeploymentHandle) -> list[Any]:
    return use(handle)


def _use_without(handle: DeploymentHandle) -> str:
    try:
        return str(handle.remote(1).result(5))
    except NotRunningError as error:
        return str(error)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_in_a_process_pool(client, handle, method):
    context = multiprocessing.get_context(method)
    address = client.scheduler.address
    options: dict[str, Any] = {"max_workers": 2, "mp_context": context}
    with concurrent.futures.ProcessPoolExecutor(**options, initializer=_connect, initargs=(address,)) as pool:
        assert list(pool.map(_use_with_a_client, [handle] * 4)) == [USED] * 4
    with concurrent.futures.ProcessPoolExecutor(**options) as pool:
        told = pool.submit(_use_without, handle).result(60)
    assert f"distributed.Client({address!r})" in told


def python(tmp_path: Path, text: str, *args: str, timeout: float = 60.0) -> str:
    """Run a script in a process of its own; what hangs is killed, and fails the test."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(text))
    root = str(Path(serve.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(
        [sys.executable, str(script), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
        start_new_session=True,
    ) as process:
        try:
            out, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            out = ""
        finally:
            # Children that the script forked, too.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, out or "it hung"
    return out


def test_a_session_that_connects_to_a_running_service(client, handle, tmp_path):
    out = python(
        tmp_path,
        """
        import asyncio, sys
        from distributed import Client
        import dask_serve as serve

        if __name__ == "__main__":
            with Client(sys.argv[1]) as client:
                handle = serve.get_app_handle("default")
                print(handle.remote(1).result(20), serve.get_deployment_handle("Model", "default").remote(2).result(20))
                print(client.gather([handle.remote(1), handle.after.remote(0, 5)]))
                print(len(handle.large.remote().result(20)))

                async def awaits():
                    return await serve.get_app_handle("default", client=client).remote(5)

                print(asyncio.run(awaits()))

            async def main():
                async with Client(sys.argv[1], asynchronous=True) as client:
                    handle = await serve.get_app_handle("default", client=client)
                    print(await handle.remote(7))

            asyncio.run(main())
        """,
        client.scheduler.address,
    )
    assert out.split("\n")[:5] == ["2 3", "[2, 5]", str(LARGE), "6", "8"]


FORKS = """
    import asyncio, os, sys, threading, traceback, warnings
    warnings.simplefilter("ignore")
    from distributed import Client
    import dask_serve as serve

    def in_child(function):
        pid = os.fork()
        if not pid:
            code = 1
            try:
                function()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0, "the child failed"

    def fails(function, text):
        try:
            function()
        except serve.NotRunningError as error:
            assert text in str(error), error
        else:
            raise AssertionError("no error")

    if __name__ == "__main__":
        client = Client(sys.argv[1])
        handle = serve.get_app_handle("default")
        assert handle.remote(1).result(20) == 2
        done, pending = handle.remote(1), handle.after.remote(20, 1)
        large = handle.large.remote()
        assert done.result(20) == 2 and large.exception() is None
"""


def test_a_fork_is_told_what_to_do(client, handle, tmp_path):
    """The threads of the client and of the background loop stay in the parent: an error at once, wherever one asks."""
    python(
        tmp_path,
        FORKS
        + """
        def child():
            fails(lambda: handle.remote(1).result(5), "do not survive a fork")
            fails(lambda: serve.get_app_handle("default"), "no Dask client")
            fails(lambda: pending.result(5), "forked")
            fails(lambda: pending.exception(5), "forked")
            async def awaits(): await pending
            fails(lambda: asyncio.run(awaits()), "forked")
            assert done.result(5) == 2
            pending.cancel()
            try:
                large.result(5)
            except (RuntimeError, serve.ServeError):
                pass
            globals().pop("pending")

        def loops():
            async def main():
                own = handle.options(sync=False)
                assert await (await own.remote(1)) == 2
                in_child(lambda: fails(lambda: own.remote(1), "do not survive a fork"))
                assert await (await own.remote(1)) == 2
            asyncio.run(main())

        for _ in range(3):
            in_child(child)
            assert handle.remote(1).result(20) == 2
        loops()
        # While other threads call, that is while locks are held.
        stop = threading.Event()
        def call():
            while not stop.is_set():
                handle.remote(1).result(20)
        threads = [threading.Thread(target=call) for _ in range(3)]
        for thread in threads: thread.start()
        for _ in range(10):
            in_child(lambda: fails(lambda: handle.remote(1).result(5), "do not survive a fork"))
        stop.set()
        for thread in threads: thread.join()
        assert not pending.done()
        print("fine")
        client.close()
        """,
        client.scheduler.address,
    )


def test_a_fork_with_a_client_of_its_own(client, handle, tmp_path):
    out = python(
        tmp_path,
        FORKS
        + """
        def child():
            with Client(sys.argv[1]) as own:
                assert handle.remote(1).result(20) == 2
                assert serve.get_app_handle("default").after.remote(0, 5).result(20) == 5
                assert own.gather(handle.remote(2)) == 3
                assert len(handle.large.remote().result(20)) == 100_000
            print("child")

        in_child(child)
        assert handle.remote(1).result(20) == 2
        import multiprocessing
        context = multiprocessing.get_context("fork")
        with context.Pool(2) as pool:
            def told(_):
                pass
            assert pool.map(len, ["a", "bc"]) == [1, 2]
        print("fine")
        client.close()
        """,
        client.scheduler.address,
    )
    assert "child" in out


def test_a_fork_that_ends_as_scripts_end(tmp_path):
    """It runs the hooks for the end of the process, and does not take the parent's embedded cluster with it."""
    out = python(
        tmp_path,
        """
        import os, sys, time, warnings
        warnings.simplefilter("ignore")
        import dask_serve as serve

        @serve.deployment
        def add(x):
            return x + 1

        if __name__ == "__main__":
            handle = serve.run(add.bind(), route_prefix=None)
            assert handle.remote(1).result(20) == 2
            pid = os.fork()
            if not pid:
                sys.exit(0)
            begun = time.monotonic()
            os.waitpid(pid, 0)
            print("child", time.monotonic() - begun < 15)
            assert handle.remote(1).result(20) == 2
        """,
        timeout=90,
    )
    assert "child True" in out


# -- several clusters --------------------------------------------------------------------------------------------------


def test_two_clusters_at_once(client, handle):
    """From threads and loops, each handle keeps to its own."""
    options = {"n_workers": 1, "processes": False, "dashboard_address": ":0", "protocol": "tcp", "host": "127.0.0.1"}
    with LocalCluster(**options) as cluster, Client(cluster, set_as_default=False) as other:
        its = serve.run(Model.bind(), name="other", route_prefix=None, client=other)

        async def both() -> list[Any]:
            return [await use_async(handle), await use_async(its), await its.remote(handle.remote(1))]

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            running = [pool.submit(asyncio.run, both()) for _ in range(2)]
            running += [pool.submit(use, one) for one in (handle, its)]
            assert [future.result(60) for future in running[:2]] == [[USED, USED, 3]] * 2
            assert [future.result(60) for future in running[2:]] == [USED] * 2
        assert pickle.loads(pickle.dumps(its)).remote(1).result(20) == 2
        # A task of the one calls the other: its worker has no client there.
        with pytest.raises(NotRunningError, match="no open Dask client"):
            client.submit(lambda h: h.remote(1).result(10), its, pure=False).result(20)
        serve.shutdown(client=other)
    gc.collect()
    assert handle.remote(1).result(20) == 2
    threads = {thread.name for thread in threading.enumerate()}
    deadline = time.monotonic() + 5
    while any("Model" in name for name in threads) and time.monotonic() < deadline:
        time.sleep(0.05)
        threads = {thread.name for thread in threading.enumerate()}
    assert not any("other/Model" in name for name in threads)
