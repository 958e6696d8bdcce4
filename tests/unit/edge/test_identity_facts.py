"""What this engine's KV is: what its configuration decides, and what becomes of it when weights or
adapters are changed."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_pd_plugin.ids import new_incarnation
from vllm_pd_plugin.memory.identity import difference
from vllm_pd_plugin.memory.probe import BUCKETS, together

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    import torch
    from safetensors.torch import save_file
    from vllm.config.load import LoadConfig

    from tests.fakes.consumer import FakeRequest
    from vllm_pd_plugin.edge.identity import AdapterFingerprints, LocalIdentity, _rope
    from vllm_pd_plugin.edge.prompts import PromptFingerprint

LONG = {"rope_type": "longrope", "original_max_position_embeddings": 4096}
PLAIN = {"rope_type": "default"}


@pytest.mark.parametrize(
    ("text", "limits", "is_same"),
    [
        (SimpleNamespace(rope_parameters=LONG), (4096, 8192), False),
        (SimpleNamespace(rope_parameters=LONG), (8192, 16_384), True),
        (SimpleNamespace(rope_parameters=PLAIN), (4096, 8192), True),
        (SimpleNamespace(attn_temperature_tuning=True), (8192, 65_536), False),
        (SimpleNamespace(), (8192, 65_536), True),
    ],
    ids=["long or short factors", "long factors both", "plain", "tuned or not", "nothing"],
)
def test_the_longest_prompt_counts_where_the_model_goes_by_it(
    text: Any, limits: tuple[int, int], is_same: bool
) -> None:
    one, other = (_rope(text, limit) for limit in limits)
    assert (one == other) is is_same


# --- of an engine ----------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file({"embedding": torch.arange(64.0).view(8, 8)}, folder / "model.safetensors")
    return folder


def identity(
    checkpoint: Path, weights_id: str = "", load_format: str = "auto", **changes: Any
) -> LocalIdentity:
    """changes: of what vLLM's configuration says of the model, or ``cache_dtype``."""
    cache = SimpleNamespace(cache_dtype=changes.pop("cache_dtype", "auto"))
    model: dict[str, Any] = {
        "model": str(checkpoint), "model_weights": "", "revision": None,
        "hf_config": SimpleNamespace(to_dict=lambda: {"hidden_size": 8}),
        "hf_text_config": SimpleNamespace(), "architectures": ["Model"], "dtype": torch.bfloat16,
        "quantization": None, "max_model_len": 4096,
    }  # fmt: skip
    config: Any = SimpleNamespace(
        load_config=LoadConfig(load_format=load_format),
        model_config=SimpleNamespace(**model | changes),
        cache_config=cache,
    )
    return LocalIdentity(config, weights_id, new_incarnation())


def unlike(one: LocalIdentity, other: LocalIdentity) -> str:
    """Return the field in which they differ; empty where nothing does."""
    found = difference(one.kv, other.kv, is_strict=True)
    return found.field if found else ""


def test_engines_of_one_checkpoint_have_the_same_kv(checkpoint: Path) -> None:
    assert unlike(identity(checkpoint), identity(checkpoint)) == ""


FACTS: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architectures": ["Another"]}, "architecture"),
    "configuration": (
        {"hf_config": SimpleNamespace(to_dict=lambda: {"hidden_size": 9})},
        "config",
    ),
    "the configuration's own dtype": (
        {"hf_config": SimpleNamespace(to_dict=lambda: {"hidden_size": 8, "dtype": "x"})},
        "",
    ),
    "dtype": ({"dtype": torch.float32}, "dtype"),
    "what auto is taken for": ({"cache_dtype": "bfloat16"}, ""),
    "kv cache dtype": ({"cache_dtype": "fp8_e5m2"}, "kv cache dtype"),
    "quantization": ({"quantization": "fp8"}, "quantization"),
    "rope": ({"hf_text_config": SimpleNamespace(rope_theta=1e6)}, "rope"),
    "window": ({"hf_text_config": SimpleNamespace(sliding_window=256)}, "windows"),
    "no window": ({"disable_sliding_window": True}, "windows"),
    "name of the weights": ({"weights_id": "mine"}, "weights"),
}
"""What is changed in one engine, and the field in which its KV then differs."""


@pytest.mark.parametrize("name", FACTS)
def test_each_fact_counts(checkpoint: Path, name: str) -> None:
    changes, field = FACTS[name]
    assert unlike(identity(checkpoint), identity(checkpoint, **changes)) == field


def test_fp8_is_what_vllm_takes_it_for(checkpoint: Path) -> None:
    fp8, e4m3, e5m2 = (
        identity(checkpoint, cache_dtype=name) for name in ("fp8", "fp8_e4m3", "fp8_e5m2")
    )
    assert unlike(fp8, e4m3) == ""
    assert unlike(fp8, e5m2) == "kv cache dtype"


