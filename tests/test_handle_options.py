"""Options of handles: how they are kept, checked, compared and pickled, and what becomes of them at the replica."""

from __future__ import annotations

import asyncio
import gc
import inspect
import pickle
from typing import Any

import cloudpickle
import httpx
import msgspec
import pytest
from distributed.utils_test import gen_cluster

import dask_serve as serve
from dask_serve.config import CallOptions
from dask_serve.deployment import reserved_names
from dask_serve.exceptions import ApplicationNotFoundError, ConfigError, ServeError
from dask_serve.handle import DeploymentHandle
from dask_serve.routing.session import Session

#: An example of each option that is not its default.
OTHER = {
    "method_name": "predict",
    "sync": False,
    "request_timeout_s": 2.5,
    "retries_on_loss": 3,
    "multiplexed_model_id": "m1",
    "request_class": "background",
    "request_id": "my-id",
    "stream": True,
}


def plain(**options: Any) -> DeploymentHandle:
    return DeploymentHandle("app", "Model", "tcp://127.0.0.1:1", **options)


def model_of_request() -> tuple[str, str, str]:
    context = serve.get_request_context()
    return serve.get_multiplexed_model_id(), context.request_class, context.request_id


@serve.deployment
class Model:
    async def asynchronous(self):
        return model_of_request()

    def synchronous(self):
        return model_of_request()

    async def __call__(self, request):
        return list(model_of_request())


@serve.deployment
class Caller:
    def __init__(self, model) -> None:
        self.model = model

    async def call(self):
        own = model_of_request()
        child = await self.model.asynchronous.remote()
        online = await self.model.asynchronous.options(request_class="online", request_id="other").remote()
        return own, child, online


@serve.deployment(max_ongoing_requests=1)
class Slow:
    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.order: list[Any] = []

    async def gate(self):
        await self.open.wait()

    async def note(self, name):
        self.order.append(name)
        return name

    async def seen(self):
        return self.order


# -- without a cluster -------------------------------------------------------------------------------------------------


def test_every_option_is_covered_here():
    assert set(OTHER) == set(CallOptions.__struct_fields__)
    assert set(inspect.signature(plain().options).parameters) == set(OTHER)
    assert all(name in (CallOptions.__doc__ or "") for name in OTHER)


@pytest.mark.parametrize("name", OTHER)
def test_an_option_is_kept_compared_and_pickled(name):
    changed = plain().options(**{name: OTHER[name]})
    assert changed == plain(**{name: OTHER[name]})
    assert changed != plain()
    for other in OTHER.keys() - {name}:
        further = changed.options(**{other: OTHER[other]})
        assert further == plain(**{name: OTHER[name], other: OTHER[other]})
        for dumps in (pickle.dumps, cloudpickle.dumps):
            copy = pickle.loads(dumps(further))
            assert copy == further
            assert hash(copy) == hash(further)
    if name != "method_name":
        # A method has the options of its handle.
        assert changed.predict == plain(**{name: OTHER[name]}, method_name="predict")
    back = changed.options(**{name: msgspec.structs.asdict(CallOptions())[name]})
    assert back == plain()
    assert len({changed, back, plain(), plain(**{name: OTHER[name]})}) == 2


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ({"request_timout_s": 1}, "no option 'request_timout_s'; did you mean 'request_timeout_s'"),
        ({"timeout": 1}, "no option 'timeout': request_timeout_s= is the deadline"),
        ({"retries": 1}, "'retries': use retries_on_loss="),
        ({"priority": 1}, "'priority': use request_class="),
        ({"quux": 1}, "known options: method_name, sync, "),
        ({"request_timeout_s": 0}, "request_timeout_s = 0 is not valid: expected `float` > 0"),
        ({"request_timeout_s": "1 s"}, "request_timeout_s = '1 s' is not valid"),
        ({"retries_on_loss": -1}, "retries_on_loss = -1 is not valid: expected `int` >= 0"),
        ({"request_class": "batch"}, 'request_class = \'batch\' is not valid: it is "online", "background" or None'),
        ({"request_id": ""}, "request_id = '' is not valid: it is a str of 1 to 128 printable ASCII"),
        ({"request_id": "a\n"}, "printable ASCII"),
        ({"request_id": "x" * 129}, "printable ASCII"),
        ({"request_id": "ä"}, "printable ASCII"),
        ({"multiplexed_model_id": 7}, "multiplexed_model_id = 7 is not valid: expected `str`"),
        ({"method_name": ""}, "method_name = '' is not valid"),
        ({"sync": 1}, "sync = 1 is not valid: expected `bool`"),
    ],
)
def test_wrong_options(option, expected):
    with pytest.raises(ConfigError) as caught:
        plain().options(**option)
    assert expected in str(caught.value)
    assert "handle.options()" in str(caught.value)


def test_names_of_handles_are_refused_for_methods():
    names = reserved_names()
    assert {"remote", "options", "app_name", "deployment_name"} <= set(names)
    for name in names:
        taken = type("Taken", (), {name: lambda self: None, "__call__": lambda self: None})
        with pytest.raises(ConfigError, match=f"no method may be called '{name}'"):
            serve.deployment(taken)


def test_context_outside_of_requests():
    with pytest.raises(ServeError, match="get_multiplexed_model_id"):
        serve.get_multiplexed_model_id()


