"""Code that is too large for one message of Dask's."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from distributed.utils_test import gen_cluster

import dask_serve as serve
from dask_serve.controller.pieces import PART, Parts, Uploads, buffers_of, cut, nbytes_of
from dask_serve.controller.store import PIECE, Store

SIZE = 5 * PART + 7


@serve.deployment
class Large:
    def __init__(self, data: bytes) -> None:
        self.hash = hash(data)

    def __call__(self) -> int:
        return self.hash


@gen_cluster(client=True, nthreads=[("127.0.0.1", 1)])
async def test_it_travels_in_pieces(c, s, a):
    data = random.Random(1).randbytes(SIZE)
    await serve.run(Large.bind(b""), name="small", route_prefix=None, client=c)
    controller = s.plugins["dask-serve"]
    taken: list[int] = []
    put = s.handlers["serve_upload"]

    async def upload(number: int, **what: Any) -> Any:
        taken.append(number)
        if len(taken) == 3:
            # As if another scheduler had taken over: what came before is gone.
            controller.uploads.remove_client(c.id)
        return await put(number=number, **what)

    s.handlers["serve_upload"] = upload
    handle = await serve.run(Large.bind(data), route_prefix=None, client=c)
    assert await handle.remote() == hash(data)
    assert sorted(taken) == sorted([*range(6), *range(6)]), "it was sent again"
    assert controller.uploads._uploads == {}
    revision = (await serve.status(client=c)).applications["default"].deployments["Large"].replicas[0].revision
    assert SIZE < nbytes_of(controller.registry.code[revision]) < SIZE + 10_000


@pytest.mark.parametrize("size", [0, PART - 1, PART, 3 * PART, 3 * PART + 5])
def test_parts_are_the_code(size):
    data = random.Random(size).randbytes(size)
    parts = cut(data)
    assert b"".join(buffers_of(Parts(parts))) == data
    assert nbytes_of(Parts(parts)) == size


def test_what_is_not_whole_is_not_there():
    uploads = Uploads()
    for number in (2, 0, 0):
        uploads.put("u", number, b"%d" % number, "c")
    assert uploads.take({"r": ["u", 3], "s": b"code"}) == {"s": b"code"}
    # It was tried, and is gone.
    uploads.put("u", 1, b"1", "c")
    uploads.remove_client("c")
    assert uploads.take({"r": ["u", 1]}) == {}


@pytest.mark.parametrize("sizes", [[1], [PIECE], [PIECE - 1, 1, 5], [3 * PIECE + 1, PIECE - 1, 0, 2 * PIECE], [7] * 9])
def test_parts_of_any_size_are_saved(tmp_path, sizes):
    from test_store import entry

    parts = [random.Random(size).randbytes(size) for size in sizes]
    store = Store(tmp_path / "state")
    store.open()

    async def there_and_back() -> list[bytes]:
        await store.save("app", [entry(1)], {"r1": Parts(parts)}, {"r1"})
        found = await store.load("r1")
        await store.close()
        return found

    assert b"".join(asyncio.run(there_and_back())) == b"".join(parts)
