"""What cannot be served is refused before anything is loaded."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_pd_plugin.errors import UnsupportedError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm_pd_plugin.edge.geometry import refuse_unsupported


def config(device: str = "cpu", **changes: Any) -> Any:
    parallel = SimpleNamespace(
        pipeline_parallel_size=changes.get("stages", 1),
        use_ubatching=changes.get("ubatching", False),
        distributed_executor_backend=changes.get("executor", "mp"),
    )
    model = SimpleNamespace(
        is_encoder_decoder=False,
        is_attention_free=False,
        enable_sleep_mode=changes.get("sleep", False),
        enable_cumem_allocator=changes.get("remaps", False),
        model="model",
    )
    return SimpleNamespace(
        parallel_config=parallel,
        model_config=model,
        device_config=SimpleNamespace(device_type=device),
        cache_config=SimpleNamespace(cache_dtype=changes.get("cache_dtype", "auto")),
        speculative_config=None,
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_supported_passes(device: str) -> None:
    refuse_unsupported(config(device))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ubatching": True}, "--enable-dbo"),
        ({"sleep": True}, "--enable-sleep-mode"),
        ({"remaps": True}, "--enable-cumem-allocator"),
        ({"device": "xpu"}, "'xpu'"),
        ({"device": "tpu"}, "'tpu'"),
    ],
)
def test_what_would_give_wrong_text_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError) as refusal:
        refuse_unsupported(config(**changes))
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_stages_of_which_only_the_last_is_heard_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fetch would end when all ranks have told of it, which they never do."""
    refuse_unsupported(config(stages=2, executor="ray"))
    monkeypatch.setenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", "0")
    refuse_unsupported(config(executor="ray"))
    refuse_unsupported(config(stages=2))
    with pytest.raises(UnsupportedError, match="tells of the last stage only"):
        refuse_unsupported(config(stages=2, executor="ray"))
