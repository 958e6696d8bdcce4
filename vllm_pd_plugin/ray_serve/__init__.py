"""A frontend and its pools of engines as an application of Ray Serve.

    serve run vllm_pd_plugin.ray_serve:app model=MODEL prefill=1 decode=2
    serve deploy examples/ray_serve.yaml

Only this package imports Ray. Importing it brings neither vLLM nor PyTorch: where applications are
built, in Serve's controller, there may be neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from vllm_pd_plugin.frontend.deployment import Autoscaling, Deployment, EnginePool, parse_deployment
from vllm_pd_plugin.frontend.option_words import nested
from vllm_pd_plugin.frontend.routing.choice import Role

__all__ = ["Deployment", "app", "build_app"]

DEPLOYMENT_NAMES = {
    Role.PREFILL: "PrefillEngine",
    Role.DECODE: "DecodeEngine",
    Role.BOTH: "BothEngine",
}
FRONTEND_NAME = "Frontend"
_STOP_MARGIN_S = 60.0
_WORKER_ENVIRON = {
    # Engines end with their replica, in good order, by a signal from the kernel.
    "RAY_kill_child_processes_on_worker_exit": "0",
    # Ray lets workers stand back behind everything else; engines and frontends are what it is for.
    "RAY_worker_niceness": "0",
}


def app(arguments: Mapping[str, Any]) -> serve.Application:
    """Build the application from what ``serve run`` or a Serve config file says: a ``Deployment``,
    whose keys may be dotted (``decode.replicas=2``).

    Raises:
        ConfigError: something in it is wrong; the message names the key.
    """
    return build_app(parse_deployment(nested(arguments), "the application's args"))


def build_app(deployment: Deployment) -> serve.Application:
    """Return the application, for ``serve.run``."""
    from vllm_pd_plugin.ray_serve.engine import EngineReplica
    from vllm_pd_plugin.ray_serve.ingress import FrontendReplica

    config = deployment.model_dump(mode="json")
    pools = [
        serve.deployment(EngineReplica)
        .options(name=DEPLOYMENT_NAMES[role], **_pool_options(deployment, role))
        .bind(config, role.value)
        for role, pool in deployment.pools.items()
        if pool.is_wanted
    ]
    frontend = deployment.frontend
    return (
        serve.deployment(FrontendReplica)
        .options(
            name=FRONTEND_NAME,
            num_replicas=frontend.replicas,
            max_ongoing_requests=frontend.max_ongoing_requests,
            graceful_shutdown_timeout_s=frontend.shutdown_timeout_s,
            max_surge_percent=100,
            ray_actor_options={
                "num_cpus": frontend.num_cpus,
                "resources": frontend.resources,
                "runtime_env": _runtime_env(frontend.env),
            },
        )
        .bind(config, pools)
    )


def _pool_options(deployment: Deployment, role: Role) -> dict[str, Any]:
    pool = deployment.pools[role]
    options: dict[str, Any] = {
        "graceful_shutdown_timeout_s": pool.drain_timeout_s + _STOP_MARGIN_S,
        "max_surge_percent": pool.surge_percent,
        "health_check_period_s": 5.0,
        "health_check_timeout_s": 30.0,
        "ray_actor_options": {
            "num_cpus": pool.num_cpus,
            "num_gpus": _num_gpus(deployment, role),
            "resources": pool.resources,
            "runtime_env": _runtime_env({}),
        },
    }
    if pool.max_replicas_per_node is not None:
        options["max_replicas_per_node"] = pool.max_replicas_per_node
    if pool.autoscaling is None:
        return {**options, "num_replicas": pool.replicas}
    return {**options, "autoscaling_config": _autoscaling(pool.autoscaling, role)}


def _autoscaling(autoscaling: Autoscaling, role: Role) -> AutoscalingConfig:
    return AutoscalingConfig(
        min_replicas=autoscaling.min_replicas,
        max_replicas=autoscaling.max_replicas,
        initial_replicas=autoscaling.initial_replicas,
        upscale_delay_s=autoscaling.upscale_delay_s,
        downscale_delay_s=autoscaling.downscale_delay_s,
        policy=AutoscalingPolicy(
            policy_function="vllm_pd_plugin.ray_serve.autoscaling:PoolPolicy",
            policy_kwargs={"role": role.value},
        ),
    )


def _num_gpus(deployment: Deployment, role: Role) -> float:
    pool: EnginePool = deployment.pools[role]
    if pool.num_gpus is not None:
        return pool.num_gpus
    try:
        if "cpu" in metadata.version("vllm"):
            return 0
    except metadata.PackageNotFoundError:
        pass  # not where applications are built; engines run elsewhere
    return float(deployment.engine_options(role).get("tensor-parallel-size") or 1)


def _runtime_env(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the application's own runtime environment, with more variables: Serve would leave it
    out for a deployment that has one."""
    given: dict[str, Any] = {}
    if ray.is_initialized():
        given = dict(ray.get_runtime_context().runtime_env)
    given["env_vars"] = {**_WORKER_ENVIRON, **given.get("env_vars", {}), **environ}
    return given
