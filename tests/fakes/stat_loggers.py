"""What vLLM's loggers of statistics need to know."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.config import ObservabilityConfig


def make_config() -> Any:
    """As much of vLLM's configuration as they read, of a model that is called M."""
    model = SimpleNamespace(served_model_name="M", max_model_len=4096, is_diffusion=False)
    return SimpleNamespace(
        model_config=model,
        device_config=SimpleNamespace(device_type="cpu"),
        observability_config=ObservabilityConfig(),
        speculative_config=None,
        kv_transfer_config=None,
        ec_transfer_config=None,
        lora_config=None,
        watermark_config=None,
    )
