"""What `dask serve doctor` looks at."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from .asking import Answer, ask_workers
from .certificates import days_left
from .connecting import Cluster

if TYPE_CHECKING:
    from distributed import Client

    from ..controller.status import ServeStatus

__all__ = ["Examination", "Finding"]

#: Seconds that clocks may differ by.
CLOCKS = 2.0
#: Days before its end that a certificate is told of.
EXPIRES = 14
#: What has to be the same in all processes that serve together: to the last digit, or but for the last one.
SAME = ("dask_serve", "distributed")
ALIKE = ("python", "msgspec", "cloudpickle", "dask", "tornado")


class Finding(NamedTuple):
    """One thing that was looked at."""

    #: ``ok``, ``note`` or ``wrong``.
    state: str
    subject: str
    message: str
    repair: str = ""


class Examination:
    """Looks at a cluster from here.

    Parameters
    ----------
    cluster : Cluster
        As the options of the command name it.
    """

    def __init__(self, cluster: Cluster) -> None:
        from ..checkup import facts

        self.findings: list[Finding] = []
        #: What the processes told of themselves, by what they are.
        self.processes: dict[str, dict[str, Any]] = {"client": facts()}
        self._cluster = cluster

    def add(self, state: str, subject: str, message: str, repair: str = "") -> None:
        """Note what was found."""
        self.findings.append(Finding(state, subject, message, repair))

    def run(self, client: Client) -> None:
        """Look at everything."""
        status, checkup = self._scheduler(client)
        self._workers(client)
        self._versions(status)
        self._tls(client)
        if checkup is not None:
            self._doors(client, checkup["doors"])
            self._state_file(checkup)
        if status is not None:
            self._http(status)
            self._applications(status)

    def _scheduler(self, client: Client) -> tuple[ServeStatus | None, dict[str, Any] | None]:
        from .. import api
        from ..checkup import facts
        from ..exceptions import ServeError
        from ..session.peers import probe

        address = client.scheduler.address
        asked = time.time()
        checkup = client.sync(probe, client.scheduler, "serve_checkup")
        if checkup is not None:
            self.add("ok", "scheduler", f"it answers at {address}, and dask_serve runs there")
            self._clock("scheduler", checkup["facts"]["time"], asked, time.time())
            self.processes["scheduler"] = checkup["facts"]
            try:
                return api.status(client=client), checkup
            except (ServeError, ValueError) as error:
                self.add("wrong", "status", f"it cannot be read: {error}", "use one version of dask_serve everywhere")
                return None, checkup
        self.add("note", "scheduler", f"it answers at {address}, and dask_serve does not run there yet")
        try:
            self.processes["scheduler"] = found = client.run_on_scheduler(facts)
            self._clock("scheduler", found["time"], asked, time.time())
        except ImportError:
            self._lacks("scheduler")
        except ValueError as error:
            self.add("note", "scheduler", f"it takes no code from clients ({error})", _PRELOAD)
        return None, None

    def _workers(self, client: Client) -> None:
        from ..checkup import facts

        answers = ask_workers(client, facts)
        if not answers:
            self.add("wrong", "workers", "there are none", f"start some: dask worker {client.scheduler.address}")
            return
        for answer in answers:
            self._worker(answer)
        answered = sum(answer.error is None for answer in answers)
        if answered:
            self.add("ok", "workers", f"{answered} of {len(answers)} have dask_serve and answer")

    def _worker(self, answer: Answer) -> None:
        name, error = f"worker {answer.worker}", answer.error
        if isinstance(error, ImportError) or "No module named 'dask_serve'" in str(error):
            self._lacks(name)
        elif error is not None:
            message = f"it does not answer ({type(error).__name__}: {error})".replace(": )", ")")
            self.add("wrong", name, message, "is it busy, stopped, or out of memory? Its own output tells")
        else:
            self.processes[name] = answer.value
            self._clock(name, answer.value["time"], answer.asked, answer.answered)

    def _lacks(self, name: str) -> None:
        from .. import __version__

        self.add(
            "wrong",
            name,
            "dask_serve cannot be imported there",
            f"install it there: pip install dask-serve=={__version__}",
        )

    def _clock(self, name: str, told: float, asked: float, answered: float) -> None:
        # It was told at some moment between the two.
        away = max(asked - told, told - answered)
        if away > CLOCKS:
            self.add(
                "wrong",
                name,
                f"its clock differs by {away:.1f} s from the one here",
                "set clocks by NTP: times in logs and in the history cannot be compared",
            )

    def _versions(self, status: ServeStatus | None) -> None:
        from .. import __version__

        well = True
        for package in (*SAME, *ALIKE):
            told = {name: process["versions"].get(package, "") for name, process in self.processes.items()}
            usual, _ = Counter(told.values()).most_common(1)[0]
            for name, version in told.items():
                if not _fits(package, version, usual):
                    well = False
                    state = "wrong" if package in SAME or package == "python" else "note"
                    others = f"{usual or 'none'} in others"
                    self.add(state, name, f"it has {package} {version or 'not at all'}, {others}", _ALIKE)
        for proxy in status.proxies if status is not None else ():
            version = proxy.version or __version__
            if version != __version__:
                well = False
                message = f"it has dask_serve {version}, {__version__} here"
                self.add("wrong", f"proxy on {proxy.node}", message, _ALIKE)
        if well:
            versions = self.processes["client"]["versions"]
            told_here = ", ".join(f"{name} {versions[name]}" for name in ("python", *SAME, "dask"))
            self.add("ok", "versions", f"{len(self.processes)} processes agree: {told_here}")

    def _tls(self, client: Client) -> None:
        address = client.scheduler.address
        if not address.startswith("tls://"):
            self.add("note", "TLS", "connections within the cluster are not encrypted", "see Dask's page on TLS")
            return
        context = client.security.get_connection_args("client").get("ssl_context")
        left, why = asyncio.run(days_left(address, context))
        if left is None:
            self.add("wrong", "TLS", f"the scheduler's certificate cannot be checked: {why}")
        elif left < EXPIRES:
            self.add("wrong", "TLS", f"the scheduler's certificate ends in {left:.0f} days", "renew it")
        else:
            self.add("ok", "TLS", f"the scheduler's certificate is good for {left:.0f} days")

    def _doors(self, client: Client, doors: list[dict[str, str]]) -> None:
        from ..checkup import knock_all

        here = asyncio.run(knock_all(door["door"] for door in doors))
        for door in doors:
            name = f"door {door['door']}"
            if door["why"]:
                self.add("wrong", name, f"the scheduler cannot reach it: {door['why']}", _DOORS.format(**door))
            elif here[door["door"]]:
                message = f"it cannot be reached from here: {here[door['door']]}"
                self.add("note", name, message, "calls from here go through the scheduler, which is slower")
        if doors and not any(door["why"] or here[door["door"]] for door in doors):
            self.add("ok", "doors", f"{len(doors)} can be reached from here and from the scheduler")

    def _state_file(self, checkup: dict[str, Any]) -> None:
        for trouble in checkup["trouble"]:
            self.add("wrong", "state file", trouble)
        path = checkup["state_file"]
        if path:
            kind = "a crash of the scheduler" if checkup["for_crashes"] else "restarts of the scheduler"
            self.add("ok", "state file", f"{path}; applications outlive {kind}")
        elif not checkup["trouble"]:
            self.add(
                "note",
                "state file",
                "there is none: applications end with the scheduler",
                "dask scheduler --preload dask_serve.preload --serve-state PATH",
            )

    def _http(self, status: ServeStatus) -> None:
        from .healthz import ask_healthz

        if status.message:
            self.add("wrong", "HTTP", status.message)
        for url in dict.fromkeys([status.url, *(proxy.url for proxy in status.proxies)]):
            if url:
                state, message, repair = ask_healthz(url, self._cluster)
                self.add(state, f"HTTP at {url}", message, repair)

    def _applications(self, status: ServeStatus) -> None:
        for name, application in status.applications.items():
            if application.status == "running":
                self.add("ok", f"application {name}", "it runs")
            else:
                last = next(iter(application.message.strip().splitlines()[::-1]), "")
                repair = f"dask serve logs {name}; dask serve status {name} -v"
                state = "wrong" if application.status in ("failed", "unhealthy") else "note"
                self.add(state, f"application {name}", f"it is {application.status}: {last}".rstrip(": "), repair)


_PRELOAD = "start the scheduler with `dask scheduler --preload dask_serve.preload`"
_ALIKE = "use one environment (an image, a lock file) for clients, scheduler, workers and proxies"
_DOORS = (
    "open the ports between the scheduler's node and worker {worker}, or start it with --contact-address and "
    "--interface of a network that both have"
)


def _fits(package: str, version: str, usual: str) -> bool:
    if package in ALIKE:
        return version.split(".")[:2] == usual.split(".")[:2]
    return version == usual
