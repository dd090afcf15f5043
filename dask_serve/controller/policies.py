"""Policies of users: functions, named by import paths, that say how many replicas a deployment needs."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from ..config import AutoscalingConfig, Middleware
from ..exceptions import ConfigError
from ..policy.autoscaling import ScalingContext, Wish, wish_of

__all__ = ["Policy", "load_policy"]

logger = logging.getLogger("dask_serve.controller")

#: Seconds between two questions to a policy when the load has changed, and when nothing has.
LEAST, AGAIN = 0.1, 1.0


def load_policy(policy: Middleware) -> Callable[[ScalingContext], Any]:
    """Import a policy and give it its arguments. Blocks.

    Raises
    ------
    ConfigError
        It cannot be imported here, in the scheduler's process.
    """
    path, arguments = (policy, {}) if isinstance(policy, str) else policy
    module, _, name = path.partition(":")
    try:
        function: Any = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
    except Exception as error:  # noqa: BLE001 - whatever keeps it from being imported
        raise ConfigError(
            f"the autoscaling policy {path!r} cannot be imported where the scheduler runs: "
            f"{type(error).__name__}: {error}; install its module there"
        ) from None
    if not callable(function):
        raise ConfigError(f"the autoscaling policy {path!r} is not a function, but {function!r}")
    return partial(function, **arguments)


class Policy:
    """Asks one deployment's policy again and again, in a thread: the scheduler's loop does not wait for user code.

    Parameters
    ----------
    config : AutoscalingConfig
        It names the policy.
    context : callable
        Returns what to call it with; None: not now.
    on_answer : callable
        Called when the wish has changed.

    Attributes
    ----------
    wish : Wish or None
        What it asked for last. None: it has not answered yet, or it failed.
    error : str
        Why its last call failed; empty where it did not.
    """

    def __init__(
        self,
        config: AutoscalingConfig,
        context: Callable[[], ScalingContext | None],
        on_answer: Callable[[], None],
    ) -> None:
        assert config.policy is not None
        self.policy = config.policy
        self.name = config.policy if isinstance(config.policy, str) else config.policy[0]
        self.wish: Wish | None = None
        self.error = ""
        self._context = context
        self._on_answer = on_answer
        self._news = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run())

    def ask(self) -> None:
        """The load has changed."""
        self._news.set()

    def close(self) -> None:
        """Ask no more."""
        self._task.cancel()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        function: Callable[[ScalingContext], Any] | None = None
        while True:
            self._news.clear()
            context = self._context()
            if context is not None:
                before = (self.wish, self.error)
                try:
                    if function is None:
                        function = await loop.run_in_executor(None, load_policy, self.policy)
                    answer = await loop.run_in_executor(None, function, context)
                    self.wish, self.error = wish_of(answer, self.name), ""
                except Exception as error:  # noqa: BLE001 - whatever it raises, the load decides then
                    text = f"{type(error).__name__}: {error}"
                    if text != self.error:
                        logger.warning("the autoscaling policy %s failed: %s", self.name, text)
                    self.wish, self.error = None, text
                if before != (self.wish, self.error):
                    self._on_answer()
            await asyncio.sleep(LEAST)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._news.wait(), AGAIN - LEAST)
