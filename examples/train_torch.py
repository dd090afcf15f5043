"""A network of torch, trained in a Dask task, and served from the worker that trained it.

The session gets a future and binds it: replicas fetch the weights from that worker. The next version goes on training
from the weights of the first one, which it takes as an argument, and takes its place without a lost request.

Needs torch: ``pip install torch --index-url https://download.pytorch.org/whl/cpu``. Run it alone, 20 s with its own
cluster::

    python -m examples.train_torch
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import numpy as np
from distributed import Client, wait

import dask_serve as serve

from .digits import split

Weights = dict[str, np.ndarray]


def network() -> Any:
    """Make the network, with weights by chance."""
    import torch

    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))


def load(weights: Weights) -> Any:
    """Make the network with these weights."""
    import torch

    made = network()
    made.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in weights.items()})
    return made


def train(weights: Weights | None, epochs: int) -> Weights:
    """Train for a while, from weights or from chance. A Dask task: what it returns stays on this worker."""
    import torch

    images, _, labels, _ = split()
    inputs = torch.tensor(images.reshape(-1, 64) / 16, dtype=torch.float32)
    targets = torch.tensor(labels)
    made = network() if weights is None else load(weights)
    optimizer = torch.optim.Adam(made.parameters(), lr=0.01)
    for _ in range(epochs):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(made(inputs), targets).backward()
        optimizer.step()
    # Arrays, which every process can read without copying them.
    return {name: tensor.numpy() for name, tensor in made.state_dict().items()}


@serve.deployment(num_replicas=2)
class Network:
    """Recognises digits."""

    def __init__(self, weights: Weights) -> None:
        self.network = load(weights).eval()

    @serve.batch(max_batch_size=64, stack=True)
    def predict(self, images: np.ndarray) -> list[int]:
        """Callers give one image of 8 x 8 values; here they are n x 8 x 8."""
        import torch

        with torch.inference_mode():
            outputs = self.network(torch.tensor(images.reshape(-1, 64) / 16, dtype=torch.float32))
        return outputs.argmax(1).tolist()


def main(client: Client) -> tuple[float, float]:
    """Train, serve, train on, serve that; how often each was right."""
    _, images, _, labels = split()
    right = []
    try:
        weights = None
        for epochs in (5, 60):
            # A future as an argument: the weights go from worker to worker, or nowhere.
            weights = client.submit(train, weights, epochs, pure=False)
            wait(weights)
            handle = serve.run(Network.bind(weights), route_prefix=None, client=client)
            answers = serve.gather([handle.predict.remote(image) for image in images])
            right.append(float(np.mean(np.array(answers) == labels)))
            print(f"{epochs} epochs later it is right in {right[-1]:.1%}")
        return right[0], right[1]
    finally:
        serve.shutdown(client=client)


if __name__ == "__main__":
    if importlib.util.find_spec("torch") is None:
        sys.exit("This example needs torch: pip install torch --index-url https://download.pytorch.org/whl/cpu")
    with Client(n_workers=2, threads_per_worker=2, dashboard_address=":0") as client:
        main(client)
