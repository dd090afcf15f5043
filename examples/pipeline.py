"""Two deployments bound into each other: one prepares a picture, the other recognises the digit in it.

``Prepare`` receives a handle where its constructor was bound to ``Digits.bind()``; it awaits calls on it. Each of the
two has replicas of its own, which may sit on different workers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse

import dask_serve as serve

from .digits import Digits


def shrink(picture: Any) -> np.ndarray:
    """Reduce a grey picture (0 is black paper, 255 is white ink) of 8 n x 8 m pixels to what the classifier knows."""
    pixels = np.asarray(picture, dtype=float)
    if pixels.ndim != 2 or not all(size and size % 8 == 0 for size in pixels.shape):
        raise ValueError(f"a picture has 8 n x 8 m pixels, not {pixels.shape}")
    height, width = pixels.shape
    blocks = pixels.reshape(8, height // 8, 8, width // 8).mean(axis=(1, 3))
    return np.round(blocks * (16 / 255))


@serve.deployment
class Prepare:
    """Takes pictures of any size, and asks the classifier.

    Parameters
    ----------
    classifier : DeploymentHandle
        A deployment with a method ``predict(image)``.
    """

    def __init__(self, classifier: serve.DeploymentHandle) -> None:
        self.classifier = classifier

    async def __call__(self, request: Request) -> JSONResponse:
        """Answer HTTP: ``{"picture": rows of values from 0 to 255}``."""
        try:
            answer = await self.recognise((await request.json())["picture"])
        except (KeyError, TypeError, ValueError) as error:
            usage = 'send {"picture": rows of numbers} as JSON'
            return JSONResponse({"error": f"{usage} ({error!r})"}, status_code=400)
        return JSONResponse(answer)

    async def recognise(self, picture: Any) -> dict[str, Any]:
        """Answer Python: the digit in a picture, and its probability."""
        return await self.classifier.predict.remote(shrink(picture))


app = Prepare.bind(Digits.bind())
