from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "vllm", "zmq", "nixl", "ray", "numpy", "msgspec")


def loaded_by(module: str) -> set[str]:
    """The top-level packages in a fresh interpreter that has imported one module."""
    code = f"import json, sys, {module}; print(json.dumps([m.split('.')[0] for m in sys.modules]))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    return set(json.loads(result.stdout))


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert loaded_by("vllm_pd_plugin").isdisjoint(HEAVY)


def test_the_command_line_imports_nothing_heavy() -> None:
    assert loaded_by("vllm_pd_plugin.cli").isdisjoint({"torch", "vllm", "zmq", "nixl", "ray"})


@pytest.mark.parametrize("module", ["transfer.plane", "protocol.control"])
def test_the_planes_need_neither_vllm_nor_a_network(module: str) -> None:
    loaded = loaded_by(f"vllm_pd_plugin.{module}")
    assert loaded.isdisjoint({"torch", "vllm", "zmq", "nixl", "ray"})
    assert "msgspec" in loaded
