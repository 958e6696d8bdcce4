"""Fingerprints of weights as they are stored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from vllm_pd_plugin.errors import UnsupportedError
from vllm_pd_plugin.memory.weights import (
    full_fingerprint,
    hub_fingerprint,
    sampled_fingerprint,
    stored_tensors,
)

Tensors = Mapping[str, NDArray[np.float32]]
CHOOSER = np.random.default_rng(1)
WEIGHTS: Tensors = {
    "embed": CHOOSER.standard_normal((2000, 64), np.float32),
    "layers.0.q": CHOOSER.standard_normal((64, 64), np.float32),
    "layers.1.q": CHOOSER.standard_normal((64, 64), np.float32),
    "norm": np.ones(64, np.float32),
}


def write(path: Path, tensors: Tensors) -> Path:
    """Write a file of the format safetensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, values in tensors.items():
        offsets = [start, start + values.nbytes]
        header[name] = {"dtype": "F32", "shape": values.shape, "data_offsets": offsets}
        start += values.nbytes
    text = json.dumps(header).encode()
    data = b"".join(values.tobytes() for values in tensors.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def sampled(*files: Path) -> str:
    return sampled_fingerprint(stored_tensors(files))


def full(*files: Path) -> str | None:
    return full_fingerprint(stored_tensors(files))


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return write(tmp_path / "original" / "model.safetensors", WEIGHTS)


def test_another_path_is_the_same(tmp_path: Path, original: Path) -> None:
    moved = write(tmp_path / "elsewhere" / "weights.safetensors", WEIGHTS)
    assert sampled(moved) == sampled(original)
    assert full(moved) == full(original)


def test_other_files_and_another_order_are_the_same(tmp_path: Path, original: Path) -> None:
    names = list(WEIGHTS)
    first = write(tmp_path / "a-00001.safetensors", {n: WEIGHTS[n] for n in names[2:]})
    second = write(tmp_path / "a-00002.safetensors", {n: WEIGHTS[n] for n in reversed(names[:2])})
    assert sampled(second, first) == sampled(original)
    assert full(first, second) == full(original)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_tensor_that_was_trained_on_is_found_by_its_samples(
    tmp_path: Path, original: Path, name: str
) -> None:
    trained = write(tmp_path / "m.safetensors", {**WEIGHTS, name: WEIGHTS[name] * np.float32(1.01)})
    assert sampled(trained) != sampled(original)


def test_one_row_that_was_changed_is_found_by_the_full_hash(tmp_path: Path, original: Path) -> None:
    embed = WEIGHTS["embed"].copy()
    embed[1234] += 1
    changed = write(tmp_path / "m.safetensors", {**WEIGHTS, "embed": embed})
    assert full(changed) != full(original)


@pytest.mark.parametrize("change", ["name", "shape"])
def test_names_and_shapes_count(tmp_path: Path, original: Path, change: str) -> None:
    others = dict(WEIGHTS)
    norm = others.pop("norm")
    others |= {"norm.weight": norm} if change == "name" else {"norm": norm.reshape(8, 8)}
    changed = write(tmp_path / "m.safetensors", others)
    assert sampled(changed) != sampled(original)
    assert full(changed) != full(original)


def test_files_of_another_format_count_as_a_whole(tmp_path: Path) -> None:
    for folder, content in (("a", b"x" * 5000), ("b", b"x" * 5000), ("c", b"x" * 4999 + b"y")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "pytorch_model.bin").write_bytes(content)
    a, b, c = (tmp_path / folder / "pytorch_model.bin" for folder in "abc")
    assert sampled(a) == sampled(b)
    assert full(a) == full(b) != full(c)


def test_hashing_stops_when_it_is_told_to(original: Path) -> None:
    assert full_fingerprint(stored_tensors([original]), lambda seconds: False) is None


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 8, b"\xff" * 8, b"\x02\0\0\0\0\0\0\0{]", b'\x07\0\0\0\0\0\0\0{"a":1}'],
)
def test_what_is_no_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UnsupportedError, match=r"model\.safetensors"):
        stored_tensors([path])


def test_a_file_that_is_too_short_is_refused(original: Path) -> None:
    original.write_bytes(original.read_bytes()[:-100])
    with pytest.raises(UnsupportedError, match="ends before"):
        full(original)


def test_the_hub_s_cache_knows_its_files(tmp_path: Path) -> None:
    blobs = [tmp_path / "blobs" / (digit * 64) for digit in "ab"]
    blobs[0].parent.mkdir()
    snapshot = tmp_path / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    links = []
    for number, blob in enumerate(blobs):
        blob.write_bytes(b"")
        links.append(snapshot / f"model-{number}.safetensors")
        links[-1].symlink_to(blob)
    assert hub_fingerprint(links) == hub_fingerprint(links[::-1]) != ""
    assert hub_fingerprint(links[:1]) != hub_fingerprint(links)
    assert hub_fingerprint([*links, tmp_path / "model.safetensors"]) == ""
    assert hub_fingerprint([]) == ""
