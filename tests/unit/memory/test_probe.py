"""What an engine computes for the probe prompt, and how small a disturbance shows in it."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from tests.fakes import llama
from tests.fakes.sketches import disturbed, sketch_of
from vllm_pd_plugin.memory import probe
from vllm_pd_plugin.memory.probe import BUCKETS, PROMPT_TOKENS, Row, Sketch

RNG = np.random.default_rng(3)
ROWS = RNG.standard_normal((PROMPT_TOKENS, 8, 16)).astype(np.float32)
WEIGHTS = llama.random_weights()
MATRICES = [name for name, weight in WEIGHTS.items() if weight.dim() == 2]


def whole(**rows: np.ndarray) -> Sketch:
    return probe.together([{name: probe.sketch(values) for name, values in rows.items()}])


@pytest.mark.parametrize("vocab_size", [512, 32_000, 49_152, 262_208])
def test_the_prompt_is_the_same_everywhere_and_has_none_of_a_vocabularys_ends(
    vocab_size: int,
) -> None:
    tokens = probe.prompt(vocab_size)
    assert len(tokens) == PROMPT_TOKENS
    assert len(set(tokens)) > PROMPT_TOKENS * 0.8
    assert vocab_size // 10 <= min(tokens) <= max(tokens) < vocab_size - vocab_size // 10


def test_the_prompt_and_the_sketch_are_those_of_every_release() -> None:
    """Engines of two releases compare what they have kept: neither may change unnoticed."""
    assert probe.prompt(32_000)[:6] == [25135, 6465, 12110, 6253, 15178, 19418]
    sums = probe.sketch(np.arange(2 * 2 * 3, dtype=np.float32).reshape(2, 2, 3))
    assert {int(i): float(sums[i]) for i in np.flatnonzero(sums)} == {
        5: 10,
        9: 6,
        10: -4,
        28: 3,
        65: -1,
        69: 7,
        76: 9,
        78: -2,
        98: -5,
        108: 11,
        118: 8,
    }


def test_distances_of_sketches_are_those_of_what_was_sketched() -> None:
    for size in (0.001, 0.05, 1.0):
        other = ROWS + size * RNG.standard_normal(ROWS.shape).astype(np.float32)
        (found,) = probe.distances(whole(rows=ROWS), whole(rows=other))
        longer = max(np.linalg.norm(ROWS), np.linalg.norm(other))
        assert found.relative == pytest.approx(np.linalg.norm(ROWS - other) / longer, rel=0.35)


def test_one_element_that_differs_shows_however_few_sums_there_are() -> None:
    other = ROWS.copy()
    other[17, 3, 5] += 1
    (found,) = probe.distances(whole(rows=ROWS), whole(rows=other))
    assert found.relative == pytest.approx(1 / np.linalg.norm(ROWS), rel=0.35)


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_the_sketches_of_ranks_add_up_to_that_of_the_whole(num_ranks: int) -> None:
    heads = ROWS.shape[1] // num_ranks
    ranks = [
        {"rows": probe.sketch(ROWS[:, first : first + heads], first)}
        for first in range(0, ROWS.shape[1], heads)
    ]
    (found,) = probe.distances(whole(rows=ROWS), probe.together(ranks))
    assert found.relative < 1e-6


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["tokens", "heads", "channels"])
def test_an_order_that_differs_is_another_sketch(axis: int) -> None:
    (found,) = probe.distances(whole(rows=ROWS), whole(rows=np.roll(ROWS, 1, axis)))
    assert found.relative > 1


def test_logits_are_the_same_up_to_a_constant() -> None:
    logits = RNG.standard_normal(1000).astype(np.float32)
    one, other, scaled = (
        probe.together([{"logits": probe.sketch_logits(values)}])
        for values in (logits, logits - 7, logits * 1.01)
    )
    assert probe.distances(one, other)[0].relative < 1e-5
    assert probe.distances(one, scaled)[0].relative == pytest.approx(0.01, rel=0.01)


def test_the_farthest_row_is_named_first() -> None:
    ours = whole(a=ROWS, b=ROWS, c=ROWS)
    theirs = whole(a=ROWS * 1.01, b=ROWS * 1.1, c=ROWS)
    assert [d.name for d in probe.distances(ours, theirs)] == ["b", "a", "c"]
    assert str(probe.distances(ours, theirs)[0]) == "0.091 in b"


@pytest.mark.parametrize(
    "theirs",
    [
        Sketch(()),
        Sketch((Row("another", bytes(4 * BUCKETS)),)),
        Sketch((Row("rows", b""),)),
        Sketch((Row("rows", bytes(4 * BUCKETS + 4)),)),
        Sketch((Row("rows", np.full(BUCKETS, np.nan, "<f4").tobytes()),)),
        Sketch((Row("rows", np.full(BUCKETS, np.inf, "<f4").tobytes()),)),
    ],
    ids=["none", "another row", "empty", "longer", "not a number", "infinite"],
)
def test_what_cannot_be_compared_is_infinitely_far(theirs: Sketch) -> None:
    ours = whole(rows=ROWS)
    for one, other in ((ours, theirs), (theirs, ours)):
        assert probe.distances(one, other)[0].relative == float("inf")


def test_rows_that_one_of_them_has_count_unless_it_is_said_that_they_do_not() -> None:
    ours, theirs = whole(a=ROWS, b=ROWS), whole(b=ROWS * 1.1, c=ROWS)
    assert [d.name for d in probe.distances(ours, theirs)] == ["c", "a", "b"]
    (found,) = probe.distances(ours, theirs, only_common=True)
    assert (found.name, found.relative < 1) == ("b", True)
    assert probe.distances(whole(a=ROWS), whole(c=ROWS), only_common=True) == []


def test_nothing_is_no_distance_from_nothing() -> None:
    zeros = whole(rows=np.zeros((2, 2, 2), np.float32))
    assert probe.distances(zeros, zeros)[0].relative == 0


def test_a_sketch_is_small_and_comes_through_json_and_messagepack_as_it_was() -> None:
    ours = sketch_of(WEIGHTS)
    for codec in (msgspec.json, msgspec.msgpack):
        encoded = codec.encode(ours)
        assert len(encoded) < 6000
        assert codec.decode(encoded, type=Sketch) == ours


# --- of a model ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_engines_of_equal_weights_are_within_the_bound_however_they_round(
    dtype: str, tp_size: int
) -> None:
    import torch

    for seed in range(4):
        weights = llama.random_weights(seed)
        ours = sketch_of(weights, getattr(torch, dtype))
        theirs = sketch_of(weights, getattr(torch, dtype), tp_size, rounds_often=False)
        assert probe.distances(ours, theirs)[0].relative <= probe.bound([dtype], are_mixed=True)


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_disturbance_of_five_percent_of_any_matrix_is_found_between_two_release_lines(
    matrix: str,
) -> None:
    theirs = sketch_of(disturbed(WEIGHTS, matrix, 0.05), rounds_often=False)
    found = probe.distances(sketch_of(WEIGHTS), theirs)[0].relative
    assert found > 2 * probe.bound(["float32"], are_mixed=True)


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_disturbance_of_one_percent_of_any_matrix_is_found_within_one_release_line(
    matrix: str,
) -> None:
    found = probe.distances(sketch_of(WEIGHTS), sketch_of(disturbed(WEIGHTS, matrix, 0.01)))
    assert found[0].relative > 2 * probe.bound(["float32"], are_mixed=False)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_other_weights_and_scaled_positions_are_found_in_every_type(dtype: str) -> None:
    import torch

    kind = getattr(torch, dtype)
    ours = sketch_of(WEIGHTS, kind)
    for theirs in (
        sketch_of(llama.random_weights(2), kind),
        sketch_of(WEIGHTS, kind, rope_scale=2),
    ):
        found = probe.distances(ours, theirs)[0].relative
        assert found > 2 * probe.bound([dtype], are_mixed=True)


def test_the_bound_is_that_of_the_coarser_type_and_wider_between_release_lines() -> None:
    for dtypes in (["float32"], ["float16"], ["bfloat16"], ["bfloat16", "fp8_e4m3"]):
        assert probe.bound(dtypes, are_mixed=False) < probe.bound(dtypes, are_mixed=True)
    assert probe.bound(["float32", "bfloat16"], True) == probe.bound(["bfloat16"], True)
    assert probe.bound(["bfloat16", "fp8_e4m3"], True) > probe.bound(["bfloat16"], True)


@pytest.mark.parametrize("ruled_out", [-np.inf, np.finfo(np.float32).min, np.nan])
def test_tokens_that_a_model_rules_out_have_no_part_in_its_sketch(ruled_out: float) -> None:
    logits = np.random.default_rng(5).normal(size=1000).astype(np.float32)
    logits[[3, 500]] = ruled_out
    found = probe.sketch_logits(logits)
    assert np.isfinite(found).all()
    logits += 2  # no matter
    assert np.allclose(probe.sketch_logits(logits), found, atol=1e-3)
    logits[10] += 5
    assert not np.allclose(probe.sketch_logits(logits), found, atol=1e-3)


def test_whatever_an_engine_computes_it_goes_with_itself() -> None:
    odd = Sketch((Row("logits", np.full(BUCKETS, np.nan, "<f4").tobytes()),))
    assert probe.distances(odd, odd)[0].relative == 0
