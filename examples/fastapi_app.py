"""A FastAPI application in front of a model: models of pydantic, a dependency, a router, a stream, the OpenAPI page.

The routes are methods of the class: ``self`` is the replica, with a handle of the deployment behind it. Serve it until
Ctrl-C, ask it, and look at its page::

    dask serve run examples.fastapi_app:app
    curl http://127.0.0.1:8000/estimates -H 'content-type: application/json' -d '{"rooms": 3, "area": 70}'
    open http://127.0.0.1:8000/docs
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

import dask_serve as serve


class Flat(BaseModel):
    """What is asked about."""

    rooms: int = Field(gt=0)
    area: float = Field(gt=0, description="square metres")


class Estimate(BaseModel):
    """What is answered."""

    rent: float
    request_id: str


@serve.deployment
class Rents:
    """Knows what flats cost; scaled by itself."""

    def __init__(self) -> None:
        flats = np.array([[1, 30.0], [2, 50.0], [3, 75.0], [4, 100.0], [3, 60.0]])
        rents = np.array([420.0, 640.0, 930.0, 1220.0, 790.0])
        self.weights, *_ = np.linalg.lstsq(flats, rents, rcond=None)

    async def predict(self, rooms: int, area: float) -> float:
        """Return the rent of a flat."""
        return float(np.dot(self.weights, [rooms, area]))


web = FastAPI(title="Rents")
info = APIRouter(prefix="/info", tags=["info"])


@info.get("/unit")
async def unit() -> str:
    """Routes that need no instance are functions, as ever."""
    return "EUR a month"


web.include_router(info)


async def currency(accept_currency: Annotated[str, Header()] = "EUR") -> str:
    """Refuse what cannot be converted."""
    if accept_currency != "EUR":
        raise HTTPException(406, f"there are no rents in {accept_currency}")
    return accept_currency


@serve.deployment(num_replicas=2)
@serve.ingress(web)
class Site:
    """Answers HTTP."""

    def __init__(self, rents: Any) -> None:
        self.rents = rents

    @web.post("/estimates")
    async def estimate(self, flat: Flat, currency: Annotated[str, Depends(currency)]) -> Estimate:
        """Estimate one rent."""
        rent = await self.rents.predict.remote(flat.rooms, flat.area)
        return Estimate(rent=round(rent, 2), request_id=serve.get_request_context().request_id)

    @web.get("/estimates/{rooms}")
    async def estimates(self, rooms: int, largest: int = 100) -> StreamingResponse:
        """Stream the rents of flats of all sizes, one a line."""

        async def lines() -> AsyncIterator[str]:
            for area in range(20 * rooms, largest + 1, 10):
                yield f"{area} {await self.rents.predict.remote(rooms, area):.2f}\n"

        return StreamingResponse(lines(), media_type="text/plain")


app = Site.bind(Rents.bind())
