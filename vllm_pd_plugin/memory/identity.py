"""What KV *is*: two engines' blocks mean the same only if all of this agrees. Pure.

Where KV lies is in ``layout``. Names and paths say nothing here: a model under another path, in
other files, or split over other ranks, is the same model.
"""

from __future__ import annotations

import dataclasses

import msgspec

from vllm_pd_plugin.codecs.codec import FLOATS
from vllm_pd_plugin.memory.probe import Sketch, bound, distances

UNKNOWN = "unknown:"
"""Begins a fingerprint that is equal to no other engine's; see ``Weights``."""


class Weights(msgspec.Struct, frozen=True):
    """Which weights, at three depths; see ``memory.weights``.

    sampled: over the names, shapes and types of all tensors as they are stored, and some of their
        bytes. Or what the operator has named them; or ``UNKNOWN`` and the engine's boot id, where
        they are not in files, or not any more what the files say.
    files: over the hashes that the Hub's cache names its files by; empty without.
    full: over all bytes; empty until that has been computed.
    """

    sampled: str
    files: str = ""
    full: str = ""

    @property
    def is_known(self) -> bool:
        """Say whether another engine can have them."""
        return not self.sampled.startswith(UNKNOWN)

    def is_like(self, other: Weights) -> bool:
        """Say whether they are the same, as far as both know."""
        if self.full and other.full:
            return self.full == other.full
        if self.files and self.files == other.files:
            return True
        return self.sampled == other.sampled

    def __str__(self) -> str:
        return self.full or self.sampled


class KvIdentity(msgspec.Struct, frozen=True):
    """architecture: the model's class. config: all that its configuration says besides.
    dtype: of activations, and of KV unless ``kv_cache_dtype`` says otherwise. Engines that differ
        in either can hand off, if the one can be made the other: ``mapping.match`` says so.
    kv_cache_dtype, quantization: as vLLM names them; two of one width may differ in meaning.
    rope, windows: how positions count, and how far layers look back.
    vllm: release line of the vLLM that computes it; empty where that is not known.
    probe: what it computes for the probe prompt; None where it has not, or computes something else
        by now.
    """

    architecture: str
    config: str
    weights: Weights
    dtype: str
    kv_cache_dtype: str
    quantization: str
    rope: str
    windows: str
    vllm: str = ""
    probe: Sketch | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """The first thing in which two engines' KV differs."""

    field: str
    ours: str
    theirs: str
    remedy: str

    def __str__(self) -> str:
        return f"its {self.field} {self.verb} {self.theirs}, expected {self.ours}; {self.remedy}"

    @property
    def verb(self) -> str:
        return "are" if self.field in ("weights", _ANSWERS) else "is"


_WEIGHTS_REMEDY = (
    "serve the same checkpoint on both; weights that are not in files, or were changed in place, "
    "need the option weights_id"
)
_REMEDIES = {
    "architecture": "serve the same model on both",
    "rope": "give both the same --hf-overrides and model files",
    "windows": "give both the same model files and --disable-sliding-window",
    "config": "serve the same model files, with the same --hf-overrides",
    "weights": _WEIGHTS_REMEDY,
    "quantization": "give both the same --quantization and checkpoint",
    "dtype": "give both the same --dtype",
    "kv_cache_dtype": "give both the same --kv-cache-dtype",
}
_CONVERTED = ("dtype", "kv_cache_dtype")
"""What may differ between two engines of which one hands off to the other."""
_FP8 = ("fp8", "fp8_e4m3")


_SAID_BY_VLLM = "config"
"""What the same files come to depends on vLLM, and on the transformers that it brings."""
_ANSWERS = "answers to the probe prompt"
_ANSWERS_REMEDY = (
    "one of them computes other KV from the same files: look at the revision, the quantization, "
    "the --hf-overrides and the vLLM of both. If all of that is alike, the devices round further "
    "apart than the bound allows: give one of two engines of one release line the connector's "
    "option probe=never"
)
_VERSIONS_REMEDY = (
    "engines of two release lines go together by their answers to the probe prompt only, and {} "
    "not computed it, or had its weights changed since (the log says why); run the same vLLM on "
    "both"
)


def difference(ours: KvIdentity, theirs: KvIdentity, is_strict: bool = False) -> Difference | None:
    """Return the first thing that differs, the most telling first; None where nothing does.

    is_strict: KV of another type is another; else it is one that may be converted, if the engines
        say so (``mapping.match``).
    Engines of two of vLLM's release lines must have computed the same, within a bound; of their
    configuration, what vLLM itself decides is not compared then.
    """
    are_mixed = ours.vllm != theirs.vllm and bool(ours.vllm and theirs.vllm)
    for field, remedy in _REMEDIES.items():
        if are_mixed and field == _SAID_BY_VLLM:
            continue
        here, there = getattr(ours, field), getattr(theirs, field)
        if not is_strict and field in _CONVERTED and _can_become(there, here):
            continue
        is_like = here.is_like(there) if isinstance(here, Weights) else here == there
        if not is_like:
            return Difference(field.replace("_", " "), *_told_apart(here, there), remedy)
    return _computed_apart(ours, theirs, are_mixed)


def _can_become(theirs: str, ours: str) -> bool:
    return (theirs in FLOATS and ours in FLOATS) or (theirs == "bfloat16" and ours in _FP8)


def _computed_apart(ours: KvIdentity, theirs: KvIdentity, are_mixed: bool) -> Difference | None:
    """Compare what both compute. Within one release line, only where both have computed it."""
    found = []
    if ours.probe and ours.probe.rows and theirs.probe and theirs.probe.rows:
        only_common = ours.kv_cache_dtype != theirs.kv_cache_dtype
        found = distances(ours.probe, theirs.probe, only_common)
    if not found:
        if not are_mixed:
            return None
        who = "this one has" if theirs.probe and theirs.probe.rows else "it has"
        return Difference("vLLM", ours.vllm, theirs.vllm, _VERSIONS_REMEDY.format(who))
    dtypes = (ours.dtype, ours.kv_cache_dtype, theirs.dtype, theirs.kv_cache_dtype)
    allowed = bound(dtypes, are_mixed)
    if found[0].relative <= allowed:
        return None
    apart = ", ".join(str(distance) for distance in found)
    both = " and ".join(sorted({ours.dtype, theirs.dtype}))
    between = f"{both}, vLLM {ours.vllm} and {theirs.vllm}"
    return Difference(
        _ANSWERS, f"{allowed:g} at most ({between})", f"{apart} away", _ANSWERS_REMEDY
    )


def _told_apart(ours: Weights | str, theirs: Weights | str) -> tuple[str, str]:
    """Return both in words, at the depth at which they differ."""
    if isinstance(ours, Weights) and isinstance(theirs, Weights):
        if ours.full and theirs.full:
            return ours.full, theirs.full
        return ours.sampled, theirs.sampled
    return str(ours), str(theirs)
