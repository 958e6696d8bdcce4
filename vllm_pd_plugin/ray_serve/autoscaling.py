"""Autoscaling policies of Ray Serve: how many engines a pool should have.

Serve calls a policy in its controller some ten times a second, and applies the bounds and delays
of ``Autoscaling`` to what it says. The need itself is asked of the registry, beside that.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from typing import Any

from vllm_pd_plugin.frontend.routing.choice import Role
from vllm_pd_plugin.ray_serve.demand import replicas
from vllm_pd_plugin.ray_serve.registry import RegistryClient

logger = logging.getLogger("ray.serve")

_ASK_S = 1.0
_STALE_S = 15.0
"""A need that is older says nothing: the pool stays as it is."""


class PoolPolicy:
    """role: of the pool. registry, clock: for tests."""

    def __init__(
        self,
        role: str,
        registry: RegistryClient | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._role = Role(role)
        self._registry = registry
        self._clock = clock
        self._need: float | None = None
        self._known_at = self._asked_at = -math.inf
        self._task: asyncio.Task[None] | None = None

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Return how many replicas there should be. context: Serve's ``AutoscalingContext``."""
        now = self._clock()
        if now - self._asked_at >= _ASK_S and (self._task is None or self._task.done()):
            self._asked_at = now
            registry = self._registry = self._registry or RegistryClient(context.app_name)
            self._task = asyncio.get_running_loop().create_task(self._ask(registry))
        current: int = context.target_num_replicas
        if self._need is None or now - self._known_at > _STALE_S:
            return current, {}
        wanted = replicas(self._need, current)
        if not context.running_replicas:
            # Serve does not delay then; and what the first one will do is not in the need yet.
            wanted = min(wanted, max(1, current))
        return wanted, {}

    async def _ask(self, registry: RegistryClient) -> None:
        try:
            needs = await registry.needs()
        except Exception as error:  # noqa: BLE001
            # Serve's controller must live; without an answer the pool stays as it is.
            logger.warning("the registry does not say what is needed: %r", error)
            return
        self._need, self._known_at = needs[self._role], self._clock()
