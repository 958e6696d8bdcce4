"""A cache of Hugging Face's hub with the project's models under the names that vLLM's tests use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

MODELS: Mapping[str, tuple[str, ...]] = {
    # It talks, ends its answers, and knows a chat template.
    "smollm2": (
        "HuggingFaceH4/zephyr-7b-beta",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "Qwen/Qwen2-1.5B-Instruct",
        "Qwen/Qwen2.5-1.5B-Instruct",
        "Qwen/Qwen3-0.6B",
        "Qwen/Qwen3-1.7B",
        "Qwen/Qwen3-8B",
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        "meta-llama/Llama-3.2-1B-Instruct",
    ),
    # Quick, for tests that do not read what is said.
    "tiny-llama": (
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        "facebook/opt-125m",
        "hmellor/tiny-random-LlamaForCausalLM",
        "intfloat/multilingual-e5-small",
        "openai-community/gpt2",
    ),
}
"""By the name in ``tests.models``, the names that it has for vLLM's tests."""

ADAPTERS = (
    "charent/self_cognition_Alice",
    "jekunz/smollm-135m-lora-fineweb-faroese",
    "minpeter/LoRA-Llama-3.2-1B-tool-vllm-ci",
    "typeof/zephyr-7b-beta-lora",
)
"""Names of adapters that fixtures fetch. No server loads one: see ``inside.launch``."""

MAX_POSITIONS = 32_768
"""Some tests ask for a longer context than the models were made for. None fills it."""


def repo_folder(name: str) -> str:
    """Return the folder of a repository in a hub's cache."""
    return "models--" + name.replace("/", "--")


def commit_of(name: str) -> str:
    """Return a made-up commit, which a snapshot's folder is named after."""
    return hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()


def add(hub: Path, name: str, source: Path | None) -> Path:
    """Make a repository's snapshot and return it; files are links, the configuration is a copy.

    source: the model's folder; None makes a snapshot of an adapter that nobody loads.
    """
    repo = hub / repo_folder(name)
    snapshot = repo / "snapshots" / commit_of(name)
    snapshot.mkdir(parents=True, exist_ok=True)
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / "main").write_text(commit_of(name))
    if source is None:
        (snapshot / "adapter_config.json").write_text("{}\n")
        return snapshot
    for file in source.iterdir():
        link = snapshot / file.name
        link.unlink(missing_ok=True)
        if file.name == "config.json":
            config = json.loads(file.read_text()) | {"max_position_embeddings": MAX_POSITIONS}
            link.write_text(json.dumps(config, indent=2) + "\n")
        else:
            link.symlink_to(file.resolve())
    return snapshot


def make(home: Path, makers: Mapping[str, Callable[[], Path]]) -> Path:
    """Fill the hub's cache below ``home``, to be given as HF_HOME. makers: ``tests.models``'s."""
    for recipe, names in MODELS.items():
        source = makers[recipe]()
        for name in names:
            add(home / "hub", name, source)
    for name in ADAPTERS:
        add(home / "hub", name, None)
    return home
