"""Fingerprints of a model's weights as they are stored; torch is not needed.

A fingerprint covers, of every tensor, its name, shape, type and bytes (some of them, or all), in
the order of the names: another path, another split into files, or another number of ranks that
share them, gives the same. Files that are not safetensors count as one tensor each.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from vllm_pd_plugin.errors import UnsupportedError

_MAX_HEADER_BYTES = 100 * 2**20  # the format's own limit
_SAMPLES, _SAMPLE_BYTES = 8, 128
_CHUNK_BYTES = 4 * 2**20
_BLOB = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class StoredTensor:
    """A tensor in a file: bytes [start, start + num_bytes)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    path: Path
    start: int

    @property
    def head(self) -> bytes:
        return json.dumps([self.name, self.dtype, self.shape, self.num_bytes]).encode()


def stored_tensors(files: Sequence[Path]) -> list[StoredTensor]:
    """Return the tensors of some files, by name.

    Raises:
        UnsupportedError: a file is not what its name says.
        OSError: one cannot be read.
    """
    tensors: list[StoredTensor] = []
    for path in files:
        if path.suffix == ".safetensors":
            tensors += _of_safetensors(path)
        else:
            size = path.stat().st_size
            tensors.append(StoredTensor(path.name, "file", (size,), size, path, 0))
    return sorted(tensors)


def _of_safetensors(path: Path) -> list[StoredTensor]:
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 0 < header_bytes <= _MAX_HEADER_BYTES:
            raise UnsupportedError(f"{path.name} has no header of safetensors")
        try:
            header = json.loads(file.read(header_bytes))
            return [
                StoredTensor(
                    name,
                    str(entry["dtype"]),
                    tuple(entry["shape"]),
                    entry["data_offsets"][1] - entry["data_offsets"][0],
                    path,
                    8 + header_bytes + entry["data_offsets"][0],
                )
                for name, entry in header.items()
                if name != "__metadata__"
            ]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UnsupportedError(f"{path.name} is malformed: {error}") from error


def sampled_fingerprint(tensors: Sequence[StoredTensor]) -> str:
    """Return a fingerprint from some bytes of each tensor, at places that its name decides.

    Costs a few reads for each; finds whatever was trained, not one row that was changed.
    """
    digest = hashlib.blake2b(digest_size=16)
    with _Files() as files:
        for tensor in tensors:
            digest.update(tensor.head)
            for offset, length in _samples(tensor):
                digest.update(files.read(tensor.path, tensor.start + offset, length))
    return f"sampled:{digest.hexdigest()}"


def full_fingerprint(
    tensors: Sequence[StoredTensor], pause: Callable[[float], bool] = lambda seconds: True
) -> str | None:
    """Return a fingerprint of all bytes.

    pause: called after each stretch of work with how long that took; returns whether to go on.

    Returns:
        None when it was told not to go on.
    """
    digest = hashlib.blake2b(digest_size=16)
    with _Files() as files:
        for tensor in tensors:
            digest.update(tensor.head)
            began = time.perf_counter()
            for offset in range(0, tensor.num_bytes, _CHUNK_BYTES):
                length = min(_CHUNK_BYTES, tensor.num_bytes - offset)
                digest.update(files.read(tensor.path, tensor.start + offset, length))
                now = time.perf_counter()
                if not pause(now - began):
                    return None
                began = time.perf_counter()
    return f"full:{digest.hexdigest()}"


def hub_fingerprint(files: Sequence[Path]) -> str:
    """Return a fingerprint from what the Hub's cache calls its files, which is their SHA-256; empty
    where a file is not in such a cache."""
    names = sorted(path.resolve().name for path in files)
    if not names or not all(_BLOB.fullmatch(name) for name in names):
        return ""
    return f"files:{hashlib.blake2b(''.join(names).encode(), digest_size=16).hexdigest()}"


def _samples(tensor: StoredTensor) -> list[tuple[int, int]]:
    """Return (offset, length) of what is read of a tensor."""
    if tensor.num_bytes <= _SAMPLES * _SAMPLE_BYTES:
        return [(0, tensor.num_bytes)]
    room = tensor.num_bytes - _SAMPLE_BYTES
    seeds = (hashlib.blake2b(f"{i} {tensor.name}".encode(), digest_size=8) for i in range(_SAMPLES))
    return [(int.from_bytes(seed.digest(), "little") % room, _SAMPLE_BYTES) for seed in seeds]


class _Files:
    """Open files, one at a time."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._descriptor = -1

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def read(self, path: Path, offset: int, length: int) -> bytes:
        """Return exactly so many bytes. Raises UnsupportedError where there are fewer."""
        if path != self._path:
            self._close()
            self._descriptor, self._path = os.open(path, os.O_RDONLY | os.O_CLOEXEC), path
        data = os.pread(self._descriptor, length, offset)
        while len(data) < length:
            more = os.pread(self._descriptor, length - len(data), offset + len(data))
            if not more:
                raise UnsupportedError(f"{path.name} ends before its last tensor")
            data += more
        return data

    def _close(self) -> None:
        if self._path is not None:
            os.close(self._descriptor)
            self._path = None
