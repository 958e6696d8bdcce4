"""What Ray Serve is told to run; no Ray runs here."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from vllm_pd_plugin.errors import ConfigError

# In a process of its own: importing Ray Serve changes this one.
_PROGRAM = """
import json, sys
from vllm_pd_plugin import ray_serve
from ray.serve._private.build_app import build_app

application = ray_serve.app(json.loads(sys.argv[1]))
built = build_app(application, name="default", make_deployment_handle=lambda *args: None)
options = {}
for deployment in built.deployments:
    config = deployment._deployment_config
    options[deployment.name] = {
        "replicas": deployment.num_replicas,
        "actor": deployment.ray_actor_options,
        "surge": config.max_surge_percent,
        "grace": config.graceful_shutdown_timeout_s,
        "scaling": config.autoscaling_config and config.autoscaling_config.model_dump(mode="json"),
    }
heavy = [name for name in ("vllm", "torch") if name in sys.modules]
print(json.dumps({"options": options, "heavy": heavy, "ingress": built.ingress_deployment_name}))
"""


def build(**arguments: Any) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, "-c", _PROGRAM, json.dumps(arguments)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if result.returncode:
        raise AssertionError(result.stderr)
    built: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return built


@pytest.fixture(scope="module")
def built() -> dict[str, Any]:
    return build(
        **{
            "model": "M",
            "prefill.autoscaling.min_replicas": "0",
            "prefill.autoscaling.max_replicas": "3",
            "decode": {"replicas": 2, "num_cpus": 4, "num_gpus": 2, "drain_timeout_s": 10},
            "frontend": "2",
        }
    )


def test_there_are_two_pools_and_frontends_before_them(built: dict[str, Any]) -> None:
    assert built["ingress"] == "Frontend"
    assert set(built["options"]) == {"Frontend", "PrefillEngine", "DecodeEngine"}
    assert built["options"]["Frontend"]["replicas"] == 2
    assert built["options"]["DecodeEngine"]["replicas"] == 2


def test_building_brings_neither_vllm_nor_torch(built: dict[str, Any]) -> None:
    assert built["heavy"] == []


def test_an_engine_has_its_devices_and_time_to_drain(built: dict[str, Any]) -> None:
    decode = built["options"]["DecodeEngine"]
    assert decode["actor"]["num_gpus"] == 2
    assert decode["actor"]["num_cpus"] == 4
    assert decode["surge"] == 100
    assert decode["grace"] == 70


def test_a_pool_that_scales_has_our_policy(built: dict[str, Any]) -> None:
    scaling = built["options"]["PrefillEngine"]["scaling"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (0, 3)
    assert scaling["policy"]["policy_function"] == "vllm_pd_plugin.ray_serve.autoscaling:PoolPolicy"
    assert scaling["policy"]["policy_kwargs"] == {"role": "prefill"}
    assert built["options"]["DecodeEngine"]["scaling"] is None


def test_what_is_wrong_is_said_before_anything_starts() -> None:
    with pytest.raises(AssertionError, match=f"{ConfigError.__name__}.*modle: Extra inputs"):
        build(model="M", modle="M")
