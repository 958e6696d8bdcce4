"""What the codecs do to a real model: perplexity, greedy answers, next-token distributions.

The model is SmolLM2-135M-Instruct through transformers, computed in float32 with a float32 KV
cache; no engine is started. A prompt's KV goes through the ops that the connector uses, in one
piece from token 0 on, and then the model goes on as a decode engine does: the last token of the
prompt is computed again on the decoded KV before it, and so is everything that follows.

Each codec is measured against `raw`. First in windows of a text that ships with the benchmark: the
first half is the prompt, the second is scored. Then after prompts, instructions and pieces of the
text, of several lengths: `raw` answers greedily, its answer is given to every codec token by token,
and what each would say next is compared. Up to the first difference, that is what it would have
said by itself.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

from benchmarks.common import output, program
from benchmarks.quality import prompts as quality_prompts
from benchmarks.quality.handover import BLOCK_TOKENS, Kv, bytes_ratio, through
from benchmarks.quality.prompts import LENGTHS, Ids, instructions_of, titles
from tests import models
from tests.engine import say
from vllm_pd_plugin.codecs import ops
from vllm_pd_plugin.codecs.codec import SINK_TOKENS, Codec

EXAMPLES = """examples:
  python -m benchmarks.quality --json benchmarks/results/quality.json
  python -m benchmarks.quality --prompts 16
"""

WINDOW_TOKENS, STRIDE_TOKENS = 1024, 512
ANSWER_TOKENS = 64
LONG_TOKENS = 4096
LIMITS = (
    "What a model of 135M parameters can show: that a codec's arithmetic, axes and layout are "
    "right, how codecs rank, and how near one is to doing nothing. What it cannot: what a large "
    "model loses. Small models tend to lose more, because they have few KV heads and choose "
    "between tokens that are nearly as likely; but other models have other outliers. Long "
    "contexts, retrieval and reasoning were not looked at."
)
ROUNDED = "bfloat16"
"""Not a codec but a measure for them: KV that is rounded as a bfloat16 cache rounds it."""

Handovers = Mapping[str, Callable[[Kv], Kv]]
"""By name, what becomes of the KV of a batch of prompts; ``raw`` is the first."""


@dataclass(frozen=True, slots=True)
class Findings:
    """What was measured with one codec.

    Plain numbers: small tensors that are kept between large ones that are freed would stop malloc
    from using that memory again, gigabytes of it.
    """

    window_losses: list[list[float]] = field(default_factory=list)
    """Of each window, nats of each scored token."""
    divergences: list[list[float]] = field(default_factory=list)
    """Of each prompt, KL(raw || codec) in nats before each token of the answer."""
    agreements: list[list[bool]] = field(default_factory=list)
    """Of each prompt, whether the likeliest token is the one that raw said."""

    def equal_tokens(self) -> list[int]:
        """Return for each prompt how many tokens are raw's before the first that is not."""
        return [sum(takewhile(bool, agree)) for agree in self.agreements]


class Model:
    """A causal language model that goes on from KV that is given to it; batches of one length."""

    def __init__(self, network: Any) -> None:
        self._network = network

    @property
    def dim(self) -> int:
        return int(self._network.config.head_dim)

    @property
    def end(self) -> int:
        """The token that ends an answer."""
        return int(self._network.config.eos_token_id)

    def prefill(self, ids: torch.Tensor) -> Kv:
        """Return the KV of prompts ``[sequences, tokens]``."""
        cache = self._network(ids, use_cache=True, logits_to_keep=1).past_key_values
        return [(layer.keys, layer.values) for layer in cache.layers]

    def logits(self, kv: Kv, ids: torch.Tensor) -> torch.Tensor:
        """Return ``[sequences, tokens, vocabulary]`` for tokens that follow some KV."""
        logits: torch.Tensor = self._network(ids, past_key_values=DynamicCache(kv)).logits
        return logits

    def greedy(self, kv: Kv, last: torch.Tensor, count: int) -> torch.Tensor:
        """Return ``[sequences, count]``: what follows the tokens ``last``, which follow the KV.

        An answer that has ended goes on.
        """
        cache, answer = DynamicCache(kv), [last]
        for _ in range(count):
            logits = self._network(answer[-1], past_key_values=cache).logits
            answer.append(logits.argmax(2))
        return torch.cat(answer[1:], 1)


