"""The classifier of handwritten digits in batches: callers send one image, the model gets all that wait.

Serve it until Ctrl-C, and ask it::

    dask serve run examples.batched_digits:app
    curl http://127.0.0.1:8000/ -d '{"image": [[0, 0, 5, 13, 9, 1, 0, 0], ...]}'
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.neighbors import KNeighborsClassifier
from starlette.requests import Request
from starlette.responses import JSONResponse

import dask_serve as serve

from .digits import split


@serve.deployment(max_ongoing_requests=200)
class BatchedDigits:
    """Tells which digits images show."""

    def __init__(self) -> None:
        images, _, labels, _ = split()
        self.classifier = KNeighborsClassifier(n_neighbors=3, weights="distance", algorithm="kd_tree")
        self.classifier.fit(images.reshape(-1, 64), labels)

    async def __call__(self, request: Request) -> JSONResponse:
        """Answer HTTP: ``{"image": 8 rows of 8 values}`` gives ``{"digit": 3, "probability": 1.0}``."""
        try:
            image = np.asarray((await request.json())["image"], dtype=float).reshape(8, 8)
        except (KeyError, TypeError, ValueError) as error:
            return JSONResponse(
                {"error": f'send {{"image": 8 rows of 8 numbers}} as JSON ({error!r})'}, status_code=400
            )
        return JSONResponse(await self.predict(image))

    @serve.batch(max_batch_size=64, stack=True)
    def predict(self, images: Any) -> list[dict[str, Any]]:
        """Answer Python: callers give one array of 8 x 8 values; here they are n x 8 x 8."""
        probabilities = self.classifier.predict_proba(images.reshape(len(images), 64))
        digits = probabilities.argmax(axis=1)
        return [
            {"digit": int(digit), "probability": float(row[digit])}
            for digit, row in zip(digits, probabilities, strict=True)
        ]


app = BatchedDigits.bind()
