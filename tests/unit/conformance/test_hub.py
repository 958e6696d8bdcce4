"""The project's models under the names that vLLM's tests ask a hub for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download, try_to_load_from_cache

from tests.conformance.hub import ADAPTERS, MAX_POSITIONS, MODELS, add, make


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 64, "max_position_embeddings": 10}')
    (folder / "model.safetensors").write_text("weights")
    return folder


def test_the_hubs_client_finds_a_model_by_name_and_without_a_network(
    tmp_path: Path, model: Path
) -> None:
    add(tmp_path / "hub", "some/model", model)
    found = snapshot_download("some/model", cache_dir=tmp_path / "hub", local_files_only=True)
    assert (Path(found) / "model.safetensors").read_text() == "weights"
    file = try_to_load_from_cache("some/model", "config.json", cache_dir=tmp_path / "hub")
    assert isinstance(file, str)
    assert Path(file).parent == Path(found)


def test_a_snapshot_has_a_longer_context_and_leaves_the_model_alone(
    tmp_path: Path, model: Path
) -> None:
    before = (model / "config.json").read_text()
    snapshot = add(tmp_path / "hub", "some/model", model)
    config = json.loads((snapshot / "config.json").read_text())
    assert config == {"hidden_size": 64, "max_position_embeddings": MAX_POSITIONS}
    assert (model / "config.json").read_text() == before


def test_a_model_that_was_made_anew_takes_the_place_of_the_old_one(
    tmp_path: Path, model: Path
) -> None:
    add(tmp_path / "hub", "some/model", model)
    newer = tmp_path / "newer"
    newer.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (newer / name).write_text('{"hidden_size": 128}')
    snapshot = add(tmp_path / "hub", "some/model", newer)
    assert json.loads((snapshot / "config.json").read_text())["hidden_size"] == 128
    assert (snapshot / "model.safetensors").resolve() == newer / "model.safetensors"
    assert (snapshot / "tokenizer.json").exists()


def test_every_name_is_in_the_cache(tmp_path: Path, model: Path) -> None:
    home = make(tmp_path / "home", dict.fromkeys(MODELS, lambda: model))
    for name in [*ADAPTERS, *(name for names in MODELS.values() for name in names)]:
        snapshot_download(name, cache_dir=home / "hub", local_files_only=True)