def main() -> int:
    parser = program.parser("quality", __doc__)
    parser.epilog = EXAMPLES
    parser.add_argument(
        "--prompts", type=int, default=200, help=f"a multiple of {len(LENGTHS)} (%(default)s)"
    )
    parser.add_argument(
        "--page", type=Path, metavar="FILE", help="write the table into this page as well"
    )
    args = parser.parse_args()
    if args.prompts < len(LENGTHS) or args.prompts % len(LENGTHS):
        parser.error(f"--prompts must be a multiple of {len(LENGTHS)}")
    return program.run(lambda _: run(args))


@torch.inference_mode()
def run(args: argparse.Namespace) -> int:
    """Measure, print and write."""
    facts, started = output.machine(), time.monotonic()
    logging.disable_progress_bar()
    folder = models.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    text = quality_prompts.TEXT.read_text()
    ids = quality_prompts.encode(tokenizer, quality_prompts.body(text))
    windows = quality_prompts.windows(ids, WINDOW_TOKENS, STRIDE_TOKENS)
    count = args.prompts // len(LENGTHS)
    batches = [quality_prompts.prompts(tokenizer, ids, length, count) for length in LENGTHS]

    handovers = {codec.value: _through(codec) for codec in Codec} | {ROUNDED: rounded}
    findings = {name: Findings() for name in handovers}
    score_windows(model, windows, handovers, findings)
    ended = compare_answers(model, batches, handovers, findings)

    rows = rows_of(findings, model.dim)
    tables = [
        ("Codecs against raw: SmolLM2-135M-Instruct", table(rows)),
        ("Perplexity of each window", window_table(rows)),
    ]
    facts += [
        f"Besides: transformers {metadata.version('transformers')}; PyTorch threads: "
        f"{torch.get_num_threads()}; the ops are "
        f"{'native' if ops.HAS_NATIVE else 'the references in PyTorch'}. "
        f"The whole run took {time.monotonic() - started:.0f} s.",
        *method(text, ids, windows, ended, args.prompts, model.dim),
        *compared(measures(findings[ROUNDED], findings[Codec.RAW])),
        LIMITS,
    ]
    print(output.as_text(tables, facts))
    if args.json:
        output.write(args.json, rows, tables, facts)
    if args.page:
        output.write_between(args.page, "quality", tables[0][1])
    return 0


# --- measuring -------------------------------------------------------------------------------


def score_windows(
    model: Model, windows: Sequence[Ids], handovers: Handovers, findings: Mapping[str, Findings]
) -> None:
    """Score the second half of each window after the first half's KV was handed over."""
    for number, window in enumerate(windows, 1):
        ids, half = torch.tensor([window]), len(window) // 2
        prompt = model.prefill(ids[:, :half])
        for name, hand_over in handovers.items():
            logits = model.logits(before_last(hand_over(prompt)), ids[:, half - 1 : -1])
            losses = torch.nn.functional.cross_entropy(logits[0], ids[0, half:], reduction="none")
            findings[name].window_losses.append(losses.tolist())
        said = ", ".join(f"{name} {perplexity([f.window_losses[-1]]):.2f}"
                         for name, f in findings.items())  # fmt: skip
        say(f"window {number} of {len(windows)}: perplexity: {said}")


def compare_answers(
    model: Model,
    batches: Sequence[Sequence[Ids]],
    handovers: Handovers,
    findings: Mapping[str, Findings],
) -> int:
    """Let raw answer each batch of prompts, and compare the others with it token by token.

    Returns how many of raw's answers would have ended.
    """
    ended = 0
    for batch in batches:
        ids = torch.tensor(batch)
        prompt, last = model.prefill(ids), ids[:, -1:]
        answer = model.greedy(before_last(prompt), last, ANSWER_TOKENS)
        ended += int((answer == model.end).any(1).sum())
        said = torch.cat([last, answer[:, :-1]], 1)
        raw = model.logits(before_last(prompt), said)
        for name, hand_over in handovers.items():
            logits = model.logits(before_last(hand_over(prompt)), said)
            found = findings[name]
            found.agreements.extend((logits.argmax(2) == answer).tolist())
            found.divergences.extend(divergence(*pair) for pair in zip(raw, logits, strict=True))
        equal = ", ".join(f"{name} {np.mean(f.equal_tokens()[-len(batch):]):.1f}"
                          for name, f in findings.items())  # fmt: skip
        say(f"{len(batch)} prompts of {len(batch[0])} tokens: mean of equal tokens: {equal}")
    return ended


