"""What KV is, and in what two engines' differs."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from tests.fakes.engines import make_kv
from vllm_pd_plugin.memory import probe
from vllm_pd_plugin.memory.identity import UNKNOWN, KvIdentity, Weights, difference
from vllm_pd_plugin.memory.probe import Sketch

OURS = make_kv()
COMPUTED = ("weights", "vllm", "probe")
FIELDS = [name for name in KvIdentity.__struct_fields__ if name not in COMPUTED]


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


@pytest.mark.parametrize(
    ("theirs", "ours", "may"),
    [
        ("float32", "bfloat16", True),
        ("bfloat16", "float16", True),
        ("bfloat16", "fp8_e4m3", True),
        ("float32", "fp8_e4m3", False),
        ("fp8_e4m3", "bfloat16", False),
        ("bfloat16", "fp8_e5m2", False),
        ("bfloat16", "int8", False),
    ],
)
def test_kv_of_another_type_is_another_unless_it_can_be_converted(
    theirs: str, ours: str, may: bool
) -> None:
    here, there = make_kv(kv_cache_dtype=ours), make_kv(kv_cache_dtype=theirs)
    assert (difference(here, there) is None) is may
    assert difference(here, there, is_strict=True) is not None


def test_activations_of_another_type_are_converted_as_well() -> None:
    here, there = make_kv(dtype="float32"), make_kv(dtype="bfloat16")
    assert difference(here, there) is None
    assert "dtype is bfloat16, expected float32" in str(difference(here, there, is_strict=True))


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


# --- what they compute -----------------------------------------------------------------------

COMPUTED_HERE = np.random.default_rng(1).standard_normal((4, 2, 8)).astype(np.float32)
FLOAT32 = {"dtype": "float32", "kv_cache_dtype": "float32"}


def answer(off_by: float = 0.0) -> Sketch:
    """A sketch of which one row is so far from that of another engine."""
    rows = {"layer 0 key": COMPUTED_HERE * (1 + off_by), "layer 0 value": COMPUTED_HERE}
    return probe.together([{name: probe.sketch(values) for name, values in rows.items()}])


def engine(vllm: str = "0.32", off_by: float | None = 0.0, **changes: Any) -> KvIdentity:
    found = None if off_by is None else answer(off_by)
    return make_kv(**FLOAT32 | changes, vllm=vllm, probe=found)


def unlike(one: KvIdentity, other: KvIdentity) -> str:
    """Return in what two differ, the same both ways; empty where in nothing."""
    found = [difference(one, other), difference(other, one)]
    assert len({each and each.field for each in found}) == 1
    return str(found[0] or "")


def test_engines_of_two_release_lines_go_together_by_what_they_compute() -> None:
    assert unlike(engine("0.32"), engine("0.31")) == ""
    assert unlike(engine("0.32"), engine("0.31", off_by=0.00015)) == ""
    text = unlike(engine("0.32"), engine("0.31", off_by=0.05))
    assert (
        "its answers to the probe prompt are 0.048 in layer 0 key, 0 in layer 0 value away" in text
    )
    assert "expected 0.0002 at most (float32, vLLM 0.32 and 0.31)" in text
    assert "revision" in text


@pytest.mark.parametrize("ours", [0.0, None], ids=["we have", "we have not"])
@pytest.mark.parametrize("theirs", [None, Sketch(())], ids=["nothing", "an empty one"])
def test_engines_of_two_release_lines_need_what_both_compute(
    ours: float | None, theirs: Sketch | None
) -> None:
    other = msgspec.structs.replace(engine("0.31"), probe=theirs)
    text = str(difference(engine("0.32", ours), other))
    assert "its vLLM is 0.31, expected 0.32" in text
    assert "it has not computed it" in text
    assert "run the same vLLM on both" in text
    if ours is not None:
        assert "this one has not computed it" in str(difference(other, engine("0.32", ours)))


@pytest.mark.parametrize("missing", [0, 1])
def test_within_a_release_line_one_that_has_not_computed_it_is_compared_by_names(
    missing: int,
) -> None:
    answers = [None if place == missing else 0.0 for place in range(2)]
    one, other = (engine(off_by=each) for each in answers)
    assert unlike(one, other) == ""
    assert "config" in unlike(one, msgspec.structs.replace(other, config="another"))


def test_an_fp8_cache_is_compared_by_what_else_is_computed() -> None:
    """What is kept in 8 bits is not sketched."""
    rows = {"layer 0 key": probe.sketch(COMPUTED_HERE), "logits": probe.sketch(COMPUTED_HERE)}
    other_logits = {"logits": probe.sketch(COMPUTED_HERE[::-1])}
    bfloat16 = make_kv(probe=probe.together([rows]))
    for logits, goes in ({"logits": rows["logits"]}, True), (other_logits, False):
        fp8 = make_kv(kv_cache_dtype="fp8", probe=probe.together([logits]))
        assert (difference(fp8, bfloat16) is None) is goes
    plain = make_kv(probe=probe.together([{"logits": rows["logits"]}]))
    assert "inf in layer 0 key" in str(difference(bfloat16, plain))


def test_sketches_that_have_nothing_in_common_say_nothing() -> None:
    """Whoever writes such a thing: it is not taken for an answer, and breaks nothing."""
    odd = probe.together([{"something else": probe.sketch(COMPUTED_HERE)}])
    here = engine("0.32", kv_cache_dtype="bfloat16")
    assert difference(here, msgspec.structs.replace(engine("0.32"), probe=odd)) is None
    mixed = difference(here, msgspec.structs.replace(engine("0.31"), probe=odd))
    assert "its vLLM is 0.31, expected 0.32" in str(mixed)


def test_within_a_release_line_names_and_what_is_computed_both_count() -> None:
    assert unlike(engine(), engine(off_by=0.00001)) == ""
    assert "probe prompt" in unlike(engine(), engine(off_by=0.00015))
    assert "weights" in unlike(engine(), engine(weights=Weights("sampled:2")))


@pytest.mark.parametrize("field", [*FIELDS, "weights"])
def test_between_release_lines_everything_counts_but_how_vllm_reads_a_configuration(
    field: str,
) -> None:
    value = Weights("sampled:2") if field == "weights" else "another"
    text = unlike(engine("0.32"), engine("0.31", **{field: value}))
    assert (text == "") is (field == "config")


def test_an_engine_of_an_older_release_of_the_plug_in_is_compared_as_it_always_was() -> None:
    older = make_kv(**FLOAT32)
    assert unlike(engine("0.32"), older) == ""
    assert "config" in unlike(engine("0.32"), msgspec.structs.replace(older, config="another"))
    known_then = {
        name: value
        for name, value in msgspec.to_builtins(older).items()
        if name not in ("vllm", "probe")
    }
    assert msgspec.convert(known_then, KvIdentity) == older


def test_what_an_engine_computes_is_compared_last() -> None:
    """It says least of what to do."""
    assert "rope" in unlike(engine("0.32"), engine("0.31", off_by=1.0, rope="another"))
