"""Bad input: each an error that names the thing and the repair; nothing hangs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from distributed import CancelledError, Client, LocalCluster, wait
from distributed.utils_test import captured_logger, cluster, gen_cluster, inc

import dask_serve as serve
from dask_serve.exceptions import (
    ArgumentsError,
    DeploymentUnavailableError,
    MethodNotFoundError,
    NotRunningError,
    PayloadError,
    ReplicaLostError,
    RequestError,
    ServeError,
)

LARGE = 100_000


# What is still under way at the end of a test is not waited for.
@serve.deployment(graceful_shutdown_timeout_s=0.5)
class Model:
    version = "1.0"

    def __init__(self) -> None:
        self.open = asyncio.Event()

    @property
    def loaded(self):
        raise RuntimeError("a property is not evaluated by a call")

    def __call__(self, x):
        return x + 1

    async def predict(self, x, *, scale=1):
        return x * scale

    def local(self, x):
        return x

    def confused(self, x):
        return self.local(x, 1)

    async def fails_at_once(self, x):
        raise TypeError("of user code")

    async def gate(self, value):
        await self.open.wait()
        return value

    def large(self, n=LARGE):
        return b"x" * n

    async def items(self, n):
        for i in range(n):
            yield i

    def returns_items(self, n):
        return iter(x for x in range(n))


@serve.deployment
class Strange:
    """Looks its attributes up by itself."""

    def __call__(self):
        return None

    def __getattr__(self, name):
        raise RuntimeError(f"there is no {name} here")


@serve.deployment
class Caller:
    def __init__(self, other) -> None:
        self.other = other

    async def misfit(self):
        return await self.other.predict.remote(1, scael=2)


@serve.deployment
def function(x):
    return x


def soon(ref: Any) -> Any:
    """Await with a limit: what hangs fails."""
    return asyncio.wait_for(ref, 5)


# -- methods and their arguments ---------------------------------------------------------------------------------------


@gen_cluster(client=True)
async def test_arguments_that_a_method_does_not_take(c, s, a, b):
    handle = await serve.run(Caller.bind(Model.bind()), route_prefix=None, client=c)
    model = await serve.get_deployment_handle("Model", client=c)
    calls: list[tuple[Any, str]] = [
        (
            lambda: model.predict.remote(1, scael=2),
            r"'predict' of deployment 'default/Model'.*'scael'.*\(x, \*, scale=1\)",
        ),
        (lambda: model.predict.remote(), r"missing 1 required positional argument: 'x'"),
        (lambda: model.local.remote(1, 2), r"'local'.*takes 2 positional arguments but 3 were given.*it takes \(x\)"),
        # With a ref among the arguments it takes another way, and so does a `def` that is known already.
        (lambda: model.local.remote(model.local.remote(1), 2), r"'local'.*takes \(x\)"),
        (lambda: model.local.remote(1, 2), r"'local'.*takes \(x\)"),
        (lambda: model.remote(), r"'__call__' of deployment 'default/Model'.*'x'"),
        (lambda: handle.misfit.remote(), r"'predict' of deployment 'default/Model'.*'scael'"),
    ]
    with captured_logger("dask_serve.replica") as log:
        for call, expected in calls:
            with pytest.raises(TypeError, match=expected) as caught:
                await soon(call())
            assert isinstance(caught.value, ArgumentsError)
            # No frame of ours poses as user code.
            assert "user.py" not in str(caught.value)
            assert caught.value.__cause__ is None
        for name in ("items", "returns_items"):
            with pytest.raises(ArgumentsError, match=rf"'{name}'.*'many'.*takes \(n\)"):
                await soon(anext(model.options(method_name=name, stream=True).remote(many=3)))
    assert not log.getvalue()
    # What user code does wrong inside is its own error.
    for name in ("confused", "fails_at_once"):
        with captured_logger("dask_serve.replica") as log:
            with pytest.raises(TypeError) as caught:
                await soon(model.options(method_name=name).remote(1))
        assert type(caught.value) is TypeError
        assert f"in {name}" in str(caught.value.__cause__)
        assert f"in {name}" in log.getvalue()


@gen_cluster(client=True)
async def test_what_is_no_method(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    for name, expected in (
        ("predcit", r"has no method 'predcit'; it has: __call__.*predict"),
        ("version", r"has 'version', a str and no method; it has"),
        ("loaded", r"has 'loaded', a property and no method; it has"),
    ):
        with pytest.raises(MethodNotFoundError, match=expected):
            await soon(getattr(handle, name).remote())
    with pytest.raises(MethodNotFoundError, match="no method '_secret'"):
        await soon(handle.options(method_name="_secret").remote())
    plain = await serve.run(function.bind(), "function", None, client=c)
    with pytest.raises(MethodNotFoundError, match=r"'function/function' has no method 'predict'; it has: __call__"):
        await soon(plain.predict.remote(1))
    strange = await serve.run(Strange.bind(), "strange", None, client=c)
    with captured_logger("dask_serve.replica"):
        with pytest.raises(RuntimeError, match="there is no predict here"):
            await soon(strange.predict.remote(1))


# -- what cannot be sent -----------------------------------------------------------------------------------------------


@gen_cluster(client=True)
async def test_generators_and_coroutines_as_arguments(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)

    async def coroutine():
        return 1

    async def asynchronous_generator():
        yield 1

    task = asyncio.ensure_future(coroutine())
    for argument, expected in (
        ((x for x in "abc"), r"argument 0 \(generator: pass a list of what it yields\).*'default/Model'.*'local'"),
        (([1, {"deep": (x for x in "abc")}],), r"argument 0\[0\]\[1\]\['deep'\] \(generator: pass a list"),
        (asynchronous_generator(), r"argument 0 \(async_generator: pass a list"),
        (task, r"argument 0 \(Task: await it"),
        ([handle.remote(1), (x for x in "abc")], r"argument 0\[1\] \(generator"),
    ):
        with pytest.raises(PayloadError, match=expected):
            await soon(handle.local.remote(argument))
    await task
    forgotten = coroutine()
    with pytest.raises(PayloadError, match=r"named x|x \(coroutine: await it"):
        await soon(handle.local.remote(x=forgotten))
    forgotten.close()
    # S16: what an asynchronous handle returned, not awaited for the ref, is resolved at any depth.
    asynchronous = handle.options(sync=False)
    nested = {"a": [asynchronous.remote(1), (asynchronous.large.remote(),)]}
    assert await (await asynchronous.local.remote(nested)) == {"a": [2, (b"x" * LARGE,)]}


# -- deployments, services and clients that are gone -------------------------------------------------------------------


@gen_cluster(client=True)
async def test_deleted_and_deployed_again(c, s, a, b):
    handle = await serve.run(Model.bind(), route_prefix=None, client=c)
    method = handle.predict.options(request_timeout_s=5)
    assert await soon(method.remote(1)) == 1
    await serve.delete("default", client=c)
    for one in (handle, method):
        with pytest.raises(DeploymentUnavailableError, match=r"'default/Model' does not exist.*serve\.run"):
            await soon(one.remote(1))
    with pytest.raises(DeploymentUnavailableError, match=r"default/Model"):
        await soon(serve.gather([handle.remote(1)]))
    await serve.run(Model.bind(), route_prefix=None, client=c)
    assert await soon(handle.remote(1)) == 2
    assert await soon(method.remote(2)) == 2


@gen_cluster(client=True)
async def test_refs_after_the_shutdown(c, s, a, b):
    handle = await serve.run(Model.options(graceful_shutdown_timeout_s=0.1).bind(), route_prefix=None, client=c)
    small, large, read, pending, unread = (
        handle.remote(1),
        handle.large.remote(),
        handle.large.remote(),
        handle.gate.remote(1),
        handle.gate.remote(2),
    )
    await wait([small, large, read])
    await read
    await serve.shutdown(client=c)
    # What is here stays.
    assert await soon(small) == 2
    assert len(await soon(read)) == LARGE
    with pytest.raises(ReplicaLostError, match="was stopped while it ran the request"):
        await soon(pending)
    with pytest.raises(ReplicaLostError):
        await soon(serve.gather([unread]))
    # What is in the store of a worker that lives on is there still, or says that it is gone.
    with contextlib.suppress(ReplicaLostError):
        assert len(await soon(large)) == LARGE
    with pytest.raises(RequestError, match=r"default/Model"):
        await soon(handle.remote(1))
    assert await c.submit(inc, small) == 3


def test_a_closed_client(loop):
    with cluster(nworkers=1) as (scheduler, _):
        address = scheduler["address"]
        with Client(address, loop=loop, set_as_default=False) as client:
            handle = serve.run(Model.bind(), route_prefix=None, client=client)
            finished, large, pending = handle.remote(1), handle.large.remote(), handle.gate.remote(1)
            for ref in (finished, large):
                ref.exception()
        assert finished.result(5) == 2
        assert serve.gather([finished]) == [2]
        for call in (large.result, lambda: serve.gather([large]), lambda: pending.result(5)):
            with pytest.raises(ServeError, match=r"client|connection|lost"):
                call()
        with pytest.raises(NotRunningError, match=rf"distributed\.Client\('{address}'\)"):
            handle.remote(1)
        with pytest.raises(NotRunningError, match="closed"):
            serve.get_app_handle(client=client)
        with Client(address, loop=loop, set_as_default=False) as client:
            assert handle.remote(1).result(5) == 2
            serve.shutdown(client=client)


# -- two clusters ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def cluster_of(loop: Any) -> Iterator[LocalCluster]:
    """Start a cluster in this process."""
    with LocalCluster(
        loop=loop,
        n_workers=1,
        threads_per_worker=2,
        processes=False,
        dashboard_address=":0",
        protocol="tcp",
        host="127.0.0.1",
    ) as made:
        yield made


def test_refs_of_another_cluster(loop):
    with cluster_of(loop) as one, cluster_of(loop) as two:
        with Client(one, set_as_default=False, loop=loop) as c1, Client(two, set_as_default=False, loop=loop) as c2:
            first = serve.run(Model.bind(), route_prefix=None, client=c1)
            second = serve.run(Model.bind(), route_prefix=None, client=c2)
            # As an argument of a call, and in serve.gather, the value passes through here.
            assert first.remote(second.remote(1)).result(5) == 3
            assert len(first.local.remote(second.large.remote()).result(5)) == LARGE
            assert serve.gather([first.remote(1), second.large.remote()]) == [2, b"x" * LARGE]
            for make in (lambda: second.remote(1), lambda: second.large.remote(), lambda: second.gate.remote(1)):
                ref = make()
                with pytest.raises(ValueError, match="another client"):
                    c1.gather([ref])
                # What Dask says of any future of another cluster.
                with pytest.raises(CancelledError, match="lost dependencies"):
                    c1.submit(inc, ref).result(5)
            # Once it is a Dask future of its cluster, it is one for the other cluster too.
            promoted = second.large.remote()
            assert c2.submit(len, promoted).result(5) == LARGE
            with pytest.raises(PayloadError, match=r"another cluster.*pass its result"):
                first.local.remote(promoted).result(5)
            serve.shutdown(client=c1)
            serve.shutdown(client=c2)


# -- loops that are closed ---------------------------------------------------------------------------------------------


def in_a_new_loop(function: Callable[[], Any]) -> Any:
    """Run a coroutine function in a loop of its own, which is closed then."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(function())
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def test_refs_whose_loop_was_closed(client):
    handle = serve.run(Model.bind(), route_prefix=None, client=client).options(sync=False)

    async def call() -> list[Any]:
        refs = [await handle.remote(1), await handle.large.remote(), await handle.large.remote()]
        await serve.gather(refs[:1])
        await refs[1]
        await wait_for_end(refs[2])
        return [*refs, await handle.gate.remote(1), await handle.gate.remote(2)]

    small, read, stored, pending, also_pending = in_a_new_loop(call)
    assert small.result(5) == 2
    assert len(read.result(5)) == LARGE
    # Its connection went, and the value with it; or the value is there still.
    with contextlib.suppress(ReplicaLostError):
        assert len(stored.result(5)) == LARGE
    for take in (
        lambda: pending.result(5),
        lambda: serve.gather([also_pending], timeout=5),
        lambda: in_a_new_loop(read_),
    ):

        async def read_() -> Any:
            return await asyncio.wait_for(pending, 5)

        with pytest.raises(RequestError, match=r"shut down|lost|connection"):
            take()
    pending.cancel()
    serve.shutdown(client=client)


async def wait_for_end(ref: Any) -> None:
    while not ref.done():
        await asyncio.sleep(0.01)


def test_blocking_in_the_loop_that_carries_the_call(client):
    handle = serve.run(Model.bind(), route_prefix=None, client=client).options(sync=False)

    async def main() -> Any:
        ref = await handle.remote(1)
        for block in (ref.result, ref.exception):
            with pytest.raises(ServeError, match="await ref"):
                block()
        values = await serve.gather([ref, await handle.remote(2)])
        # It has ended: nothing blocks.
        return ref.result(), values

    assert asyncio.run(main()) == (2, [2, 3])
    serve.shutdown(client=client)
