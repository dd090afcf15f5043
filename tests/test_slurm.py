"""A service on a real SLURM: jobs that come, reach their lifetime or are killed under load; jobs of their own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client
from helpers import wait_until
from pages import block_after, blocks
from slurm_site import DAEMONS, Slurm, daemon, slurm_site
from test_leaving import Load

import dask_serve as serve

missing = [name for name in DAEMONS if daemon(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(missing), reason=f"no SLURM here ({', '.join(missing)} missing): make clusters"),
]
PAGE = "clusters/slurm.md"
PACKAGE = Path(serve.__file__).parent


@serve.deployment(num_replicas=2)
class Model:
    async def nap(self, seconds: float) -> int:
        await asyncio.sleep(seconds)
        return os.getpid()

    async def __call__(self, request: Any) -> dict[str, Any]:
        await asyncio.sleep(0.005)
        return {"label": os.environ["SLURM_JOB_ID"]}


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with slurm_site() as site, pytest.MonkeyPatch.context() as patch:
        for name, value in site.environment.items():
            patch.setenv(name, value)
        # Jobs have the environment of whoever submits them: the commands of this one, and the package.
        path = site.directory / "site"
        path.mkdir()
        (path / "dask_serve").symlink_to(PACKAGE)
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        patch.setenv("PYTHONPATH", str(path))
        yield site


def replicas(client: Client) -> list[Any]:
    return serve.status(client=client).applications["default"].deployments["Model"].replicas


def spread(client: Client) -> bool:
    """Both replicas are ready, each on a worker of its own."""
    workers = [replica.worker for replica in replicas(client) if replica.state == "ready"]
    return len(workers) == 2 == len(set(workers))


@pytest.fixture
def make(slurm: Slurm) -> Iterator[Any]:
    """Make a cluster without jobs."""
    from dask_jobqueue import SLURMCluster

    def make(*options: str) -> Any:
        cluster = SLURMCluster(
            cores=1,
            memory="1 GB",
            processes=1,
            walltime="00:10:00",
            interface="lo",
            log_directory=str(slurm.directory / "logs"),
            local_directory=str(slurm.directory),
            job_script_prologue=[f"cd {slurm.directory}"],
            scheduler_options={"dashboard_address": ":0"},
            worker_extra_args=["--no-dashboard", *options],
        )
        return stack.enter_context(cluster)

    with contextlib.ExitStack() as stack:
        yield make
    wait_until(lambda: not slurm.jobs())


def test_each_job_has_its_successor_before_it_goes(slurm: Slurm, make: Any) -> None:
    began = time.monotonic()
    cluster = make("--lifetime", "20s", "--lifetime-stagger", "3s")
    cluster.adapt(minimum=0, maximum=4, interval="500ms")
    with Client(cluster) as client:
        handle = serve.run(Model.bind(), client=client, timeout=60)
        print(f"service after {time.monotonic() - began:.1f} s")
        wait_until(lambda: spread(client), timeout=40)
        first = set(slurm.jobs())
        ready = []
        with Load(handle, serve.url(client=client) + "/", threads=2) as load:

            def gone() -> bool:
                ready.append(sum(replica.state == "ready" for replica in replicas(client)))
                # Looked at now and then: squeue is a process.
                time.sleep(0.1)
                return not first & set(slurm.jobs())

            wait_until(gone, timeout=90)
            load.goes_on()
        slowest = max(took for _, took, _ in load.answers)
        print(f"{len(load.answers)} requests, {len(load.errors)} failed, the slowest took {slowest:.2f} s")
        assert load.errors == []
        assert min(ready) >= 2, "replacements are ready before anything ends"
        # Asking for a place anew for each start would show as jobs that never run.
        assert max(int(job) for job in slurm.jobs()) <= len(first) + 8
        serve.shutdown(client=client)


def test_a_killed_job_is_replaced(slurm: Slurm, make: Any) -> None:
    cluster = make()
    cluster.adapt(minimum=0, maximum=4, interval="500ms")
    with Client(cluster) as client:
        handle = serve.run(Model.bind(), client=client, timeout=60)
        wait_until(lambda: spread(client), timeout=60)
        url = serve.url(client=client) + "/"
        with Load(handle, url, threads=2) as load:
            victim = json.loads(urllib.request.urlopen(url, timeout=20).read())["label"]
            before = {replica.id for replica in replicas(client)}
            killed = time.monotonic()
            slurm.run("scancel", "--signal=KILL", "--full", victim)
            wait_until(lambda: len({replica.id for replica in replicas(client)} & before) == 1)
            wait_until(lambda: sum(replica.state == "ready" for replica in replicas(client)) == 2)
            print(f"two replicas again after {time.monotonic() - killed:.1f} s, {len(load.errors)} requests lost")
            load.goes_on()
            # Dask counts the job as there for 15 s.
            wait_until(lambda: spread(client), timeout=60)
            print(f"on two jobs again after {time.monotonic() - killed:.1f} s")
            load.goes_on()
        # Only what ran there.
        assert all("ReplicaLostError" in error or "HTTP Error 502" in error for error in load.errors), load.errors
        assert len(load.errors) <= 4
        assert victim not in slurm.jobs()
        serve.shutdown(client=client)


def test_scale_by_hand(slurm: Slurm, make: Any) -> None:
    """Jobs that are scaled away hand over first."""
    cluster = make()
    cluster.scale(jobs=2)
    with Client(cluster) as client:
        client.wait_for_workers(2, timeout=60)
        handle = serve.run(Model.bind(), client=client, timeout=60)
        with Load(handle, serve.url(client=client) + "/", threads=2) as load:
            cluster.scale(jobs=1)
            wait_until(lambda: len(slurm.jobs()) == 1, timeout=30)
            load.goes_on()
        assert load.errors == []
        assert len({replica.worker for replica in replicas(client)}) == 1
        serve.shutdown(client=client)


@pytest.fixture
def shared(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory that all nodes see, and that a user is in."""
    directory = slurm.directory / "shared"
    directory.mkdir()
    monkeypatch.chdir(directory)
    yield directory
    for job in slurm.jobs():
        slurm.run("scancel", job, check=False)
    wait_until(lambda: not slurm.jobs(), timeout=60)