def test_weights_that_are_in_no_files_are_nobody_else_s(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", "vllm_pd_plugin"):
        one, other = (identity(checkpoint, load_format="dummy") for _ in range(2))
    assert unlike(one, other) == "weights"
    assert "--load-format dummy" in caplog.text
    assert "weights_id" in caplog.text
    one, other = (identity(checkpoint, "mine", load_format="dummy") for _ in range(2))
    assert unlike(one, other) == ""


def test_weights_that_are_changed_in_place_are_nobody_else_s(checkpoint: Path) -> None:
    one, other = identity(checkpoint), identity(checkpoint)
    hashes = [each.hashed("full:as they were in the files") for each in (one, other)]
    assert None not in hashes
    for change in (one.changing, one.changed, one.changed):
        before = one.kv
        assert change() == one.kv != before
        assert unlike(one, other) == "weights"
    other.changed()
    assert unlike(one, other) == "weights"


def test_a_hash_of_weights_that_are_no_more_says_nothing(checkpoint: Path) -> None:
    """It was begun before they were changed, and ends after."""
    one, other = identity(checkpoint), identity(checkpoint)
    one.changed()
    kv = one.kv
    for each in (one, other):
        each.hashed("full:the same")
    assert one.kv == kv
    assert unlike(one, other) == "weights"


def test_changed_weights_that_were_named_are_equal_after_as_many_changes(checkpoint: Path) -> None:
    """An update of a whole fleet."""
    one, other = (identity(checkpoint, "mine") for _ in range(2))
    one.changed()
    assert unlike(one, other) == "weights"
    other.changed()
    assert unlike(one, other) == ""


SUMS = {"logits": np.ones(BUCKETS)}


def test_what_an_engine_computes_is_known_where_every_rank_has_computed_it(
    checkpoint: Path,
) -> None:
    engine = identity(checkpoint)
    assert engine.kv.probe is None
    for ranks in ([None], [SUMS, None], [None, SUMS]):
        engine.probed(ranks)
        assert engine.kv.probe is None
    engine.probed([SUMS, SUMS])
    assert engine.kv.probe == together([{"logits": 2 * np.ones(BUCKETS)}])


def test_what_an_engine_has_computed_says_nothing_of_weights_that_were_changed_since(
    checkpoint: Path,
) -> None:
    for change in ("changing", "changed"):
        engine = identity(checkpoint, "mine")
        engine.probed([SUMS])
        assert engine.kv.probe is not None
        getattr(engine, change)()
        assert engine.kv.probe is None


def test_reading_all_weights_changes_nothing_of_what_an_engine_computes(checkpoint: Path) -> None:
    engine = identity(checkpoint)
    engine.probed([SUMS])
    kv = engine.hashed("full:1")
    assert kv is not None
    assert kv.probe is not None


def test_an_engine_says_of_which_release_line_its_vllm_is(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version, line in (("0.32.1+cpu", "0.32"), ("0.31.0", "0.31"), ("dev", "")):
        monkeypatch.setattr("vllm.version.__version__", version)
        assert identity(checkpoint).kv.vllm == line


# --- of adapters -----------------------------------------------------------------------------


def write_adapter(folder: Path, number: float = 1.0, rank: int = 8) -> Any:
    """Return what a request says of the adapter there."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
    save_file({"lora_A": torch.tensor([[1.0, number]])}, folder / "adapter_model.safetensors")
    return SimpleNamespace(lora_path=str(folder), lora_int_id=1)


def test_an_adapter_is_what_it_contains(tmp_path: Path) -> None:
    known = AdapterFingerprints(new_incarnation())
    one = known.of(write_adapter(tmp_path / "one"))
    assert AdapterFingerprints(new_incarnation()).of(write_adapter(tmp_path / "copy")) == one
    assert known.of(write_adapter(tmp_path / "another", number=1.5)) != one
    assert known.of(write_adapter(tmp_path / "rank", rank=16)) != one


def test_an_adapter_is_looked_at_anew_when_it_was_loaded_again(tmp_path: Path) -> None:
    known = AdapterFingerprints(new_incarnation())
    adapter = write_adapter(tmp_path / "adapter")
    one = known.of(adapter)
    write_adapter(tmp_path / "adapter", number=1.5)
    assert known.of(adapter) == one  # vLLM goes on with what it has loaded
    known.reloaded(2)
    assert known.of(adapter) == one
    known.reloaded(1)
    assert known.of(adapter) != one


def test_a_prompt_is_of_the_adapter_that_is_loaded_now(tmp_path: Path) -> None:
    known = AdapterFingerprints(new_incarnation())
    request: Any = FakeRequest("r", [1, 2, 3])
    request.lora_request = write_adapter(tmp_path / "adapter")
    prompt = PromptFingerprint(request, known)
    prompt.hash_ahead()
    before = prompt.of(3)
    write_adapter(tmp_path / "adapter", number=1.5)
    known.reloaded(1)
    assert prompt.of(3) == before
    prompt.look_again()
    assert prompt.of(3) == PromptFingerprint(request, known).of(3) != before


def test_an_adapter_that_cannot_be_read_is_nobody_else_s(tmp_path: Path) -> None:
    missing: Any = SimpleNamespace(lora_path=str(tmp_path / "missing"), lora_int_id=1)
    one, other = (AdapterFingerprints(new_incarnation()).of(missing) for _ in range(2))
    assert one != other


def test_the_same_prompt_under_another_adapter_is_another(tmp_path: Path) -> None:
    known = AdapterFingerprints(new_incarnation())
    adapters = [None, write_adapter(tmp_path / "one"), write_adapter(tmp_path / "two", number=2.0)]
    fingerprints = set()
    for adapter in adapters:
        request: Any = FakeRequest("r", [1, 2, 3])
        request.lora_request = adapter
        fingerprints.add(PromptFingerprint(request, known).of(3))
    assert len(fingerprints) == len(adapters)
