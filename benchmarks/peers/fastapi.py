"""FastAPI on uvicorn as one of the systems; needs no environment of its own. ``... fastapi PORT`` is the server."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from importlib.metadata import version

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from benchmarks.peers.interface import answer
from benchmarks.peers.models import SleepingModel
from benchmarks.peers.served import Served, served

app = FastAPI()
model = SleepingModel()


class Question(BaseModel):
    """What is posted."""

    input: int


@app.post("/predict")
def predict(question: Question) -> dict[str, int]:
    """Answer with the model."""
    return {"output": model.predict(question.input)}


def opened() -> AbstractContextManager[Served]:
    """Start the server with its own defaults."""
    description = f"FastAPI {version('fastapi')} on uvicorn {version('uvicorn')}, one process"
    return served(description, lambda port: [sys.executable, "-m", __spec__.name, str(port)], "/predict")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
    else:
        answer(opened)
