"""Runs an application in this process, without a cluster and without sockets: for users' unit tests.

>>> from dask_serve import testing
>>> def test_model():
...     with testing.run(Model.bind()) as service:
...         assert service.handle.predict.remote(3).result() == 6
...         assert service.client.get("/").status_code == 200

Replicas, routers, the proxy's application and the frames between them are the real ones; what is missing is Dask, and
with it placement, other processes and everything that needs a scheduler.
"""

from __future__ import annotations

from .service import Service, run

__all__ = ["Service", "run"]
