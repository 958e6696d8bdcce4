"""What KV is, and in what two engines' differs."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes.engines import make_kv
from vllm_pd_plugin.memory.identity import UNKNOWN, KvIdentity, Weights, difference

OURS = make_kv()
FIELDS = [name for name in KvIdentity.__struct_fields__ if name != "weights"]


def test_the_same_kv_does_not_differ() -> None:
    assert difference(OURS, make_kv()) is None


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_counts_and_is_named_with_both_values_and_a_remedy(field: str) -> None:
    found = difference(OURS, make_kv(**{field: "another"}))
    assert found is not None
    text = str(found)
    assert field.replace("_", " ") in text
    assert "another" in text
    assert getattr(OURS, field) in text
    assert found.remedy in text


def test_two_kinds_of_fp8_are_two_kinds_of_kv() -> None:
    ours, theirs = (make_kv(kv_cache_dtype=name) for name in ("fp8_e4m3", "fp8_e5m2"))
    assert "kv cache dtype is fp8_e5m2, expected fp8_e4m3" in str(difference(ours, theirs))


def weights(sampled: str = "sampled:1", **more: Any) -> Weights:
    return Weights(sampled, **more)


@pytest.mark.parametrize(
    ("ours", "theirs", "alike"),
    [
        (weights(), weights(), True),
        (weights(), weights("sampled:2"), False),
        # All bytes say more than some, once both have read them.
        (weights(full="full:1"), weights(full="full:2"), False),
        (weights(full="full:1"), weights(), True),
        (weights("named:a", full="full:1"), weights(full="full:1"), True),
        # The Hub's own hashes: equal ones are certain; other ones may be the same in other files.
        (weights(files="files:1"), weights("sampled:1", files="files:2"), True),
        (weights("sampled:x", files="files:1"), weights("sampled:y", files="files:1"), True),
        # Of another boot, or changed in place.
        (weights(UNKNOWN + "a"), weights(UNKNOWN + "b"), False),
        (weights("named:a, changed 1 times"), weights("named:a, changed 1 times"), True),
        (weights("named:a, changed 1 times"), weights("named:a"), False),
    ],
)
def test_weights_are_compared_at_the_depth_that_both_know(
    ours: Weights, theirs: Weights, alike: bool
) -> None:
    for one, other in ((ours, theirs), (theirs, ours)):
        found = difference(make_kv(weights=one), make_kv(weights=other))
        assert (found is None) is alike
        if found is not None:
            assert "weights are" in str(found)
            assert found.ours != found.theirs
