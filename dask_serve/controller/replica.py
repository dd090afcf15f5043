"""A replica as the controller observes it."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from ..config import AutoscalingConfig
from ..policy.desired import DeploymentSpec, deployment_id
from ..policy.devices import Device
from ..policy.lifecycle import ENDS, Event, State, advance

if TYPE_CHECKING:
    from ..config import DeploymentOptions

__all__ = ["Replica", "settings_of"]


def settings_of(options: DeploymentOptions) -> bytes:
    """Return a token of the options that a running replica must learn of when they change."""
    # These are the controller's business; what counts of an environment is in the revision.
    ours = msgspec.structs.replace(options, max_surge=1, max_unavailable=0, runtime_env=None)
    if ours.autoscaling_config is not None:
        # They report their load; how many of them there are is not their business.
        ours = msgspec.structs.replace(ours, autoscaling_config=AutoscalingConfig())
    else:
        ours = msgspec.structs.replace(ours, num_replicas=1)
    return msgspec.msgpack.encode(ours)


class Replica:
    """One replica, from the decision to start it to its end."""

    def __init__(self, app: str, spec: DeploymentSpec, worker: str, now: float) -> None:
        suffix = secrets.token_hex(3)
        self.id = f"{app}/{spec.name}/{suffix}"
        #: A fresh key for each: Dask remembers a key that erred.
        self.key = f"serve-{app}-{spec.name}-{suffix}"
        self.app = app
        self.deployment = deployment_id(app, spec.name)
        self.spec = spec
        self.worker = worker
        self.started_at = now
        self.settings = settings_of(spec.options)
        #: It is taking over the options of `settings`.
        self.settling = False
        self.state: State = "starting"
        #: Since when it is in that state, in seconds since 1970.
        self.since = time.time()
        #: Its devices, on the host of its worker.
        self.host = ""
        self.devices: Sequence[Device] = ()
        #: What it takes of its worker's Dask resources; `held`: Dask knows, and must be told when it ends.
        self.booked: Mapping[str, float] = {}
        self.held = False
        #: The Dask future of the actor: it lives as long as this is held.
        self.future: Any = None
        #: True once Dask has made the actor; what it waits for from then on is user code.
        self.submitted = False
        #: What is done on its worker before that.
        self.preparing = ""
        self.door = ""
        self.process = ""
        self.ended = asyncio.Event()
        #: Told of each change.
        self.changed: Callable[[Replica], None] = lambda replica: None
        self._message = ""

    def move(self, event: Event) -> State:
        """Take a move of `dask_serve.policy.lifecycle` and return the new state."""
        before, self.state = self.state, advance(self.state, event)
        if self.state in ENDS:
            self.ended.set()
        if self.state != before:
            self.since = time.time()
            self.changed(self)
        return self.state

    @property
    def message(self) -> str:
        """What it waits for, if anything."""
        return self._message

    @message.setter
    def message(self, text: str) -> None:
        if text != self._message:
            self._message = text
            self.changed(self)