# -- what replicas see -------------------------------------------------------------------------------------------------


@gen_cluster(client=True)
async def test_what_travels_with_a_call(c, s, a, b):
    await serve.run(Caller.bind(Model.bind()), route_prefix=None, client=c)
    model = await serve.get_deployment_handle("Model", client=c)
    for name in ("asynchronous", "synchronous"):
        handle = model.options(method_name=name)
        assert (await handle.remote())[:2] == ("", "online")
        special = handle.options(multiplexed_model_id="m1", request_class="background", request_id="mine")
        ref = special.remote()
        assert ref.request_id == "mine"
        assert await ref == ("m1", "background", "mine")
    caller = await serve.get_app_handle(client=c)
    own, child, online = await caller.call.options(
        multiplexed_model_id="m1", request_class="background", request_id="mine"
    ).remote()
    assert own == ("m1", "background", "mine")
    # The model is the caller's own affair; class and id go on.
    assert child == ("", "background", "mine")
    assert online == ("", "online", "other")
    own, child, _ = await caller.call.remote()
    assert own == child
    assert own[:2] == ("", "online")


@gen_cluster(client=True)
async def test_the_model_of_an_http_request(c, s, a, b):
    await serve.start(port=0, client=c)
    await serve.run(Model.bind(), client=c)
    url = await serve.url(client=c)
    async with httpx.AsyncClient(timeout=10) as http:
        for name in ("serve_multiplexed_model_id", "Serve-Multiplexed-Model-Id"):
            answer = await http.get(url, headers={name: "m2", "X-Request-ID": "an-id"})
            assert answer.json() == ["m2", "online", "an-id"]
        assert (await http.get(url)).json()[0] == ""
    await serve.shutdown(client=c)


@gen_cluster(client=True)
async def test_background_calls_wait_behind_online_ones(c, s, a, b):
    handle = await serve.run(Slow.bind(), route_prefix=None, client=c)
    # The replica takes one, and one ahead as long as its calls are short.
    busy = [handle.gate.remote() for _ in range(2)]
    (router,) = Session.of(c).fabric(asyncio.get_running_loop()).routers.values()
    while not router.in_flight:
        await asyncio.sleep(0.01)
    note = handle.note
    refs = [note.options(request_class="background").remote(f"background {i}") for i in range(3)]
    refs += [note.remote(f"online {i}") for i in range(20)]
    for ref in busy:
        ref.cancel()
    await serve.gather(refs)
    order = await handle.seen.remote()
    assert [name for name in order if "background" in name] == [f"background {i}" for i in range(3)]
    assert [name for name in order if "online" in name] == [f"online {i}" for i in range(20)]
    # Behind the online ones, but for one of ten.
    assert order[:3] == ["online 0", "online 1", "online 2"]
    assert [order.index(f"background {i}") for i in range(3)] == [9, 19, 22]


# -- the same handle each time -----------------------------------------------------------------------------------------


@gen_cluster(client=True)
async def test_repeated_get_handle_gives_the_same_object(c, s, a, b):
    await serve.run(Caller.bind(Model.bind()), route_prefix=None, client=c)
    handles = [await Model.get_handle() for _ in range(100)]
    assert len({id(handle) for handle in handles}) == 1
    first = handles[0]
    assert await serve.get_deployment_handle("Model", client=c) is first
    assert await serve.get_deployment_handle("Model", "default", client=c) is first
    assert await serve.get_app_handle(client=c) is not first
    assert await Caller.get_handle() is not first
    asynchronous = await Model.get_handle(sync=False)
    assert asynchronous is not first
    assert await Model.get_handle(sync=False) is asynchronous
    # Nothing keeps it.
    known = Session.of(c).handles
    assert len(known) >= 2
    del first, handles, asynchronous
    gc.collect()
    assert not known


def test_not_after_the_client_was_closed(loop):
    from distributed import Client
    from distributed.utils_test import cluster

    with cluster(nworkers=1) as (scheduler, _):
        with Client(scheduler["address"], loop=loop) as client:
            serve.run(Model.bind(), route_prefix=None)
            handles = [Model.get_handle() for _ in range(100)]
            assert len({id(handle) for handle in handles}) == 1
            with pytest.raises(ServeError, match=r"sync=False.*running event loop"):
                Model.get_handle(sync=False)
            del client
        with Client(scheduler["address"], loop=loop):
            handle = Model.get_handle()
            assert handle is not handles[0]
            assert handle == handles[0]
            assert handle.synchronous.remote().result(5)[0] == ""
            serve.shutdown()


@gen_cluster(client=True)
async def test_names_that_do_not_fit(c, s, a, b):
    renamed = Model.options(name="digits")
    await serve.run(renamed.bind(), route_prefix=None, client=c)
    with pytest.raises(ApplicationNotFoundError, match="no deployment 'Model'; there are: default/digits"):
        await Model.get_handle()
    assert (await renamed.get_handle()).deployment_name == "digits"
    await serve.run(renamed.bind(), "other", None, client=c)
    with pytest.raises(ApplicationNotFoundError, match=r"default/digits, other/digits; say which with app_name="):
        await renamed.get_handle()
    assert (await renamed.get_handle(app_name="other")).app_name == "other"
