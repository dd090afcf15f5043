"""What happens under overload, on a turned clock, with the policies that run in production.

Run as a script it prints the table of the decision on overload::

    PYTHONPATH=. python tests/overload_scenarios.py
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from credits_simulator import Simulation


class Outcome:
    """What became of the requests that came in a window of time.

    Attributes
    ----------
    goodput : float
        Answered requests, as a share of the capacity.
    late : float
        Those that were taken in and not answered in time, as a share of those taken in.
    wasted : float
        Work done for nobody, as a share of all work.
    """

    def __init__(self, sim: Simulation, since: float, until: float, capacity: float) -> None:
        window = [r for r in sim.requests if since <= r.since < until and not r.background]
        ends = Counter(r.outcomes[0] if r.outcomes else "open" for r in window)
        taken = len(window) - ends["refused"]
        self.ends = ends
        self.goodput = ends["result"] / ((until - since) * capacity)
        self.late = (ends["late"] + ends["too late"]) / max(taken, 1)
        seconds = sorted(r.seconds for r in window if r.outcomes == ["result"])
        self.p50, self.p99 = (seconds[int(len(seconds) * q)] if seconds else 0.0 for q in (0.5, 0.99))
        worked = sum(r.worked for r in sim.replicas)
        self.wasted = sum(r.wasted for r in sim.replicas) / worked if worked else 0.0

    def __repr__(self) -> str:
        return (
            f"goodput {self.goodput:.3f}, late {self.late:.4f}, p50 {self.p50 * 1e3:.1f} ms, "
            f"p99 {self.p99 * 1e3:.1f} ms, wasted {self.wasted:.4f}, {dict(self.ends)}"
        )


def overload(times: float, seed: int = 0, seconds: float = 6.0, **options: Any) -> Outcome:
    """S2: so many times the capacity is offered, with 100 ms until the deadline."""
    given: dict[str, Any] = {"replicas": 4, "routers": 2, "limit": 100, "threads": 1, "service": 0.01, "deadline": 0.1}
    given |= {"skew": 1.0, **options}
    sim = Simulation(load=times, seed=seed, **given)
    sim.run(seconds)
    capacity = given["replicas"] * (given["threads"] or given["limit"]) / given["service"]
    return Outcome(sim, 1.0, seconds - 1.0, capacity)


def arrivals(sim: Simulation, rate: Callable[[float], float], seconds: float) -> None:
    """Let requests come at a rate that changes with time, at the first router."""
    highest = max(rate(seconds * i / 100) for i in range(100))

    def come() -> None:
        if sim.random.random() * highest < rate(sim.now):
            sim.routers[0].submit()
        if sim.now < seconds:
            sim.after(sim.random.expovariate(highest), come)

    come()


def step(seed: int = 0) -> tuple[Outcome, Outcome, Outcome]:
    """S3: 1.4 times the usual load for 5 s; before it, in it, and from 1 s after its end."""
    sim = Simulation(replicas=4, routers=1, limit=100, threads=1, service=0.01, constant=True, deadline=0.1, seed=seed)
    capacity = 400.0
    arrivals(sim, lambda now: capacity * 0.8 * (1.4 if 5.0 <= now < 10.0 else 1.0), 16.0)
    sim.run(16.0)
    return (
        Outcome(sim, 1.0, 5.0, capacity),
        Outcome(sim, 5.0, 10.0, capacity),
        Outcome(sim, 11.0, 15.0, capacity),
    )


def one_slow(times: float = 10.0, seed: int = 0) -> tuple[Outcome, Outcome]:
    """S7: 60 % of the capacity is offered; without and with one of 4 replicas that takes 10 times as long."""
    outcomes = []
    for factor in (1.0, times):
        sim = Simulation(
            replicas=4, routers=2, limit=100, threads=1, service=0.01, load=0.6, skew=1.0, seed=seed, deadline=60.0
        )
        sim.replicas[0].times = factor
        sim.run(20.0)
        outcomes.append(Outcome(sim, 2.0, 19.0, 400.0))
    return outcomes[0], outcomes[1]


def behind(callers: int = 64, seed: int = 0, threads: int = 1, limit: int = 100) -> tuple[Outcome, Outcome, float]:
    """S10: online requests at half of the capacity; without and with a background map; and what the map did."""
    outcomes = []
    done = 0.0
    for mapping in (0, callers):
        sim = Simulation(
            replicas=2,
            routers=2,
            limit=limit,
            threads=threads,
            service=0.01,
            constant=True,
            load=0.5,
            skew=1.0,
            seed=seed,
        )

        def call(sim: Simulation = sim) -> None:
            sim.routers[1].submit(lambda: sim.after(0.0, call, sim), background=True)

        for _ in range(mapping):
            call()
        sim.run(10.0)
        capacity = 2 * (threads or limit) / 0.01
        outcomes.append(Outcome(sim, 1.0, 9.0, capacity))
        mapped = [r for r in sim.requests if r.background and r.outcomes and 1.0 <= r.since < 9.0]
        done = len(mapped) / 8.0 / capacity
    return outcomes[0], outcomes[1], done


if __name__ == "__main__":
    for constant in (True, False):
        for times in (0.9, 2.0, 5.0):
            print("S2", "constant" if constant else "exponential", times, overload(times, constant=constant))
    print("S2 limit 4, no threads", overload(5.0, limit=4, threads=0, constant=True))
    print("S2 limit 4, exp", overload(5.0, limit=4, threads=0))
    print("S2 1 router", overload(5.0, routers=1, constant=True))
    for name, outcome in zip(("before", "in", "after"), step(), strict=True):
        print("S3", name, outcome)
    for name, outcome in zip(("even", "one slow"), one_slow(), strict=True):
        print("S7", name, outcome)
    for name, outcome in zip(("alone", "beside a map", "map"), behind(), strict=True):
        print("S10", name, outcome)
