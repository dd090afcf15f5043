"""A FastAPI application with a pydantic body and response beside the same on one bare uvicorn process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial

from distributed import Client

import dask_serve as serve

from .apps import Items
from .http_noop import measure
from .processes import Cluster, bare_uvicorn
from .table import Row, interleave

CONNECTIONS = 32
BODY = json.dumps({"name": "pen", "price": 2.5, "tags": ["blue", "thin"]})


def rows(cluster: Cluster, client: Client, pairs: int, seconds: float) -> Iterator[Row]:
    """Measure POST requests of a small model, answered by another."""
    serve.run(Items.bind(), name="fastapi", route_prefix="/fastapi", client=client)
    url = serve.url(client=client).rstrip("/") + "/fastapi/items"
    with bare_uvicorn("items") as (bare_url, bare):
        ours = partial(measure, url, cluster.http(), CONNECTIONS, body=BODY)
        theirs = partial(measure, bare_url + "items", {"uvicorn": bare}, CONNECTIONS, body=BODY)
        for warm_up in (ours, theirs):
            warm_up(seconds=1.0)
        samples = interleave(pairs, partial(ours, seconds=seconds), partial(theirs, seconds=seconds))
    what = f"FastAPI, pydantic body and response, {CONNECTIONS} connections, against bare uvicorn"
    yield Row(what, "requests/s", *samples, least=1.0)
    serve.delete("fastapi", client=client)
