"""What an engine computes for one fixed prompt, small enough to be sent along; pure.

Two engines of equal configuration and files may still compute different KV: another revision, other
scaling of positions, another quantisation, another release of vLLM. So each computes the same
prompt once when it starts, and keeps a *sketch* of the KV of three layers and of the logits after
the prompt. Sketches are compared, and not versions.

A sketch is a count sketch (Charikar, Chen and Farach-Colton, 2002): each element, with a sign, is
added to one of ``BUCKETS`` sums; sign and sum follow from where the element is in the model (token,
head of the whole model, channel), not from where it lies. So neither block size, nor layout, nor
the type that it is stored in matters, and the sketches of tensor parallel ranks add up to that of
the whole. The distance of two sketches estimates that of what they were made of, within a tenth.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

PROMPT_TOKENS = 48
BUCKETS = 128
_STORED = np.dtype("<f4")

_BOUNDS = {"float32": (1e-4, 2e-4), "float16": (0.02, 0.04), "bfloat16": (0.1, 0.2)}
"""By type: within one of vLLM's release lines, and between two. Several times what rounding at
other places was measured to come to on 30 layers (``benchmarks.probe``); deeper models round more.
"""
_BOUND_OF_BYTES = (0.2, 0.4)
"""Of whatever has 8 bits."""

_MOST_LOGIT = 1e30

Sums = npt.NDArray[np.float64]
"""``[BUCKETS]``."""


class Row(msgspec.Struct, frozen=True, array_like=True):
    """One thing that was sketched. name: such as ``layer 0 key``. sums: little-endian float32."""

    name: str
    sums: bytes


class Sketch(msgspec.Struct, frozen=True):
    """What an engine computes for ``prompt``."""

    rows: tuple[Row, ...]


class Distance(msgspec.Struct, frozen=True, order=True):
    """How far one row of two sketches is apart: of the longer one's length, 0 to 2; infinite where
    they cannot be compared."""

    relative: float
    name: str

    def __str__(self) -> str:
        return f"{self.relative:.2g} in {self.name}"


def prompt(vocab_size: int) -> list[int]:
    """Return the prompt: tokens from all over the vocabulary but its ends, where those with a
    meaning of their own are."""
    edge = vocab_size // 10
    places = np.arange(PROMPT_TOKENS, dtype=np.uint64)
    return [edge + int(word) % (vocab_size - 2 * edge) for word in _scramble(places)]


def probed_layers(num_layers: int) -> list[int]:
    """Return the places of the layers that are sketched, in the order of the forward pass."""
    return sorted({0, num_layers // 2, num_layers - 1})


def sketch(values: npt.NDArray[np.floating[Any]], first_head: int = 0) -> Sums:
    """Return the sketch of some heads.

    values: ``[tokens, heads, channels]``. first_head: which head of the model the first is.
    """
    tokens, heads, channels = values.shape
    token, head, channel = np.ogrid[:tokens, first_head : first_head + heads, :channels]
    places = (token << 40 | head << 24 | channel).astype(np.uint64).ravel()
    words = _scramble(places)
    signs = np.where(words >> np.uint64(63), -1.0, 1.0)
    buckets = (words % np.uint64(BUCKETS)).astype(np.intp)
    signed = values.astype(np.float64).ravel() * signs
    sums: Sums = np.bincount(buckets, signed, minlength=BUCKETS).astype(np.float64)
    return sums


def sketch_logits(logits: npt.NDArray[np.floating[Any]]) -> Sums:
    """Return the sketch of one token's logits ``[vocabulary]``, or of what differs from them by a
    constant. Tokens that a model rules out have none: an infinity, or what stands for one."""
    kept = np.abs(logits) < _MOST_LOGIT
    mean = logits.mean(dtype=np.float64, where=kept) if kept.any() else 0.0
    return sketch(np.where(kept, logits - mean, 0.0)[None, None, :])


def together(ranks: Sequence[Mapping[str, Sums]]) -> Sketch:
    """Return the sketch of an engine from those of its ranks: each has what it computed, but for
    what another has as well."""
    sums: dict[str, Sums] = {}
    for rank in ranks:
        for name, part in rank.items():
            sums[name] = sums[name] + part if name in sums else part
    return Sketch(tuple(Row(name, sums[name].astype(_STORED).tobytes()) for name in sorted(sums)))


def distances(ours: Sketch, theirs: Sketch, only_common: bool = False) -> list[Distance]:
    """Return how far each row is apart, the farthest first.

    only_common: rows that only one of them has do not count: KV of 8 bits has none.
    """
    one, other = _by_name(ours.rows), _by_name(theirs.rows)
    names = one.keys() & other.keys() if only_common else one.keys() | other.keys()
    found = [Distance(_distance(one.get(name), other.get(name)), name) for name in names]
    return sorted(found, reverse=True)


def bound(dtypes: Iterable[str], are_mixed: bool) -> float:
    """Return how far two engines of equal weights may be apart.

    dtypes: in which both compute, and keep KV. are_mixed: they are of two release lines of vLLM.
    """
    return max(_BOUNDS.get(dtype, _BOUND_OF_BYTES)[are_mixed] for dtype in dtypes)


def _by_name(rows: Iterable[Row]) -> dict[str, bytes]:
    return {row.name: row.sums for row in rows}


def _distance(ours: bytes | None, theirs: bytes | None) -> float:
    if ours is None or theirs is None or not len(ours) == len(theirs) == BUCKETS * 4:
        return float("inf")
    if ours == theirs:
        return 0.0
    one, other = (np.frombuffer(sums, _STORED).astype(np.float64) for sums in (ours, theirs))
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return float("inf")
    length = max(np.linalg.norm(one), np.linalg.norm(other))
    return float(np.linalg.norm(one - other) / length) if length else 0.0


def _scramble(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return 64 bits for each that look random (SplitMix64; Steele, Lea and Flood, 2014)."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
