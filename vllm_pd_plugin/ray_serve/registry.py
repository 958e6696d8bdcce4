"""The one place where engines and frontends of an application find each other: an actor of Ray.

It has a name, and whoever does not find it makes it. Ray starts it again when it dies, elsewhere if
need be; what it knew comes back with the next beats (see ``roster``). It ends by itself when the
application has gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError

from vllm_pd_plugin import __version__
from vllm_pd_plugin.frontend.routing.choice import Role
from vllm_pd_plugin.ray_serve.demand import Demand, Targets
from vllm_pd_plugin.ray_serve.roster import Beat, Roster, View

NAMESPACE = "vllm-pd"
CALL_TIMEOUT_S = 5.0
_LOOK_AFTER_ITSELF_S = 5.0

T = TypeVar("T")


class Registry:
    """The actor: a roster that other processes can call."""

    def __init__(self, targets: Targets) -> None:
        self._roster = Roster(targets)
        self._watch: asyncio.Task[None] | None = None

    async def beat(self, beat: Beat) -> None:
        self._begin()
        self._roster.beat(beat)

    async def leave(self, url: str, replica: str) -> None:
        self._begin()
        self._roster.leave(url, replica)

    async def look(self, frontend: str, demand: Demand, targets: Targets) -> View:
        self._begin()
        self._roster.targets = targets
        return self._roster.look(frontend, demand)

    async def needs(self) -> dict[Role, float]:
        self._begin()
        return self._roster.needs()

    def _begin(self) -> None:
        if self._watch is None:
            self._watch = asyncio.create_task(self._end_when_deserted())

    async def _end_when_deserted(self) -> None:
        while not self._roster.is_deserted:
            await asyncio.sleep(_LOOK_AFTER_ITSELF_S)
        ray.kill(ray.get_runtime_context().current_actor)


class RegistryClient:
    """Calls an application's registry from an event loop, and finds it again when it has moved."""

    def __init__(self, app_name: str, targets: Targets | None = None) -> None:
        # Releases have registries of their own: they share no messages, and no engines.
        self._name = f"registry {__version__}: {app_name}"
        self._targets = targets or Targets()
        self._actor: Any = None

    async def beat(self, beat: Beat) -> None:
        await self._call(lambda actor: actor.beat.remote(beat))

    async def leave(self, url: str, replica: str) -> None:
        await self._call(lambda actor: actor.leave.remote(url, replica))

    async def look(self, frontend: str, demand: Demand) -> View:
        return await self._call(lambda actor: actor.look.remote(frontend, demand, self._targets))

    async def needs(self) -> dict[Role, float]:
        return await self._call(lambda actor: actor.needs.remote())

    async def _call(self, call: Callable[[Any], Coroutine[Any, Any, T]]) -> T:
        """Raises RayError or TimeoutError when there is no answer; the next call may have one."""
        if self._actor is None:
            # Asks the head, which may be away: never on the event loop's own thread.
            self._actor = await asyncio.wait_for(
                asyncio.to_thread(_find, self._name, self._targets), CALL_TIMEOUT_S
            )
        try:
            return await asyncio.wait_for(call(self._actor), CALL_TIMEOUT_S)
        except RayActorError:
            self._actor = None
            raise


def _find(name: str, targets: Targets) -> Any:
    actor: Any = ray.remote(Registry)
    return actor.options(
        name=name,
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        max_restarts=-1,
        num_cpus=0,
        max_concurrency=1000,
    ).remote(targets)
