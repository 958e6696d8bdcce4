"""LoRA adapters of random weights for the tests' models, in the form that PEFT writes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK = 4
_MODULES = ("q_proj", "v_proj", "o_proj")


def write_adapter(folder: Path, model: Path, seed: int) -> Path:
    """Write an adapter for a Llama; large enough that greedy answers are others than without."""
    config = json.loads((model / "config.json").read_text())
    hidden = config["hidden_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    values = config["num_key_value_heads"] * config["head_dim"]
    widths = {"q_proj": (hidden, queries), "v_proj": (hidden, values), "o_proj": (queries, hidden)}
    chance = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(config["num_hidden_layers"]):
        for module in _MODULES:
            inputs, outputs = widths[module]
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, inputs, generator=chance) * 0.2
            tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, RANK, generator=chance) * 0.2
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(model),
        "r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": 0.0, "bias": "none",
        "target_modules": list(_MODULES),
    }))  # fmt: skip
    return folder