def before_last(kv: Kv) -> Kv:
    """Drop what a decode engine computes again."""
    return [(keys[:, :, :-1], values[:, :, :-1]) for keys, values in kv]


def perplexity(losses: Sequence[Sequence[float]]) -> float:
    return float(np.exp(np.mean(np.concatenate(losses))))


def divergence(raw: torch.Tensor, other: torch.Tensor) -> list[float]:
    """Return KL(raw || other) in nats of each row of logits ``[tokens, vocabulary]``."""
    log_raw, log_other = raw.double().log_softmax(1), other.double().log_softmax(1)
    found: list[float] = (log_raw.exp() * (log_raw - log_other)).sum(1).tolist()
    return found


def rounded(kv: Kv) -> Kv:
    return [(keys.bfloat16().float(), values.bfloat16().float()) for keys, values in kv]


def _through(codec: Codec) -> Callable[[Kv], Kv]:
    return lambda kv: through(codec, kv)


# --- reporting -------------------------------------------------------------------------------


def rows_of(findings: Mapping[str, Findings], dim: int) -> list[dict[str, Any]]:
    """Return a row for each codec. ``dim``: channels of a head, for the bytes."""
    rows = []
    for codec in Codec:
        if codec in findings:
            measured = measures(findings[codec], findings[Codec.RAW])
            ratios = {
                f"bytes_ratio_{name}": round(bytes_ratio(codec, dim, LENGTHS, size), 4)
                for name, size in (("float32", 4), ("bfloat16", 2))
            }
            rows.append({"codec": codec.value, **measured, **ratios})
    return rows


def measures(own: Findings, raw: Findings) -> dict[str, Any]:
    """Return what a row says of one codec, but for its name and its bytes."""
    equal, agree = np.array(own.equal_tokens()), np.array(own.agreements)
    kl = np.concatenate(own.divergences)
    own_perplexity = perplexity(own.window_losses)
    return {
        "perplexity": round(own_perplexity, 4),
        "perplexity_ratio": round(own_perplexity / perplexity(raw.window_losses), 5),
        "identical_share": round(float(np.mean(equal == agree.shape[1])), 4),
        "mean_equal_tokens": round(float(np.mean(equal)), 2),
        "median_equal_tokens": float(np.median(equal)),
        "first_token_share": round(float(np.mean(agree[:, 0])), 4),
        "kl_mean": _short(np.mean(kl)),
        "kl_p50": _short(np.quantile(kl, 0.5)),
        "kl_p99": _short(np.quantile(kl, 0.99)),
        "top1_share": round(float(np.mean(agree)), 4),
        "prompts": len(own.agreements),
        "scored_tokens": sum(map(len, own.window_losses)),
        "window_perplexities": [round(perplexity([losses]), 3) for losses in own.window_losses],
    }


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = (
        "codec", "perplexity", "of raw's", "all 64 tokens equal", "equal tokens: mean", "median",
        "first token equal", "likeliest token equal", "KL nats: mean", "median", "p99",
        "bytes of float32", "of bfloat16",
    )  # fmt: skip
    lines = [
        [
            row["codec"], f"{row['perplexity']:.3f}", f"{row['perplexity_ratio']:.4f}",
            f"{row['identical_share']:.1%}", f"{row['mean_equal_tokens']:.1f}",
            f"{row['median_equal_tokens']:.0f}", f"{row['first_token_share']:.1%}",
            f"{row['top1_share']:.1%}",
            *(f"{row[name]:.2g}" for name in ("kl_mean", "kl_p50", "kl_p99")),
            f"{row['bytes_ratio_float32']:.1%}", f"{row['bytes_ratio_bfloat16']:.1%}",
        ]
        for row in rows
    ]  # fmt: skip
    return output.markdown(head, lines)


