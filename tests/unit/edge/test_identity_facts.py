"""What of a model's configuration decides what its KV is, beside what its files say."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm_pd_plugin.edge.identity import _rope

LONG = {"rope_type": "longrope", "original_max_position_embeddings": 4096}
PLAIN = {"rope_type": "default"}


@pytest.mark.parametrize(
    ("text", "limits", "is_same"),
    [
        (SimpleNamespace(rope_parameters=LONG), (4096, 8192), False),
        (SimpleNamespace(rope_parameters=LONG), (8192, 16_384), True),
        (SimpleNamespace(rope_parameters=PLAIN), (4096, 8192), True),
        (SimpleNamespace(attn_temperature_tuning=True), (8192, 65_536), False),
        (SimpleNamespace(), (8192, 65_536), True),
    ],
    ids=["long or short factors", "long factors both", "plain", "tuned or not", "nothing"],
)
def test_the_longest_prompt_counts_where_the_model_goes_by_it(
    text: Any, limits: tuple[int, int], is_same: bool
) -> None:
    one, other = (_rope(text, limit) for limit in limits)
    assert (one == other) is is_same
