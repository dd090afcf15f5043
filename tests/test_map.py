"""Many items: `handle.map`."""

from __future__ import annotations

import asyncio
import io
import itertools
import logging
import threading
import time
from typing import Any

import pytest
from distributed import Client
from helpers import wait_until

import dask_serve as serve


@serve.deployment(max_ongoing_requests=50)
class Model:
    def __init__(self) -> None:
        self.gate = threading.Event()
        self.entered = 0
        self.background: set[bool] = set()

    def double(self, x: int) -> int:
        self.background.add(serve.get_request_context().background)
        return 2 * x

    def add(self, x: int, y: int) -> int:
        return x + y

    async def first_slowly(self, x: int) -> int:
        if x == 0:
            await asyncio.sleep(0.3)
        return x

    async def fail(self, x: int) -> int:
        if x % 2:
            raise ValueError(f"{x} is odd")
        return x

    async def wait(self, x: int) -> int:
        self.entered += 1
        while not self.gate.is_set():
            await asyncio.sleep(0.005)
        return x

    async def open(self) -> None:
        self.gate.set()

    async def seen(self) -> tuple[int, set[bool]]:
        return self.entered, self.background

    async def inside(self, app: str) -> list[int]:
        handle = serve.get_app_handle(app).double
        with pytest.raises(serve.ServeError, match="use `async for` there"):
            next(handle.map([1]))
        return [await ref async for ref in handle.map(range(20), window=3)]

    def inside_thread(self, app: str) -> list[int]:
        return [ref.result() for ref in serve.get_app_handle(app).double.map(range(20), window=3)]


@pytest.fixture(scope="module")
def handle(shared_cluster):
    with Client(shared_cluster, set_as_default=False) as client:
        yield serve.run(Model.bind(), name="map", route_prefix=None, client=client)
        serve.delete("map", client=client)


def test_in_order(handle):
    refs = list(handle.double.map(range(300)))
    assert [ref.result() for ref in refs] == [2 * x for x in range(300)]
    assert all(type(ref) is serve.DeploymentResponse and ref.done() for ref in refs)
    assert True in handle.seen.remote().result(20)[1]


def test_several_iterables_and_gather(handle):
    assert [ref.result() for ref in handle.add.map([1, 2, 3], itertools.count(10))] == [11, 13, 15]
    assert serve.gather(handle.double.map(range(5))) == [0, 2, 4, 6, 8]
    assert list(handle.map([])) == []


def test_as_completed(handle):
    found = [ref.result() for ref in handle.first_slowly.map(range(50), ordered=False)]
    assert sorted(found) == list(range(50))
    assert found[-1] == 0


@pytest.mark.parametrize("ordered", [True, False])
def test_only_a_window_of_calls_is_made(handle, ordered):
    taken = itertools.count()
    items = (next(taken) for _ in itertools.count())
    refs = handle.double.map(items, window=10, ordered=ordered)
    assert len([ref.result() for ref in itertools.islice(refs, 100)]) == 100
    assert next(taken) <= 110


@pytest.mark.parametrize("ordered", [True, False])
def test_an_iterable_that_takes_its_time(handle, ordered):
    """Refs are handed out while it goes on, not when the window is full."""
    handed_out = threading.Event()

    def live():
        yield 1
        time.sleep(0.15)
        yield 2
        assert handed_out.wait(10)
        yield 3

    found = []
    for ref in handle.double.map(live(), ordered=ordered):
        handed_out.set()
        found.append(ref.result())
    assert sorted(found) == [2, 4, 6]


@pytest.mark.parametrize("ordered", [True, False])
def test_a_map_over_a_map(handle, ordered):
    """Refs are arguments as others, so two deployments are one line."""
    refs = handle.double.map(handle.double.map(range(100), ordered=ordered), window=10)
    assert sorted(ref.result() for ref in refs) == [4 * x for x in range(100)]


@pytest.mark.parametrize("ordered", [True, False])
def test_what_fails_is_told_by_its_ref(handle, ordered):
    refs = list(handle.fail.map(range(10), ordered=ordered))
    failed = [ref for ref in refs if ref.exception() is not None]
    assert len(failed) == 5
    with pytest.raises(ValueError, match="is odd"):
        failed[0].result()


def test_what_the_iterable_raises(handle):
    def items():
        yield 1
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        list(handle.double.map(items()))


