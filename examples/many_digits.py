"""Many models in one deployment: classifiers that know some of the digits, each loaded when it is first asked.

Serve them until Ctrl-C, and ask the one that knows odd digits::

    dask serve run examples.many_digits:app
    curl http://127.0.0.1:8000/ -H "serve_multiplexed_model_id: 13579" -d '{"image": [[0, 0, 5, 13, 9, 1, 0, 0], ...]}'
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.neighbors import KNeighborsClassifier
from starlette.requests import Request
from starlette.responses import JSONResponse

import dask_serve as serve

from .digits import split


@serve.deployment(num_replicas=2)
class ManyDigits:
    """Has a classifier for each set of digits; its model id lists them, such as ``"0123"``."""

    def __init__(self) -> None:
        images, _, self.labels, _ = split()
        self.images = images.reshape(-1, 64)

    @serve.multiplexed(max_num_models_per_replica=4)
    def load(self, model_id: str) -> KNeighborsClassifier:
        """Train one; others would read it from a store."""
        known = np.isin(self.labels, [int(digit) for digit in model_id])
        classifier = KNeighborsClassifier(n_neighbors=3, weights="distance", algorithm="kd_tree")
        return classifier.fit(self.images[known], self.labels[known])

    async def __call__(self, request: Request) -> JSONResponse:
        """Answer HTTP: ``{"image": 8 rows of 8 values}`` gives ``{"digit": 3}``."""
        try:
            return JSONResponse({"digit": await self.predict((await request.json())["image"])})
        except (KeyError, TypeError, ValueError, serve.ArgumentsError) as error:
            usage = 'send {"image": 8 rows of 8 numbers} as JSON, and the header serve_multiplexed_model_id'
            return JSONResponse({"error": f"{usage} ({error!r})"}, status_code=400)

    async def predict(self, image: Any) -> int:
        """Answer Python: the digit that an image of 8 x 8 values shows, of those that the request's model knows."""
        classifier = await self.load()
        return int(classifier.predict(np.asarray(image, dtype=float).reshape(1, 64))[0])


app = ManyDigits.bind()
