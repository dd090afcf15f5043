"""A FastAPI ingress keeps the promises of its OpenAPI document, whatever it is sent: schemathesis makes it up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any

import pydantic
import pytest
import requests
from distributed import Client
from fastapi import FastAPI, Header, HTTPException, Path, Query
from hypothesis import HealthCheck, given, settings

import dask_serve as serve
from dask_serve.embedded import EmbeddedCluster


class Item(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    name: str = pydantic.Field(min_length=1, max_length=20)
    price: float = pydantic.Field(gt=0, lt=1e6)
    tags: list[Annotated[str, pydantic.Field(pattern="^[a-z]+$")]] = pydantic.Field(default=[], max_length=3)


class Numbered(Item):
    number: int


class Problem(pydantic.BaseModel):
    detail: str


#: A body that is no JSON at all, or no UTF-8, is a 400 of FastAPI's.
app = FastAPI(title="Shop", responses={400: {"model": Problem}})
Number = Annotated[int, Path(ge=0, le=2**31)]
MISSING: dict[int | str, dict[str, Any]] = {404: {"model": Problem}}


@serve.deployment
@serve.ingress(app)
class Shop:
    def __init__(self) -> None:
        self.items: dict[int, Item] = {}

    def item(self, number: int) -> Item:
        if number not in self.items:
            raise HTTPException(404, f"there is no item {number}")
        return self.items[number]

    @app.post("/items", status_code=201)
    async def add(self, item: Item) -> Numbered:
        number = len(self.items)
        self.items[number] = item
        return Numbered(number=number, **item.model_dump())

    @app.get("/items")
    async def find(
        self,
        name: Annotated[str | None, Query(max_length=10)] = None,
        limit: Annotated[int, Query(ge=1, le=5)] = 5,
        least: float = 0.0,
        x_factor: Annotated[int, Header(ge=1)] = 1,
    ) -> list[Item]:
        found = [item for item in self.items.values() if name in {None, item.name} and item.price * x_factor >= least]
        return found[:limit]

    @app.get("/items/{number}", responses=MISSING)
    def get(self, number: Number, upper: bool = False) -> Item:
        item = self.item(number)
        return item.model_copy(update={"name": item.name[:10].upper()[:20]}) if upper else item

    @app.put("/items/{number}", responses=MISSING)
    async def put(self, number: Number, item: Item) -> Item:
        self.item(number)
        self.items[number] = item
        return item

    @app.delete("/items/{number}", responses=MISSING, status_code=204)
    async def delete(self, number: Number) -> None:
        self.item(number)
        self.items[number] = Item(name="gone", price=1)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    cluster = EmbeddedCluster.start(n_workers=1, nthreads=1, dashboard_address=None)
    with cluster, Client(cluster.scheduler_address, set_as_default=False) as client:
        client.wait_for_workers(1, timeout=30)
        url = serve.start(port=0, client=client)
        serve.run(Shop.bind(), name="shop", route_prefix="/shop", client=client)
        yield url + "/shop"


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False
        yield session


def test_every_answer_conforms_to_the_document(url, session):
    schemathesis = pytest.importorskip("schemathesis")
    schema = schemathesis.openapi.from_url(url + "/openapi.json")
    answers: Counter[tuple[str, str, int]] = Counter()
    quick = settings(
        max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )

    def check(label: str, mode: Any, cases: Any) -> None:
        @quick
        @given(case=cases)
        def conforms(case: Any) -> None:
            answer = case.call_and_validate(session=session, timeout=20)
            assert answer.headers["x-request-id"]
            answers[label, mode.value, answer.status_code] += 1

        conforms()

    for found in schema.get_all_operations():
        operation = found.ok()
        assert operation.base_url == url
        for mode in schemathesis.GenerationMode:
            check(operation.label, mode, operation.as_strategy(generation_mode=mode))
    assert {label for label, _, _ in answers} == {
        "POST /items",
        "GET /items",
        "GET /items/{number}",
        "PUT /items/{number}",
        "DELETE /items/{number}",
    }
    assert answers["POST /items", "positive", 201]
    assert answers["POST /items", "negative", 422]
    assert answers["GET /items", "positive", 200]
    assert not [key for key in answers if key[2] >= 500]
