"""Staging memory on a GPU is a part of what vLLM may use: the KV cache is smaller by it.

vLLM's own executor and worker, without a GPU: what the profile run measures is given.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_pd_plugin import CONNECTOR

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.config import KVTransferConfig
    from vllm.v1.executor.uniproc_executor import UniProcExecutor
    from vllm.v1.worker import gpu_worker

    from vllm_pd_plugin.edge import hooks

GIB = 2**30
STAGING_BYTES = 64 * 2**20
"""The default."""


@contextlib.contextmanager
def measured(*args: Any, **kwargs: Any) -> Iterator[Any]:
    """In place of ``memory_profiling``: the model and its activations take 3 GiB."""
    yield SimpleNamespace(
        non_kv_cache_memory=3 * GIB,
        after_profile=SimpleNamespace(free_memory=5 * GIB),
        total_consumed=3 * GIB,
        transient_peak_headroom=0,
    )


def test_installing_the_hooks_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    monkeypatch.setattr(hooks, "leave_room_for_staging", lambda: calls.append(None))
    hooks.install()
    assert calls == [None]


@pytest.fixture(autouse=True)
def _wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    hooks.leave_room_for_staging()
    monkeypatch.setattr(gpu_worker, "memory_profiling", measured)


def available(
    device: str = "cuda",
    connector: str | None = CONNECTOR,
    explicit: int | None = None,
    **options: Any,
) -> int:
    """Return what vLLM makes a KV cache of, on a device of which it may use 8 GiB."""
    transfer = connector and KVTransferConfig(
        kv_connector=connector, kv_role="kv_both", kv_connector_extra_config=options
    )
    config: Any = SimpleNamespace(
        kv_transfer_config=transfer,
        device_config=SimpleNamespace(device_type=device),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )
    worker: Any = gpu_worker.Worker.__new__(gpu_worker.Worker)
    vars(worker).update(
        vllm_config=config,
        cache_config=SimpleNamespace(kv_cache_memory_bytes=explicit, gpu_memory_utilization=0.9),
        model_config=SimpleNamespace(multimodal_config=None),
        parallel_config=SimpleNamespace(),
        init_snapshot=SimpleNamespace(free_memory=8 * GIB, total_memory=9 * GIB),
        requested_memory=8 * GIB,
        randomize_dummy_inputs=False,
        model_runner=SimpleNamespace(
            model_memory_usage=2 * GIB,
            profile_run=lambda **_: None,
            profile_cudagraph_memory=lambda: 0,
        ),
    )
    config.compilation_config.cudagraph_mode = gpu_worker.CUDAGraphMode.NONE
    executor: Any = UniProcExecutor.__new__(UniProcExecutor)
    executor.vllm_config, executor.driver_worker = config, worker
    (memory,) = executor.determine_available_memory()
    assert isinstance(memory, int)
    return memory


def test_a_gpu_s_kv_cache_leaves_room_for_it() -> None:
    assert available(connector=None) == 5 * GIB
    assert available() == 5 * GIB - STAGING_BYTES


def test_it_is_as_much_as_the_option_says() -> None:
    assert available(staging_bytes=GIB) == 4 * GIB
    assert available(staging_bytes=0) == 5 * GIB


def test_it_is_a_part_of_a_size_that_was_given_too() -> None:
    """As what vLLM itself reserves is; and a plan of an earlier start knows nothing of it."""
    assert available(explicit=2 * GIB) == 2 * GIB - STAGING_BYTES


def test_it_counts_beside_another_connector() -> None:
    parts = [{"kv_connector": CONNECTOR}, {"kv_connector": "ExampleConnector"}]
    assert available(connector="MultiConnector", connectors=parts) == 5 * GIB - STAGING_BYTES


@pytest.mark.parametrize(
    ("device", "connector"), [("cpu", CONNECTOR), ("cuda", "NixlConnector"), ("cuda", None)]
)
def test_cpus_and_other_connectors_keep_all_of_it(device: str, connector: str | None) -> None:
    assert available(device, connector) == 5 * GIB


def test_the_executor_is_wrapped_once() -> None:
    hooks.leave_room_for_staging()
    assert available() == 5 * GIB - STAGING_BYTES


def test_a_process_without_engine_core_does_not_import_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vllm.v1.executor.abstract")
    hooks.leave_room_for_staging()
    assert "vllm.v1.executor.abstract" not in sys.modules
