"""What the Serve page costs the scheduler: ``python -m benchmarks.dashboard``.

A real scheduler and controller, whose workers are made up: they tell what 200 replicas under load would. The share of
a core that the process takes is measured without samples, with the page closed, and with a browser's session on it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import subprocess
import sys
import time

import dask
import msgspec
from distributed import Scheduler
from distributed.core import Status
from distributed.scheduler import WorkerState

from dask_serve.config import DeploymentOptions
from dask_serve.controller.plugin import Controller
from dask_serve.controller.replica import Replica
from dask_serve.controller.state_file import StateFile
from dask_serve.controller.status import DeploymentStatus
from dask_serve.measures.counts import HttpCounts, ReplicaCounts
from dask_serve.policy.desired import ApplicationSpec, DeploymentSpec

REPLICAS, DEPLOYMENTS, HEARTBEAT, SECONDS = 200, 10, 2.0, 20.0

#: A session as a browser has one, in another process.
LOOK = """
import os, sys, time
from bokeh.client import pull_session
session = pull_session(url=sys.argv[1])
print("open", flush=True)
ends, changes = time.monotonic() + float(sys.argv[2]), 0
def changed(event):
    global changes
    changes += 1
    if time.monotonic() > ends:
        print(changes, flush=True)
        os._exit(0)
session.document.on_change(changed)
session._connection.loop_until_closed()
"""


class Cluster:
    """A scheduler with workers that are made up."""

    def __init__(self, scheduler: Scheduler, controller: Controller) -> None:
        self._controller = controller
        self._counts: dict[str, dict[str, ReplicaCounts]] = {}
        self._http = {f"app/d{number}": HttpCounts() for number in range(DEPLOYMENTS)}
        specs = [
            DeploymentSpec(name=f"d{n}", revision=f"r{n}", options=_options(), methods=["__call__"])
            for n in range(DEPLOYMENTS)
        ]
        application = ApplicationSpec(name="app", route_prefix="/", ingress="d0", deployments=specs)
        controller.registry.deploy(application, {spec.revision: b"" for spec in specs})
        self.workers = []
        for number in range(REPLICAS):
            address = f"tcp://10.0.{number // 250}.{number % 250}:{40000 + number}"
            worker = WorkerState(
                address=address, status=Status.running, pid=0, name=number, memory_limit=0, local_directory="",
                nanny="", server_id=str(number), services={}, versions={}, extra={}, scheduler=scheduler,
            )  # fmt: skip
            scheduler.workers[address] = worker
            controller.measures.joined(worker)
            replica = Replica("app", specs[number % DEPLOYMENTS], address, time.monotonic())
            controller.registry.add(replica)
            replica.process, replica.door, replica.submitted = f"p{number}", "", True
            replica.move("ready")
            self._counts[address] = {replica.deployment: ReplicaCounts()}
            self.workers.append((worker, replica))

    def beat(self, worker: WorkerState, replica: Replica) -> None:
        """Tell what a heartbeat would."""
        for counts in self._counts[worker.address].values():
            for _ in range(50):
                counts.add(random.expovariate(1000), random.expovariate(50))
                counts.answered += 1
        stats = {"running": 3, "answered": counts.answered, "failed": 0, "dropped": 0, "seconds_wasted": 0.0}
        serve = {
            "process": replica.process,
            "results": 0,
            "result_bytes": 0,
            "limit": None,
            "replicas": {replica.id: stats},
        }
        exported = {name: one.export() for name, one in self._counts[worker.address].items()}
        worker.metrics = {"serve": serve, "serve-counts": exported}
        worker.last_seen = time.time()

    def tell(self, proxy: int) -> None:
        """Tell what a proxy would."""
        for counts in self._http.values():
            for _ in range(100):
                counts.add(random.choice((200, 200, 200, 404, 500)), random.expovariate(50))
        self._controller.measures.proxy_told(f"proxy-{proxy}", {name: one.export() for name, one in self._http.items()})

    async def run(self) -> None:
        """Go on for ever."""
        pause = HEARTBEAT / REPLICAS
        while True:
            for number, (worker, replica) in enumerate(self.workers):
                self.beat(worker, replica)
                if number % (REPLICAS // 2) == 0:
                    self.tell(0)
                await asyncio.sleep(pause)


def _options() -> DeploymentOptions:
    return msgspec.convert({"num_replicas": REPLICAS // DEPLOYMENTS}, DeploymentOptions)


def _deployments(controller: Controller) -> list[DeploymentStatus]:
    return list(controller.present_status().applications["app"].deployments.values())


async def share(seconds: float) -> float:
    """Return the share of a core that this process takes."""
    began, used = time.monotonic(), time.process_time()
    await asyncio.sleep(seconds)
    return (time.process_time() - used) / (time.monotonic() - began)


async def main() -> None:
    """Measure."""
    controller = Controller(state=StateFile(None))
    async with Scheduler(host="127.0.0.1", port=0, dashboard_address="127.0.0.1:0") as scheduler:
        await scheduler.register_scheduler_plugin(controller, idempotent=True)
        controller.reconciler._step = lambda now: None  # nothing to place: there are no real workers
        cluster = Cluster(scheduler, controller)
        controller.publish()
        assert len(cluster.workers) == sum(len(one.replicas) for one in _deployments(controller)), "all are shown"
        load = asyncio.create_task(cluster.run())
        await asyncio.sleep(2)
        controller.dashboard.close()
        quiet = await share(SECONDS)
        controller.dashboard.start()
        closed = await share(SECONDS)
        url = f"http://127.0.0.1:{scheduler.http_server.port}/serve"
        with subprocess.Popen([sys.executable, "-c", LOOK, url, str(SECONDS + 3)], stdout=subprocess.PIPE) as look:  # noqa: ASYNC220
            await asyncio.to_thread(look.stdout.readline)
            await asyncio.sleep(2)
            opened = await share(SECONDS)
            changes = int(await asyncio.to_thread(look.stdout.readline))
        load.cancel()
        print(f"{REPLICAS} replicas, {DEPLOYMENTS} deployments; share of a core, above {quiet:.1%} without samples:")
        pace = f"{changes / (SECONDS + 3):.0f} changes a second"
        print(f"page closed {closed - quiet:.2%}, page open {opened - quiet:.2%} ({pace})")
        for worker, _ in cluster.workers:
            del scheduler.workers[worker.address]


if __name__ == "__main__":
    # It would look at workers that are not there.
    dask.config.set({"distributed.scheduler.active-memory-manager.start": False})
    logging.getLogger("distributed").setLevel(logging.ERROR)
    asyncio.run(main())
