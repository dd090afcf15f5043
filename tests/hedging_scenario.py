"""Would a second try of slow requests pay, at another replica? On a turned clock, for the decision on overload.

PYTHONPATH=. python tests/hedging_scenario.py
"""

from __future__ import annotations

import statistics
from collections import Counter, deque
from typing import Any

from credits_simulator import Request, Router, Simulation

#: Second tries are at most this share of the requests.
BUDGET = 0.1


class Hedged:
    """Each request of a router, with a second try once it has taken longer than a share ``after`` of the last ones."""

    def __init__(self, sim: Simulation, after: float) -> None:
        self.sim = sim
        self.after = after
        self.taken: list[float] = []
        self.lately: deque[float] = deque(maxlen=500)
        self.counts: Counter[str] = Counter()

    def come(self, router: Router) -> None:
        """A request comes."""
        tries: list[Request] = []
        since = self.sim.now
        self.counts["requests"] += 1

        def ended() -> None:
            ends = [request.outcomes[0] for request in tries if request.outcomes]
            if ends != ["result"]:
                # The other one was first.
                return
            self.lately.append(self.sim.now - since)
            if 2.0 <= since < 19.0:
                self.taken.append(self.sim.now - since)
            for request in tries:
                # Not in the same event: the answer is still being handled.
                self.sim.after(0.0, router.cancel, request)

        def again() -> None:
            first = tries[0]
            allowed = self.counts["second"] < BUDGET * self.counts["requests"]
            if first.dropped or first.place is None or not allowed:
                return
            self.counts["second"] += 1
            # Not where the first one is.
            target = first.place.target
            handicap, target.handicap = target.handicap, 1e6
            tries.append(router.submit(ended))
            target.handicap = handicap

        tries.append(router.submit(ended))
        if self.after and len(self.lately) >= 100:
            self.sim.after(sorted(self.lately)[int(self.after * len(self.lately))], again)


def run(slow: float, load: float, after: float, seed: int, **options: Any) -> tuple[float, float, float, float]:
    """Return the 99th and 99.9th percentile in ms, and the percentages of second tries and of work for nobody."""
    given: dict[str, Any] = {"limit": 100, "threads": 1, **options}
    sim = Simulation(replicas=4, routers=2, service=0.01, deadline=60.0, seed=seed, **given)
    sim.replicas[0].times = slow
    hedged = Hedged(sim, after)
    rate = load * 4 * (given["threads"] or given["limit"]) / 0.01 / len(sim.routers)

    def arrive(router: Router) -> None:
        hedged.come(router)
        sim.after(sim.random.expovariate(rate), arrive, router)

    for router in sim.routers:
        sim.after(sim.random.expovariate(rate), arrive, router)
    sim.run(20.0)
    taken = sorted(hedged.taken)
    worked = sum(replica.worked for replica in sim.replicas)
    return (
        1e3 * taken[int(0.99 * len(taken))],
        1e3 * taken[int(0.999 * len(taken))],
        100 * hedged.counts["second"] / hedged.counts["requests"],
        100 * sum(replica.wasted for replica in sim.replicas) / worked,
    )


def main(seeds: int = 6) -> None:
    """Print the table."""
    cases: dict[str, tuple[float, float, dict[str, Any]]] = {
        "S7, load 0.6": (10.0, 0.6, {}),
        "load 0.3": (10.0, 0.3, {}),
        "load 0.5, 4 slots without threads": (10.0, 0.5, {"threads": 0, "limit": 4}),
        "none slow, load 0.6": (1.0, 0.6, {}),
    }
    print("| | second try after | p99 | p99.9 | second tries | work for nobody |\n|---|---|---|---|---|---|")
    for what, (slow, load, options) in cases.items():
        for after in (0.0, 0.95, 0.99):
            found = [run(slow, load, after, seed, **options) for seed in range(seeds)]
            p99, p999, second, wasted = (statistics.mean(column) for column in zip(*found, strict=True))
            name = f"p{100 * after:g}" if after else "never"
            print(f"| {what} | {name} | {p99:.0f} ms | {p999:.0f} ms | {second:.1f} % | {wasted:.1f} % |", flush=True)


if __name__ == "__main__":
    main()
