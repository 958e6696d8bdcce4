"""The frontend as a deployment of Ray Serve: behind Serve's ingress, N of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ray import serve

from vllm_pd_plugin.frontend.deployment import parse_deployment

if TYPE_CHECKING:
    from vllm_pd_plugin.ray_serve.registry_frontend import RayFrontend


@serve.ingress()
class FrontendReplica:
    """Made by Ray Serve; serves when the constructor returns.

    pools: handles of the engines' deployments, which makes them part of the application; requests
    do not go through them.
    """

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, deployment: Mapping[str, Any], pools: Sequence[Any]
    ) -> None:
        self._frontend: RayFrontend | None = None
        from vllm_pd_plugin.ray_serve.registry_frontend import RayFrontend  # brings vLLM

        parsed = parse_deployment(deployment, "the deployment")
        self._frontend = await RayFrontend.start(parsed, serve.get_replica_context().app_name)

    def __serve_build_asgi_app__(self) -> Any:
        """Called by Ray Serve after the constructor."""
        assert self._frontend is not None
        return self._frontend.app

    async def check_health(self) -> None:
        """Called by Ray Serve. Raises RuntimeError when another replica should take its place."""
        if self._frontend is not None:
            await self._frontend.check_health()

    async def __del__(self) -> None:
        """Called by Ray Serve when the last stream has ended."""
        if self._frontend is not None:
            await self._frontend.close()
