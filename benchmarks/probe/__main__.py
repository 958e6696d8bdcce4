"""How small a disturbance of one matrix shows in the answers to the probe prompt.

A tiny Llama of random weights (`tests.fakes.llama`) computes the prompt twice, once with noise
added to the elements of one matrix, relative to each. Between two release lines, the other engine
rounds at other places than this one. A disturbance counts as found where the answers are further
apart than the bound, for every layer's matrix of that kind and every seed.

How far engines of equal weights are apart by rounding alone is measured on that model, and on
SmolLM2-135M-Instruct: what it computes in a type against what it computes in float32.

    python -m benchmarks.probe
    python -m benchmarks.probe --json benchmarks/results/probe.json --page docs/mixed-versions.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import output, program
from tests import models
from tests.engine import say
from tests.fakes import llama
from tests.fakes.sketches import disturbed, sketch_of
from vllm_pd_plugin.memory import probe
from vllm_pd_plugin.memory.probe import Sketch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SEEDS = range(3)
SIZES = (
    0.00001, 0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1,
    0.2, 0.5, 1.0,
)  # fmt: skip
KINDS = ("embed", "q", "k", "v", "o", "gate", "up", "down", "head")


def main(args: argparse.Namespace) -> int:
    facts = output.machine()
    rows = [
        *(row for dtype in DTYPES for row in smallest(dtype)),
        *rounding("tiny Llama", {name: tiny_apart(name) for name in DTYPES}),
        *rounding("SmolLM2-135M-Instruct", smollm2_apart()),
    ]
    tables = [
        ("The smallest disturbance of one matrix that is found", found_table(rows)),
        ("How far equal weights are apart by rounding", rounding_table(rows)),
    ]
    facts += [
        f"{probe.PROMPT_TOKENS} tokens; {probe.BUCKETS} sums a row; normally distributed noise "
        f"of {len(SIZES)} sizes; {len(SEEDS)} seeds.",
    ]
    print(output.as_text(tables, facts))
    if args.json:
        output.write(args.json, rows, tables, facts)
    if args.page:
        output.write_between(args.page, "probe", "\n\n".join(text for _, text in tables))
    return 0


def smallest(dtype: str) -> list[dict[str, Any]]:
    """Return, for each kind of matrix, the smallest noise that is always found; None: none is."""
    kind_of = {name: name.split(".")[-1] for name in llama.random_weights(0)}
    bounds = {mixed: probe.bound([dtype], mixed) for mixed in (False, True)}
    apart: dict[tuple[str, float, bool], float] = {}
    for seed in SEEDS:
        weights = llama.random_weights(seed)
        ours = sketch_of(weights, DTYPES[dtype])
        for name, kind in kind_of.items():
            for size in SIZES if kind in KINDS else ():
                changed = disturbed(weights, name, size, seed)
                for mixed in bounds:
                    theirs = sketch_of(changed, DTYPES[dtype], rounds_often=not mixed)
                    found = farthest(ours, theirs)
                    key = kind, size, mixed
                    apart[key] = min(found, apart.get(key, found))
        say(f"{dtype}, seed {seed}: done")
    return [
        {
            "what": "smallest", "dtype": dtype, "matrix": kind, "release_lines": 1 + mixed,
            "bound": bound,
            "found": next((size for size in SIZES if apart[kind, size, mixed] > bound), None),
        }
        for kind in KINDS
        for mixed, bound in bounds.items()
    ]  # fmt: skip


def farthest(ours: Sketch, theirs: Sketch) -> float:
    return probe.distances(ours, theirs)[0].relative


def tiny_apart(dtype: str) -> float:
    every = (llama.random_weights(seed) for seed in SEEDS)
    return max(
        farthest(
            sketch_of(weights, DTYPES[dtype]),
            sketch_of(weights, DTYPES[dtype], rounds_often=False),
        )
        for weights in every
    )


def smollm2_apart() -> dict[str, float]:
    """Return how far what a real model computes in each type is from what it is in float32; in
    float32 itself, with another order of sums."""
    from transformers import AutoModelForCausalLM

    folder = models.smollm2()
    exact, apart = None, {}
    for name, dtype in DTYPES.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        found = _sketch_of_transformer(model)
        if exact is None:
            exact = found
            model.set_attn_implementation("eager")
            found = _sketch_of_transformer(model)
        apart[name] = farthest(exact, found)
    return apart


def _sketch_of_transformer(model: Any) -> Sketch:
    tokens = torch.tensor([probe.prompt(model.config.vocab_size)])
    with torch.no_grad():
        output_of = model(tokens, use_cache=True)
    layers = output_of.past_key_values.layers
    sums = {}
    for place in probe.probed_layers(len(layers)):
        for kind, rows in (("key", layers[place].keys), ("value", layers[place].values)):
            sums[f"layer {place} {kind}"] = probe.sketch(rows[0].transpose(0, 1).float().numpy())
    sums["logits"] = probe.sketch_logits(output_of.logits[0, -1].float().numpy())
    return probe.together([sums])


def rounding(model: str, apart: Mapping[str, float]) -> list[dict[str, Any]]:
    return [
        {"what": "rounding", "model": model, "dtype": dtype, "apart": found}
        for dtype, found in apart.items()
    ]


def found_table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ["matrix"]
    head += [f"{dtype}, {lines}" for dtype in DTYPES for lines in ("one release line", "two")]
    found = {
        (row["matrix"], row["dtype"], row["release_lines"]): row["found"]
        for row in rows
        if row["what"] == "smallest"
    }
    lines = [
        [kind, *(_percent(found[kind, dtype, lines]) for dtype in DTYPES for lines in (1, 2))]
        for kind in KINDS
    ]
    return output.markdown(head, lines)


def _percent(size: float | None) -> str:
    return "none" if size is None else f"{100 * size:g} %"


def rounding_table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        [
            row["model"], row["dtype"], f"{row['apart']:.2g}",
            f"{probe.bound([row['dtype']], False):g}", f"{probe.bound([row['dtype']], True):g}",
        ]
        for row in rows
        if row["what"] == "rounding"
    ]  # fmt: skip
    head = ["model", "type", "apart", "bound within a release line", "bound between two"]
    return output.markdown(head, lines)


if __name__ == "__main__":
    parser = program.parser("probe", __doc__)
    parser.add_argument(
        "--page", type=Path, metavar="FILE", help="write the tables into this page as well"
    )
    sys.exit(main(parser.parse_args()))
