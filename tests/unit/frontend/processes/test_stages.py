"""What a starting engine's log says of how far it is."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm_pd_plugin.frontend.processes.stages import MARKS, SHARDS, Progress, Stage

LOG = [
    ("Triton is installed, but doesn't include CPU backend. Disabling Triton.", "starts, imports"),
    (
        "(APIServer pid=5) INFO 11-29 05:07:36 [api_utils.py:286] non-default args: {'port': 1}",
        "reads the model's configuration",
    ),
    (
        "(APIServer pid=5) INFO 11-29 05:07:36 [model.py:733] Resolved architecture: Llama",
        "reads the model's configuration",
    ),
    (
        "(EngineCore pid=6) INFO 11-29 05:07:38 [core.py:133] Initializing a V1 LLM engine "
        "(v0.32.0) with config: model='M', load_format=auto",
        "starts its core, imports",
    ),
    (
        "(EngineCore pid=6) INFO 11-29 05:07:39 [cpu_model_runner.py:68] Starting to load model "
        "M...",
        "loads weights",
    ),
    (
        "\rLoading safetensors checkpoint shards:   0% Completed | 0/4 [00:00<?, ?it/s]",
        "loads weights, 0%",
    ),
    (
        "\rLoading safetensors checkpoint shards:  25% Completed | 1/4 [00:00<00:00, 13.30it/s]",
        "loads weights, 25%",
    ),
    (
        "(EngineCore pid=6) INFO 11-29 05:07:40 [default_loader.py:501] Loading weights took "
        "0.08 seconds",
        "compiles, makes its KV cache",
    ),
    (
        "(EngineCore pid=6) INFO 11-29 05:07:45 [core.py:402] init engine (profile, create kv "
        "cache, warmup model) took 2.49 s",
        "starts its server",
    ),
    ("INFO:     Application startup complete.", "ready"),
]
"""Lines of a log of vLLM 0.32, and how far it is after each."""

SOURCES = {
    "non-default args: ": ("vllm", "entrypoints/serve/utils/api_utils.py"),
    "Initializing a V1 LLM engine (v": ("vllm", "v1/engine/core.py"),
    "Starting to load model ": ("vllm", "v1/worker/gpu_model_runner.py"),
    "Loading weights took ": ("vllm", "model_executor/model_loader/default_loader.py"),
    "init engine (profile, create kv cache, warmup model) took ": ("vllm", "v1/engine/core.py"),
    "Application startup complete.": ("uvicorn", "lifespan/on.py"),
    SHARDS: ("vllm", "model_executor/model_loader/weight_utils.py"),
    "{desc}: {percentage:3.0f}% Completed": ("vllm", "model_executor/model_loader/weight_utils.py"),
}


def test_every_stage_of_a_start_is_seen_in_its_log() -> None:
    progress, seen = Progress(), []
    for line, _ in LOG:
        progress = progress.after(line)
        seen.append(str(progress))
    assert seen == [expected for _, expected in LOG]


def test_a_stage_that_is_over_does_not_come_back() -> None:
    """A model that drafts is loaded after the first one; adapters' files have shards, too."""
    progress = Progress(Stage.KV_CACHE)
    for line, _ in LOG[:8]:
        assert progress.after(line) is progress


def test_there_is_a_mark_and_a_text_for_every_stage() -> None:
    assert [Stage.STARTING, *MARKS.values()] == list(Stage)
    assert len({stage.text for stage in Stage}) == len(Stage)


@pytest.mark.parametrize("text", sorted({*MARKS, *SOURCES}))
def test_the_text_is_still_in_the_source_that_logs_it(text: str) -> None:
    package, name = SOURCES[text]
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / name).read_text()
    assert text in source


def test_the_cpu_backend_says_the_same_when_it_loads_a_model() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "v1/worker/cpu_model_runner.py").read_text()
    assert "Starting to load model " in source