def test_a_service_that_outlives_sessions(slurm: Slurm, shared: Path) -> None:
    """The page's scripts as they are written, but for times: a minute's walltime, and lifetimes before it."""
    script = block_after(PAGE, "`workers.sbatch`:")
    for written, short in {
        "0-999%4": "0-99%3",
        "--time=04:00:00": "--time=00:01:00",
        "--lifetime 225m --lifetime-stagger 5m": "--lifetime 25s --lifetime-stagger 8s",
        "--nthreads 4": "--nthreads 1",
    }.items():
        assert written in script
        script = script.replace(written, short)
    (shared / "workers.sbatch").write_text(script)
    (shared / "service.sbatch").write_text(block_after(PAGE, "`service.sbatch`:"))
    submit = next(block for block in blocks(PAGE, "bash") if block.startswith("sbatch "))
    began = time.monotonic()
    subprocess.run(["bash", "-ec", submit], check=True, timeout=30)
    wait_until((shared / "scheduler.json").exists, timeout=40)
    with Client(scheduler_file="scheduler.json") as client:
        serve.run(Model.bind(), client=client, timeout=60)
    print(f"service after {time.monotonic() - began:.1f} s")
    url = json.loads((shared / "service.json").read_text())["url"] + "/"
    assert "127.0.0.1" not in url

    # Sessions have ended; jobs begin and end.
    with Client(scheduler_file="scheduler.json") as client:
        wait_until(lambda: spread(client), timeout=30)
        with Load(serve.get_app_handle(client=client), url, threads=2) as load:
            first = set(slurm.jobs("service-workers"))
            first = {job for job in first if slurm.jobs()[job] == "RUNNING"}

            def gone() -> bool:
                time.sleep(0.1)
                return not first & set(slurm.jobs("service-workers"))

            wait_until(gone, timeout=90)
            load.goes_on()
        jobs = {told for _, _, told in load.answers if isinstance(told, str)}
        slowest = max(took for _, took, _ in load.answers)
        print(f"{len(load.answers)} requests in {len(jobs)} jobs, {len(load.errors)} failed, slowest {slowest:.2f} s")
        assert load.errors == []
        assert len(jobs) > 2
    for job in first:
        ended = slurm.run("scontrol", "show", "job", job)
        assert "JobState=COMPLETED" in ended, "none was ended by its walltime"

    # The scheduler's node fails: its job starts again, and brings back what was deployed.
    (service,) = slurm.jobs("service")
    pid = json.loads((shared / "service.json").read_text())["pid"]
    slurm.run("scontrol", "requeue", service)
    wait_until(lambda: slurm.jobs("service").get(service) == "PENDING", timeout=60)
    # Two minutes later otherwise.
    slurm.run("scontrol", "update", f"JobId={service}", "StartTime=now")
    wait_until(lambda: (found := _told(shared)) and found["pid"] != pid, timeout=90)
    url = _told(shared)["url"] + "/"

    def answers() -> bool:
        try:
            return bool(json.loads(urllib.request.urlopen(url, timeout=5).read())["label"])
        except OSError:
            return False

    wait_until(answers, timeout=60)
    slurm.run("scancel", service)
    wait_until(lambda: not (shared / "service.json").exists(), timeout=30)


def _told(directory: Path) -> dict[str, Any] | None:
    try:
        return json.loads((directory / "service.json").read_text())
    except FileNotFoundError:
        return None
