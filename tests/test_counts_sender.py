"""Counts of proxies elsewhere on their way to controllers that come and go, over a connection that fails at will."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from dask_serve.controller.counts_sender import CountsSender
from dask_serve.controller.measures import Measures
from dask_serve.measures.counts import HttpCounts


class Controllers:
    """One controller after the other, as `Controller.serve_counts` answers."""

    def __init__(self) -> None:
        self.all = [Measures()]
        self.away = False
        #: Answers are lost; the last one was.
        self.deaf = self.unanswered = False

    async def serve_counts(self, source, counts, epoch, ended):
        await asyncio.sleep(0)
        if self.away:
            raise OSError("away")
        now = str(len(self.all))
        if epoch == now:
            self.all[-1].proxy_told(source, counts)
            if ended:
                self.all[-1].proxy_ended(source)
            self.unanswered = self.deaf
            if self.deaf:
                raise OSError("the answer is lost")
        return {"epoch": now}

    @property
    def counted(self) -> int:
        return sum(counts.took.total for one in self.all for counts in one.http().values())


steps = st.sampled_from(["request", "request", "tell", "tell", "ends", "away", "deaf", "back", "successor", "pause"])


@given(st.lists(st.tuples(steps, st.sampled_from("ab")), max_size=40))
def test_nothing_is_lost_or_told_twice(script):
    async def run() -> None:
        controllers = Controllers()
        sender = CountsSender(controllers)
        lives: dict[str, int] = {}
        counts: dict[str, HttpCounts] = {}
        requests = 0
        for step, proxy in script:
            source = f"{proxy}{lives.setdefault(proxy, 0)}"
            if step == "request":
                counts.setdefault(source, HttpCounts()).add(200, 0.01)
                requests += 1
            elif step in ("tell", "ends") and source in counts:
                sender.put(source, {"app/d": counts[source].export()})
                if step == "ends":
                    sender.end(source)
                    lives[proxy] += 1
            elif step in ("away", "deaf", "back"):
                controllers.away, controllers.deaf = step == "away", step == "deaf"
            elif step == "successor":
                if controllers.unanswered:
                    # A report that a controller took before it died, and could not say so, is taken by the next again.
                    controllers.away = controllers.deaf = False
                    await sender.flush()
                    await sender.flush()
                controllers.all.append(Measures())
            elif step == "pause":
                await asyncio.sleep(0)
        controllers.away = controllers.deaf = False
        for source, of in counts.items():
            if int(source[1:]) == lives[source[0]]:
                sender.put(source, {"app/d": of.export()})
        # The first may only wait for one that is under way, and fails.
        await sender.flush()
        await sender.flush()
        assert controllers.counted == requests

    asyncio.run(run())
