"""A scikit-learn classifier of handwritten digits as a service.

Serve it until Ctrl-C, and ask it::

    dask serve run examples.digits:app
    curl http://127.0.0.1:8000/ -d '{"image": [[0, 0, 5, 13, 9, 1, 0, 0], ...]}'
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from starlette.requests import Request
from starlette.responses import JSONResponse

import dask_serve as serve


def split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images, test images (8 x 8, values 0 to 16), training labels and test labels; always the same."""
    images, labels = load_digits(return_X_y=True)
    return train_test_split(images.reshape(-1, 8, 8), labels, test_size=0.2, stratify=labels, random_state=0)


@serve.deployment(num_replicas=2)
class Digits:
    """Tells which digit an image shows.

    Parameters
    ----------
    classifier : object, optional
        Anything with ``predict_proba`` for rows of 64 values. Without one, each replica trains its own at the
        start, which takes a fraction of a second.
    """

    def __init__(self, classifier: Any = None) -> None:
        if classifier is None:
            images, _, labels, _ = split()
            # A tree answers for one image in one thread; brute force would wake OpenMP's for it, on all cores.
            classifier = KNeighborsClassifier(n_neighbors=3, weights="distance", algorithm="kd_tree")
            classifier.fit(images.reshape(-1, 64), labels)
        self.classifier = classifier

    async def __call__(self, request: Request) -> JSONResponse:
        """Answer HTTP: ``{"image": 8 rows of 8 values}`` gives ``{"digit": 3, "probability": 1.0}``."""
        try:
            answer = self.predict((await request.json())["image"])
        except (KeyError, TypeError, ValueError) as error:
            return JSONResponse(
                {"error": f'send {{"image": 8 rows of 8 numbers}} as JSON ({error!r})'}, status_code=400
            )
        return JSONResponse(answer)

    def predict(self, image: Any) -> dict[str, Any]:
        """Answer Python: the digit and its probability for an array or nested list of 8 x 8 values from 0 to 16."""
        pixels = np.asarray(image, dtype=float)
        if pixels.shape != (8, 8):
            raise ValueError(f"an image has 8 x 8 values, not {' x '.join(map(str, pixels.shape)) or 'one'}")
        [probabilities] = self.classifier.predict_proba(pixels.reshape(1, 64))
        best = int(probabilities.argmax())
        return {"digit": int(self.classifier.classes_[best]), "probability": float(probabilities[best])}


app = Digits.bind()
