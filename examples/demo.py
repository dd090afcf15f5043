"""Start a cluster, serve the digits classifier, ask it over HTTP and from Python, and stop.

Run ``make demo``, or ``python -m examples.demo [--keep]`` at the root of the repository.
"""

from __future__ import annotations

import argparse
import http.client
import json
import logging
import sys
import threading
import time
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from distributed import default_client

import dask_serve as serve

from .digits import app, split

#: How many test images go in by HTTP, and how many of those are shown one by one.
OVER_HTTP = 60
SHOWN = 10
#: The classifier is right for about 98 in 100; much less means that something else is wrong.
ENOUGH = 0.9
INK = " .:-=+*#@"


class Steps:
    """Says what is going on, and how long it took; dask_serve's own messages come in between."""

    def begin(self, text: str) -> None:
        print(f"{text} ...", flush=True)
        self.begun = time.monotonic()

    def done(self, text: str = "done") -> None:
        print(f"    {text} after {time.monotonic() - self.begun:.1f} s", flush=True)


def show_messages() -> None:
    """Print what dask_serve logs where it has no terminal to show its progress on."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("    %(name)s: %(message)s"))
    logger = logging.getLogger("dask_serve")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def draw(image: np.ndarray) -> list[str]:
    """Draw an image in characters, two for a pixel."""
    return ["".join(2 * INK[int(value) * (len(INK) - 1) // 16] for value in row) for row in image]


def ask_http(url: str, images: np.ndarray) -> list[dict[str, Any]]:
    """POST the images one after the other over one kept connection."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port, timeout=30)
    answers = []
    try:
        for image in images:
            body = json.dumps({"image": image.tolist()})
            connection.request("POST", "/", body, {"content-type": "application/json"})
            response = connection.getresponse()
            text = response.read().decode()
            if response.status != 200:
                raise RuntimeError(f"{url} answered {response.status}: {text}")
            answers.append(json.loads(text))
    finally:
        connection.close()
    return answers


def ask_python(handle: serve.DeploymentHandle, images: np.ndarray) -> list[dict[str, Any]]:
    """Call the replicas with all images at once, and wait for the results."""
    refs = [handle.predict.remote(image) for image in images]
    return [ref.result(timeout=60) for ref in refs]


def show(images: np.ndarray, labels: np.ndarray, answers: list[dict[str, Any]]) -> None:
    """Print the first predictions beside the true labels, and draw two of the images."""
    for rows in zip(draw(images[0]), draw(images[1]), strict=True):
        print("   ", "    ".join(rows))
    print("\n    image   true label   predicted   probability")
    for number, (label, answer) in enumerate(zip(labels, answers, strict=True)):
        mark = "" if answer["digit"] == label else "   <- wrong"
        print(f"    {number:5}   {label:10}   {answer['digit']:9}   {answer['probability']:11.2f}{mark}")
    print()


def share_right(labels: np.ndarray, answers: list[dict[str, Any]]) -> float:
    """Tell which share of the answers is right."""
    right = sum(answer["digit"] == label for label, answer in zip(labels, answers, strict=True))
    return right / len(answers)


def main() -> int:
    """Run the demonstration; the exit code."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="stay up until Ctrl-C")
    keep = parser.parse_args().keep
    steps = Steps()
    show_messages()
    _, images, _, labels = split()
    right = 0.0
    try:
        steps.begin("Starting a Dask cluster and the HTTP proxy")
        serve.start()
        steps.done()
        steps.begin("Starting 2 replicas of the classifier")
        handle = serve.run(app)
        steps.done()
        url = serve.url()
        print(f"    service     {url}\n    dashboard   {default_client().dashboard_link}")

        steps.begin(f"Sending {OVER_HTTP} test images by HTTP")
        over_http = ask_http(url, images[:OVER_HTTP])
        steps.done(f"{share_right(labels[:OVER_HTTP], over_http):.1%} right")
        show(images[:SHOWN], labels[:SHOWN], over_http[:SHOWN])

        steps.begin(f"Sending {len(images)} test images through the Python handle")
        from_python = ask_python(handle, images)
        right = share_right(labels, from_python)
        steps.done(f"{right:.1%} right")
        if from_python[:OVER_HTTP] != over_http:
            print("HTTP and Python gave different answers", file=sys.stderr)
            return 1
        if keep:
            print(f"\nServing at {url} until Ctrl-C", flush=True)
            threading.Event().wait()
    except KeyboardInterrupt:
        print()
    finally:
        steps.begin("Stopping")
        serve.shutdown()
        steps.done()
    return 0 if right >= ENOUGH else 1


if __name__ == "__main__":
    sys.exit(main())
