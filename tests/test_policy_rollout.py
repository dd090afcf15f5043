"""The plan with a cluster around it, in which replicas, workers and updates come and go as they like."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dask_serve.policy.lifecycle import ENDS, Event, State, advance
from dask_serve.policy.placement import Need, WorkerView, place
from dask_serve.policy.reconcile import Attempts, Reconfigure, Seen, Start, Stop, Want, plan

DEPLOYMENTS = ("app/a", "app/b")
#: What one replica takes, and what a worker has.
NEED, HAS = 1.0, 2.0


class Replica:
    def __init__(self, number: int, deployment: str, revision: str, worker: str) -> None:
        self.id = f"{deployment}/{number}"
        self.deployment, self.revision, self.worker = deployment, revision, worker
        self.state: State = "starting"
        self.settings = b""
        self.started_at = 0.0

    def move(self, event: Event) -> None:
        self.state = advance(self.state, event)


class Cluster:
    """Carries plans out as the controller does."""

    def __init__(self, workers: int) -> None:
        self.workers = [f"w{number}" for number in range(workers)]
        self.leaving: set[str] = set()
        self.replicas: list[Replica] = []
        self.wants: dict[str, Want] = {}
        self.attempts: dict[tuple[str, str], Attempts] = {}
        self.crowded: set[str] = set()
        self.now = 0.0
        self.made = 0

    def of(self, *states: State) -> list[Replica]:
        return [replica for replica in self.replicas if replica.state in states]

    def ready(self, deployment: str) -> list[Replica]:
        return [r for r in self.of("ready") if r.deployment == deployment]

    def views(self, without: tuple[Replica, ...] = ()) -> list[WorkerView]:
        views = []
        for worker in self.workers:
            ours = [r for r in self.replicas if r.worker == worker and r not in without]
            views.append(
                WorkerView(
                    address=worker,
                    name=worker,
                    host="h",
                    nthreads=8,
                    running=worker not in self.leaving,
                    resources={"slot": HAS},
                    booked={"slot": NEED * len(ours)},
                    total=len(ours),
                )
            )
        return views

    def seen(self) -> list[Seen]:
        return [
            Seen(
                id=r.id,
                deployment=r.deployment,
                revision=r.revision,
                state=r.state,
                settings=r.settings,
                leaving=r.worker in self.leaving,
            )
            for r in self.replicas
        ]

    def plan(self) -> list[Start | Stop | Reconfigure]:
        return plan(self.wants, self.seen(), self.attempts, self.now, self.crowded).actions

    def step(self) -> int:
        """Plan once, and return how many actions could be done."""
        actions, done = self.plan(), 0
        self.crowded = set()
        by_id = {replica.id: replica for replica in self.replicas}
        for action in actions:
            if isinstance(action, Stop):
                by_id[action.replica].move("drain")
                done += 1
            elif isinstance(action, Reconfigure):
                replica = by_id[action.replica]
                replica.settings = self.wants[replica.deployment].settings
                done += 1
            else:
                done += self.start(action)
        return done

    def start(self, action: Start) -> bool:
        need = Need(resources={"slot": NEED})
        choice = place(need, self.views())
        if choice.worker is None:
            old = tuple(r for r in self.ready(action.deployment) if r.revision != action.revision)
            if old and place(need, self.views(old)).worker is not None:
                self.crowded.add(action.deployment)
            return False
        self.made += 1
        replica = Replica(self.made, action.deployment, action.revision, choice.worker)
        replica.settings = self.wants[action.deployment].settings
        replica.started_at = self.now
        self.replicas.append(replica)
        return True

    def tidy(self) -> None:
        self.replicas = [replica for replica in self.replicas if replica.state not in ENDS]

    def settle(self) -> None:
        """Let everything end well, until nothing is left to do."""
        idle = 0
        for _ in range(200):
            done = self.step()
            self.now += 31.0
            for replica in self.of("starting"):
                replica.move("ready")
                self.attempts.pop((replica.deployment, replica.revision), None)
                done += 1
            for replica in self.of("draining"):
                replica.move("stopped")
                done += 1
            self.tidy()
            # The first round may have found that there is no room, the second one could have made some.
            idle = 0 if done else idle + 1
            if idle == 2:
                return
        raise AssertionError(f"the plan does not converge: {self.plan()} of {self!r}")

    def __repr__(self) -> str:
        replicas = [f"{r.id} {r.revision} {r.state} {r.worker}" for r in self.replicas]
        return f"{self.wants} {replicas} {self.workers} leaving {self.leaving} crowded {self.crowded}"


class Rollouts(RuleBasedStateMachine):
    """Replicas of two deployments on some workers."""

    @initialize(workers=st.integers(1, 5))
    def begin(self, workers: int) -> None:
        self.cluster = Cluster(workers)
        self.revision = 0
        #: By deployment: what may not be undercut by our own doing.
        self.floor: dict[str, int] = {}

    @rule(
        name=st.sampled_from(DEPLOYMENTS),
        replicas=st.integers(1, 5),
        surge=st.integers(0, 2),
        unavailable=st.integers(0, 2),
        new=st.booleans(),
    )
    def deploy(self, name: str, replicas: int, surge: int, unavailable: int, new: bool) -> None:
        cluster = self.cluster
        self.revision += 1
        before = cluster.wants.get(name)
        revision = before.revision if before is not None and not new else f"r{self.revision}"
        cluster.wants[name] = Want(
            revision=revision,
            replicas=replicas,
            settings=str(self.revision).encode(),
            surge=surge,
            unavailable=unavailable or not surge,
        )
        cluster.attempts = {key: tried for key, tried in cluster.attempts.items() if key[0] != name}

    @rule(name=st.sampled_from(DEPLOYMENTS))
    def delete(self, name: str) -> None:
        self.cluster.wants.pop(name, None)
        self.cluster.crowded.discard(name)

    @rule()
    def step(self) -> None:
        cluster = self.cluster
        before = {name: len(cluster.ready(name)) for name in cluster.wants}
        cluster.step()
        for name, want in cluster.wants.items():
            # What leaves of itself is not the plan's doing, and more than is wanted nobody needs.
            floor = min(before[name], want.replicas - want.unavailable)
            assert len(cluster.ready(name)) >= floor, (name, want, before)
            current = [r for r in cluster.of("starting", "ready") if r.revision == want.revision]
            staying = [r for r in current if r.deployment == name and r.worker not in cluster.leaving]
            assert len(staying) <= want.replicas
            assert len([r for r in cluster.of("starting") if r.deployment == name]) <= want.replicas

    @rule()
    def plan_is_a_function(self) -> None:
        assert self.cluster.plan() == self.cluster.plan()

    @precondition(lambda self: self.cluster.of("starting"))
    @rule(data=st.data(), fails=st.booleans())
    def constructor_ends(self, data: st.DataObject, fails: bool) -> None:
        cluster = self.cluster
        replica = data.draw(st.sampled_from(cluster.of("starting")), "replica")
        key = (replica.deployment, replica.revision)
        if fails:
            replica.move("failed")
            tried = cluster.attempts.get(key)
            failures = 1 if tried is None else tried.failures + (replica.started_at >= tried.last)
            cluster.attempts[key] = Attempts(failures=failures, last=cluster.now)
        else:
            replica.move("ready")
            cluster.attempts.pop(key, None)
        cluster.tidy()

    @precondition(lambda self: self.cluster.of("draining"))
    @rule(data=st.data())
    def drain_ends(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.cluster.of("draining")), "replica").move("stopped")
        self.cluster.tidy()

    @precondition(lambda self: len(self.cluster.workers) > 1)
    @rule(data=st.data())
    def worker_dies(self, data: st.DataObject) -> None:
        cluster = self.cluster
        worker = data.draw(st.sampled_from(cluster.workers), "worker")
        cluster.workers.remove(worker)
        cluster.leaving.discard(worker)
        for replica in cluster.replicas:
            if replica.worker == worker:
                replica.move("lost")
        cluster.tidy()

    @precondition(lambda self: len(self.cluster.workers) < 6)
    @rule()
    def worker_comes(self) -> None:
        self.cluster.made += 1
        self.cluster.workers.append(f"later{self.cluster.made}")

    @precondition(lambda self: len(self.cluster.workers) > len(self.cluster.leaving) + 1)
    @rule(data=st.data())
    def worker_leaves(self, data: st.DataObject) -> None:
        staying = sorted(set(self.cluster.workers) - self.cluster.leaving)
        self.cluster.leaving.add(data.draw(st.sampled_from(staying), "worker"))

    @rule(seconds=st.sampled_from([0.1, 1.0, 40.0]))
    def time_passes(self, seconds: float) -> None:
        self.cluster.now += seconds

    @invariant()
    def no_worker_holds_more_than_it_has(self) -> None:
        if hasattr(self, "cluster"):
            held = Counter(replica.worker for replica in self.cluster.replicas)
            assert all(number * NEED <= HAS for number in held.values())

    def teardown(self) -> None:
        if not hasattr(self, "cluster"):
            return
        cluster = self.cluster
        # From wherever it is: with nothing more happening, it ends with what is wanted, or with what fits.
        cluster.attempts.clear()
        cluster.settle()
        assert cluster.step() == 0, cluster
        wanted = sum(want.replicas for want in cluster.wants.values())
        room = int(HAS) * (len(cluster.workers) - len(cluster.leaving))
        stuck = any(want.unavailable == 0 for want in cluster.wants.values())
        for name, want in cluster.wants.items():
            ready = cluster.ready(name)
            assert len(ready) <= want.replicas
            if wanted < room:
                # There is room for one more than is wanted, so that no update is stuck.
                assert len(ready) == want.replicas, cluster
                assert {r.revision for r in ready} == {want.revision}
                assert not {r.worker for r in ready} & cluster.leaving
        if wanted >= room and not stuck:
            assert len(cluster.of("ready")) >= min(wanted, room), cluster
        assert all(r.deployment in cluster.wants for r in cluster.replicas)


TestRollouts = Rollouts.TestCase
TestRollouts.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.mark.slow
def test_rollouts_at_length():
    class Longer(Rollouts.TestCase):
        settings = settings(max_examples=1500, stateful_step_count=50, deadline=None)

    Longer("runTest").runTest()