@pytest.mark.parametrize("ordered", [True, False])
def test_in_an_event_loop(handle, ordered):
    async def main() -> list[int]:
        return [await ref async for ref in handle.double.map(range(100), window=7, ordered=ordered)]

    assert sorted(asyncio.run(main())) == [2 * x for x in range(100)]


def test_with_an_asynchronous_client(shared_cluster, handle):
    async def main() -> None:
        async with Client(shared_cluster, asynchronous=True, set_as_default=False) as client:
            other = await serve.get_app_handle("map", client=client)
            for options in ({}, {"sync": False}):
                double = other.options(**options).double
                found = [await ref async for ref in double.map(range(50), window=5, ordered=False)]
                assert sorted(found) == [2 * x for x in range(50)]
            with pytest.raises(serve.ServeError, match=r"`for ref in handle.map"):
                list(other.double.map(range(3)))

    asyncio.run(main())


def test_in_replicas_and_tasks(handle, shared_cluster):
    expected = [2 * x for x in range(20)]
    assert handle.inside.remote("map").result(30) == expected
    assert handle.options(request_class="online").inside_thread.options(request_timeout_s=20)
    with Client(shared_cluster, set_as_default=False) as client:
        task = client.submit(
            lambda handle: [ref.result() for ref in handle.map(range(20), ordered=False)], handle.double
        )
        assert sorted(task.result(30)) == expected


def test_closing_cancels_what_was_not_handed_out(handle):
    before = handle.seen.remote().result(20)[0]
    with handle.wait.map(range(1000), window=20) as refs:
        filler = threading.Thread(target=lambda: next(refs, None), daemon=True)
        filler.start()
        wait_until(lambda: handle.seen.remote().result(20)[0] > before)
    made = handle.seen.remote().result(20)[0] - before
    assert made <= 20
    handle.open.remote().result(20)
    filler.join(20)
    assert not filler.is_alive()
    assert list(refs) == []


def test_a_limit_and_a_deadline_of_the_deployment_are_not_for_it(shared_cluster):
    with Client(shared_cluster, set_as_default=False) as client:
        narrow = Model.options(max_queued_requests=1, request_timeout_s=0.05, max_ongoing_requests=1)
        handle = serve.run(narrow.bind(), name="narrow", route_prefix=None, client=client)
        found = [ref.result() for ref in handle.double.map(range(300))]
        assert found == [2 * x for x in range(300)]
        # The handle's own deadline is.
        late = handle.options(request_timeout_s=0.05).wait.map(range(3))
        assert all(isinstance(ref.exception(), serve.RequestTimeoutError) for ref in late)
        serve.delete("narrow", client=client)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar(handle, monkeypatch, caplog):
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    for ref in handle.fail.map(range(10), progress=True):
        ref.exception()
    last = screen.getvalue().rstrip("\n").split("\r")[-1]
    assert "Handle map/Model.fail> ████████████████████ 10/10, 5 failed" in last
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with caplog.at_level(logging.INFO, logger="dask_serve"):
        list(handle.double.map((x for x in range(3)), progress=True))
    assert "map/Model.double> 3, " in caplog.records[-1].message


@pytest.mark.parametrize(
    ("arguments", "options", "what"),
    [
        ([], {}, "at least one iterable"),
        ([5], {}, "takes iterables, not a int"),
        ([[1]], {"window": 0}, "window = 0"),
        ([[1]], {"window": True}, "window = True"),
    ],
)
def test_bad_arguments(handle, arguments: list[Any], options: dict[str, Any], what: str):
    with pytest.raises(serve.ConfigError, match=what):
        handle.double.map(*arguments, **options)


def test_streams_are_not_mapped(handle):
    with pytest.raises(serve.ConfigError, match="stream=True"):
        handle.options(stream=True).map([1])


def test_a_method_of_that_name_is_refused():
    class Maps:
        def map(self, x: int) -> int:
            return x

    with pytest.raises(serve.ConfigError, match="'map'"):
        serve.deployment(Maps)


def test_threads_do_not_block_each_other(handle):
    """A map that waits holds nothing that another one needs."""
    begun = time.monotonic()
    slow = handle.first_slowly.map([0] * 3)
    assert [ref.result() for ref in handle.double.map(range(10))] == [2 * x for x in range(10)]
    assert [ref.result() for ref in slow] == [0, 0, 0]
    assert time.monotonic() - begun < 10
