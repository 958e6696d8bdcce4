"""The benchmark of the codecs' quality: its counting, and a tiny model in SmolLM2's place."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.quality import command as quality
from benchmarks.quality import prompts as quality_prompts
from benchmarks.quality.handover import Kv, bytes_ratio, handed_over, parts, through
from vllm_pd_plugin.codecs import ops
from vllm_pd_plugin.codecs.codec import SINK_TOKENS, Codec, encoding_of


class Words:
    """A tokenizer of words; a chat is a question between two of them."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [self._ids.setdefault(word, len(self._ids)) for word in text.split()]

    def apply_chat_template(self, messages: list[dict[str, str]], **_: bool) -> str:
        return f"user {messages[0]['content']} assistant"


def kv_of(sequences: int, tokens: int, layers: int = 2) -> Kv:
    random = torch.Generator().manual_seed(tokens)
    shape = (sequences, 3, tokens, 64)
    return [
        (torch.randn(shape, generator=random), torch.randn(shape, generator=random))
        for _ in range(layers)
    ]


# --- text and prompts --------------------------------------------------------------------------


def test_windows_overlap_and_are_whole() -> None:
    assert quality_prompts.windows(range(11), 4, 2) == [
        [0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8, 9],
    ]  # fmt: skip
    assert quality_prompts.windows(range(3), 4, 2) == []


def test_headers_are_not_part_of_the_text() -> None:
    text = "# One, A, 1800\n\nIt was\nlate.\n\nVery.\n\n# Two, B, 1801\n\nMorning\ncame.\n"
    assert quality_prompts.body(text) == "It was late.\n\nVery.\n\nMorning came."
    assert quality_prompts.titles(text) == ["One, A, 1800", "Two, B, 1801"]


def test_the_text_that_ships_is_long_enough_and_old_enough() -> None:
    text = quality_prompts.TEXT.read_text()
    assert len(quality_prompts.body(text).split()) > 3000
    years = [int(title.rpartition(", ")[2]) for title in quality_prompts.titles(text)]
    assert len(years) >= 6
    assert max(years) < 1900


@pytest.mark.parametrize("length", quality_prompts.LENGTHS[3:])
def test_prompts_are_as_long_as_asked_and_all_different(length: int) -> None:
    words, text = Words(), list(range(10_000, 15_000))
    made = quality_prompts.prompts(words, text, length, 25)
    assert {len(prompt) for prompt in made} == {length}
    assert len({tuple(prompt) for prompt in made}) == 25
    user, assistant = words.encode("user assistant", add_special_tokens=False)
    instructions = [prompt for prompt in made if prompt[0] == user and prompt[-1] == assistant]
    assert len(instructions) == quality_prompts.instructions_of(length, 25) == 16


def test_the_shortest_prompts_are_text_and_half_of_all_are_instructions() -> None:
    lengths = quality_prompts.LENGTHS
    shares = [quality_prompts.instructions_of(length, 25) for length in lengths]
    assert shares[0] == 0
    assert sum(shares) >= 25 * len(lengths) / 2


# --- what is handed over -----------------------------------------------------------------------


@pytest.mark.parametrize("codec", list(Codec)[1:])
@pytest.mark.parametrize("tokens", [31, 128, 300])
def test_blocks_of_128_tokens_decode_as_one_long_block_does(codec: Codec, tokens: int) -> None:
    rows = [torch.cat(pair, 3)[0] for pair in kv_of(1, tokens)]
    planes, only = [row.unsqueeze(0) for row in rows], torch.tensor([0])
    expected = [torch.empty_like(plane) for plane in planes]
    for part in parts(64):
        encoding = encoding_of(codec, part)
        slab = torch.empty(
            2 * 3 * encoding.stripe_bytes(tokens, 64, SINK_TOKENS), dtype=torch.uint8
        )
        source = [ops.part_of(plane, part) for plane in planes]
        ops.encode_blocks(source, only, tokens, encoding, SINK_TOKENS, slab)
        target = [ops.part_of(plane, part) for plane in expected]
        ops.decode_blocks(slab, only, tokens, encoding, SINK_TOKENS, target)
    for found, plane in zip(handed_over(codec, rows), expected, strict=True):
        assert torch.equal(found, plane[0])


def test_raw_is_bit_exact() -> None:
    rows = [torch.cat(pair, 3)[0] for pair in kv_of(1, 200)]
    rows[0][0, 0, :3] = torch.tensor([-0.0, torch.inf, torch.nan])
    for before, after in zip(rows, handed_over(Codec.RAW, rows), strict=True):
        assert torch.equal(before.view(torch.int32), after.view(torch.int32))
    through(Codec.RAW, kv_of(2, 200))


@pytest.mark.parametrize("codec", list(Codec))
def test_each_sequence_of_a_batch_is_handed_over_for_itself(codec: Codec) -> None:
    together = through(codec, kv_of(2, 77))
    for number in range(2):
        alone = [(k[number : number + 1], v[number : number + 1]) for k, v in kv_of(2, 77)]
        for (keys, values), (own_keys, own_values) in zip(
            together, through(codec, alone), strict=True
        ):
            assert torch.equal(keys[number], own_keys[0])
            assert torch.equal(values[number], own_values[0])


