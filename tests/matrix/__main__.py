"""``python -m tests.matrix``: every pair of ``rows`` on real engines, one after the other.

    python -m tests.matrix --json build/matrix.json
    python -m tests.matrix --only "TP 2" --prompts 4

Exits with 1 where a pair does not answer as it has to.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common.output import commit, machine
from tests import models
from tests.engine import (
    Completion,
    Engine,
    EngineError,
    connector_arguments,
    free_port,
    hand_off,
    hand_off_at_once,
    running,
    say,
    start,
)
from tests.engine_site import environ_of
from tests.engines.conftest import ARGUMENTS, CHUNKED, STRETCH_BYTES, random_prompt
from tests.matrix.rows import ROWS, Row, Side
from tests.parity import FLOAT32, compare

_LENGTHS = (
    1,
    15,
    16,
    17,
    31,
    33,
    63,
    64,
    65,
    95,
    97,
    127,
    129,
    191,
    193,
    255,
    300,
    640,
    1000,
    1500,
)
_TOP = 20
"""As many tokens as vLLM tells the log-probabilities of."""


def main(words: Sequence[str] | None = None) -> int:
    arguments = _parse(words)
    os.environ.update(environ_of())
    chosen = [row for row in ROWS if all(part in row.name for part in arguments.only)]
    if not chosen:
        say(f"no pair has {' and '.join(arguments.only)} in its name")
        return 2
    facts, found = machine(), []
    for row in chosen:
        outcome = run(row, arguments.prompts)
        found.append(outcome)
        say(f"{row.name}: {json.dumps(outcome)}")
        if arguments.json:
            told = {"commit": commit(), "machine": facts, "rows": found}
            arguments.json.write_text(json.dumps(told, indent=1) + "\n")
    bad = [row["pair"] for row in found if row["equal"] is False]
    say(
        f"{len(found) - len(bad)} of {len(found)} as they have to be"
        + "".join(map("\n  {}".format, bad))
    )
    return int(bool(bad))


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.matrix", description=__doc__)
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument(
        "--only", action="append", default=[], help="pairs with this in their name (repeatable)"
    )
    parser.add_argument("--prompts", type=int, default=len(_LENGTHS), help="of each pair")
    return parser.parse_args(words)


def run(row: Row, num_prompts: int) -> dict[str, Any]:
    """Return what became of a pair."""
    outcome = {
        "pair": row.name, "producer": row.producer.name, "consumer": row.consumer.name,
        "model": row.model, "bound": row.bound,
    }  # fmt: skip
    if missing := row.needs():
        return outcome | {"equal": None, "skipped": missing}
    with tempfile.TemporaryDirectory() as logs:
        pair = [
            _start(row.model, "prefill", row.producer, 0, Path(logs)),
            _start(row.model, "decode", row.consumer, 1, Path(logs)),
        ]
        try:
            with running(pair):
                return outcome | _ask(row, *pair, num_prompts)
        except (EngineError, AssertionError, httpx.HTTPError) as error:
            for engine in pair:
                say(f"{engine.name}:\n{_complaints(engine)}")
            return outcome | {"equal": False, "why": str(error)[-2000:]}


def _start(model: str, role: str, side: Side, core: int, logs: Path) -> Engine:
    port = free_port() if role == "prefill" else 0
    options = dict(side.options)
    if port:
        options |= {"port": port, "stretch_bytes": STRETCH_BYTES}
    words = [
        *(word for word in ARGUMENTS[model] if word not in side.left_out),
        *(CHUNKED if role == "prefill" and model != "tiny-mla" else ()),
        *("--no-enable-prefix-caching", "--max-logprobs", str(_TOP)),
        *side.arguments,
        *connector_arguments(role, **options),
    ]
    cores = "|".join([str(core)] * side.ranks)
    name = f"{role}-{side.name.replace(' ', '-')}"
    path = models.MODELS[model]()
    return start(name, path, words, cores=cores, folder=logs, control_port=port)


def _ask(row: Row, producer: Engine, consumer: Engine, num_prompts: int) -> dict[str, Any]:
    divergences, handed_off_s, alone_s = [], [], []
    for number, length in enumerate(_LENGTHS[:num_prompts]):
        prompt = random_prompt(length, 7000 + number)
        began = time.perf_counter()
        ask = (hand_off, hand_off_at_once)[number % 2]
        answer = ask(producer, consumer, prompt, 8, logprobs=_TOP)
        between = time.perf_counter()
        expected = consumer.complete(prompt, 8, logprobs=_TOP)
        handed_off_s.append(between - began)
        alone_s.append(time.perf_counter() - between)
        if row.bound:
            divergences.append(divergence(expected, answer))
        else:
            compare(expected, answer, FLOAT32)
    for engine in (producer, consumer):
        engine.wait_until_at_rest(60)
    metrics = consumer.metrics()
    fetches = metrics.get("pd_fetch_seconds_count", 0)
    assert fetches >= num_prompts - 1, f"only {fetches} fetches of {num_prompts} handoffs"
    found: dict[str, Any] = {
        "equal": True,
        "compared": num_prompts,
        "ttft_ratio": round(statistics.median(handed_off_s) / statistics.median(alone_s), 3),
        "wire_bytes": metrics["pd_fetch_bytes_total"],
        "packed": metrics.get("pd_fetch_packed_stretches_total", 0),
    }
    if row.bound:
        mean = statistics.fmean(divergences)
        found |= {"equal": mean <= row.bound, "divergence": round(mean, 6)}
    return found


def _complaints(engine: Engine) -> str:
    lines = engine.log.read_text(errors="replace").splitlines()
    told = (line for line in lines if "WARNING" in line or "ERROR" in line)
    return "\n".join([line for line in told if "shutdown" not in line][-20:])


def divergence(expected: Completion, answer: Completion) -> float:
    """Return the Kullback-Leibler divergence of the first answered token's distribution from what
    is expected, in nats: over the most likely tokens, all others as one."""
    ours, theirs = expected.logprobs[0], answer.logprobs[0]
    common = ours.keys() & theirs.keys()
    total = sum(math.exp(ours[token]) * (ours[token] - theirs[token]) for token in common)
    rest, other = (_rest(side, common) for side in (ours, theirs))
    return max(0.0, total + rest * math.log(rest / other))


def _rest(logprobs: Mapping[str, float], common: set[str]) -> float:
    return max(1e-9, 1.0 - sum(math.exp(logprobs[token]) for token in common))


if __name__ == "__main__":
    sys.exit(main())