def window_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Raw's perplexity in each window, and the others' as multiples of it."""
    raw = rows[0]["window_perplexities"]
    head = ("codec", *(f"window {number}" for number in range(1, len(raw) + 1)), "spread")
    lines = [["raw", *(f"{own:.2f}" for own in raw), f"{min(raw):.2f} to {max(raw):.2f}"]]
    for row in rows[1:]:
        ratios = [own / of_raw for own, of_raw in zip(row["window_perplexities"], raw, strict=True)]
        spread = f"{min(ratios):.4f} to {max(ratios):.4f}"
        lines.append([f"{row['codec']}, of raw's", *(f"{ratio:.4f}" for ratio in ratios), spread])
    return output.markdown(head, lines)


def method(
    text: str, ids: Ids, windows: Sequence[Ids], ended: int, prompts: int, dim: int
) -> Iterator[str]:
    yield (
        "Model: SmolLM2-135M-Instruct (30 layers, 3 KV heads of 64), from 4-bit weights that were "
        "dequantized to bfloat16; computed in float32, and the KV cache is float32 too: what raw "
        "sends is exact, and no rounding of the cache hides a codec's."
    )
    yield (
        f"Handover: encode_blocks and decode_blocks, {SINK_TOKENS} sinks, blocks of {BLOCK_TOKENS} "
        "tokens, keys and values each in one piece from token 0 on. The last token of a prompt is "
        "computed again on the decoded KV before it; what follows attends to the decoded KV and "
        "to its own, which is exact. raw goes through pack_blocks and unpack_blocks, and is "
        "checked bit for bit."
    )
    yield (
        f"Text: {len(ids)} tokens, written down from memory: {'; '.join(titles(text))}. "
        f"{len(windows)} windows of {WINDOW_TOKENS} tokens every {STRIDE_TOKENS}: the first "
        f"{WINDOW_TOKENS // 2} are handed over, the others scored, given all before them."
    )
    instructions = sum(instructions_of(length, prompts // len(LENGTHS)) for length in LENGTHS)
    yield (
        f"Prompts: {prompts}, as many of each length: {', '.join(map(str, LENGTHS))} tokens. "
        f"{instructions} are instructions in the chat template, the others pieces of the text to "
        f"continue. {ANSWER_TOKENS} tokens each, greedily; {ended} of raw's answers ended before, "
        "and were made to go on."
    )
    yield (
        "Equal tokens: raw's answer is computed token by token, the codecs' next tokens are taken "
        "from one pass over raw's answer. Up to the first difference that is the answer which "
        "the codec would have given. Likeliest token and KL(raw || codec) count every token of "
        "the answer, also those after a difference."
    )
    longer = ", ".join(
        f"{codec} {bytes_ratio(codec, dim, [LONG_TOKENS], 4):.1%} and "
        f"{bytes_ratio(codec, dim, [LONG_TOKENS], 2):.1%}"
        for codec in Codec
        if codec is not Codec.RAW
    )
    yield (
        f"Bytes are those of all these prompts, {round(sum(LENGTHS) / len(LENGTHS))} tokens in the "
        f"mean, against raw KV in float32 and in bfloat16. Of a prompt of {LONG_TOKENS} tokens: "
        f"{longer}."
    )


def compared(row: Mapping[str, Any]) -> Iterator[str]:
    yield (
        "For comparison, no codec but KV rounded once to bfloat16, as a bfloat16 cache rounds it: "
        f"perplexity {row['perplexity_ratio']:.4f} of raw's, all {ANSWER_TOKENS} tokens equal in "
        f"{row['identical_share']:.1%}, {row['mean_equal_tokens']:.1f} equal tokens in the mean, "
        f"likeliest token equal in {row['top1_share']:.1%}, mean KL {row['kl_mean']:.2g} nats."
    )


if __name__ == "__main__":
    sys.exit(main())