def test_narrower_codecs_are_farther_from_the_kv() -> None:
    kv = kv_of(1, 160)
    errors = []
    for codec in Codec:
        pairs = zip(kv, through(codec, kv), strict=True)
        errors.append(max(float((a - b).abs().max()) for one, two in pairs
                          for a, b in zip(one, two, strict=True)))  # fmt: skip
    assert errors[0] == 0
    assert errors == sorted(set(errors))
    assert errors[1] < 0.03


def test_bytes_are_told_against_both_element_types() -> None:
    assert bytes_ratio(Codec.RAW, 64, [100], 4) == 1
    assert bytes_ratio(Codec.INT8, 64, [160], 4) == pytest.approx(66 / 256)
    assert bytes_ratio(Codec.INT8, 64, [160], 2) == pytest.approx(66 / 128)
    ratios = [bytes_ratio(codec, 64, [32, 512], 2) for codec in Codec]
    assert ratios == sorted(ratios, reverse=True)


# --- measures ----------------------------------------------------------------------------------


def test_tokens_are_equal_up_to_the_first_difference() -> None:
    agree = [[True, True, False, True], [False, True, True, True], [True] * 4]
    assert quality.Findings(agreements=agree).equal_tokens() == [2, 0, 4]


def test_divergence_is_in_nats_and_from_raw() -> None:
    raw, other = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert quality.divergence(raw, other + 3) == pytest.approx([expected])
    assert quality.divergence(other, raw) != pytest.approx([expected])
    assert quality.divergence(raw, raw) == [0]


def test_perplexity_counts_tokens_and_not_windows() -> None:
    losses = [[math.log(2)] * 3, [math.log(32)]]
    assert quality.perplexity(losses) == pytest.approx(4)


# --- with a model ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> Any:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def ids_of(sequences: int, tokens: int) -> torch.Tensor:
    return torch.randint(97, (sequences, tokens), generator=torch.Generator().manual_seed(2))


@torch.inference_mode()
def test_the_decode_engine_computes_the_last_token_of_the_prompt_again(network: Any) -> None:
    model, ids = quality.Model(network), ids_of(2, 50)
    kv = quality.before_last(model.prefill(ids[:, :40]))
    assert kv[0][0].shape == (2, 1, 39, 32)
    torch.testing.assert_close(model.logits(kv, ids[:, 39:]), network(ids).logits[:, 39:])
    assert kv[0][0].shape == (2, 1, 39, 32)


@torch.inference_mode()
def test_raw_scores_a_window_as_a_model_that_was_never_interrupted(network: Any) -> None:
    findings = {"raw": quality.Findings(), "int2": quality.Findings()}
    handovers = {codec: (lambda kv, codec=codec: through(Codec(codec), kv)) for codec in findings}
    window = ids_of(1, 256)
    quality.score_windows(quality.Model(network), window.tolist(), handovers, findings)
    logits = network(window).logits[0, 127:-1]
    expected = torch.nn.functional.cross_entropy(logits, window[0, 128:], reduction="none")
    (raw,), (int2,) = findings["raw"].window_losses, findings["int2"].window_losses
    torch.testing.assert_close(torch.tensor(raw), expected)
    assert not torch.allclose(torch.tensor(int2), expected)


@torch.inference_mode()
def test_answers_of_raw_are_equal_and_a_codec_parts_where_it_would_by_itself(network: Any) -> None:
    model, batch = quality.Model(network), ids_of(6, 64)
    findings = {codec.value: quality.Findings() for codec in (Codec.RAW, Codec.INT2)}
    handovers = {codec: (lambda kv, codec=codec: through(Codec(codec), kv)) for codec in findings}
    quality.compare_answers(model, [batch.tolist()], handovers, findings)
    raw, int2 = quality.rows_of(with_losses(findings), model.dim)
    assert (raw["identical_share"], raw["kl_mean"], raw["top1_share"]) == (1, 0, 1)
    assert (int2["prompts"], raw["scored_tokens"]) == (6, 1)
    assert int2["kl_mean"] > 0

    kv, last = model.prefill(batch), batch[:, -1:]
    by_raw = model.greedy(quality.before_last(kv), last, quality.ANSWER_TOKENS)
    by_int2 = model.greedy(quality.before_last(through(Codec.INT2, kv)), last, 64)
    alone = quality.Findings(agreements=(by_raw == by_int2).tolist())
    assert findings["int2"].equal_tokens() == alone.equal_tokens()
    assert min(alone.equal_tokens()) < quality.ANSWER_TOKENS

    assert quality.table([raw, int2]).count("\n") == 3
    assert "| raw | 2.72 | 2.72 to 2.72 |" in quality.window_table([raw, int2])


def with_losses(findings: dict[str, quality.Findings]) -> dict[str, quality.Findings]:
    for found in findings.values():
        found.window_losses.append([1.0])
    return findings
