"""Which prompt KV belongs to, whoever mixed two of them up."""

from __future__ import annotations

import array
import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_pd_plugin.edge.identity import AdapterFingerprints

_TOKENS_AT_ONCE = 4096
"""A thread that hashes so many lets others run: the interpreter is free while it does."""


class PromptFingerprint:
    """All that the KV of a request's first tokens depends on, in 16 bytes.

    They cover the token ids, what the LoRA adapter contains and the multi-modal inputs, so that KV
    can never be used for another prompt, whoever mixed the two up. Made on the engine's own thread;
    a long prompt takes a millisecond or more, so that another one may hash it.
    """

    def __init__(self, request: Request, adapters: AdapterFingerprints | None = None) -> None:
        self._request = request
        self._adapters = adapters
        self._tokens = request.all_token_ids[:]
        self._context = self._look()
        self._last: tuple[int, tuple[bytes, ...], bytes] = (-1, (), b"")

    def look_again(self) -> None:
        """Take what the adapter contains now: it may have been loaded anew while the request has
        waited. On the engine's own thread."""
        self._context = self._look()

    def hash_ahead(self) -> None:
        """Do the work now for the whole prompt: it is asked for soon, and somewhere else."""
        self.of(len(self._tokens))

    def of(self, num_tokens: int) -> bytes:
        """Return the fingerprint of the first ``num_tokens``; any thread may ask."""
        context = self._context
        known, of_context, fingerprint = self._last
        if (known, of_context) == (num_tokens, context):
            return fingerprint
        digest = hashlib.blake2b(digest_size=16)
        tokens = self._tokens[:num_tokens]
        for start in range(0, len(tokens), _TOKENS_AT_ONCE):
            digest.update(array.array("q", tokens[start : start + _TOKENS_AT_ONCE]))
        for facts in context:
            digest.update(facts)
        fingerprint = digest.digest()
        self._last = num_tokens, context, fingerprint
        return fingerprint

    def _look(self) -> tuple[bytes, ...]:
        context = []
        if lora := self._request.lora_request:
            assert self._adapters is not None
            context.append(self._adapters.of(lora).encode())
        for feature in self._request.mm_features or ():
            position = feature.mm_position
            facts = (feature.identifier, position.offset, position.length)
            context.append(repr(facts).encode())
        return tuple(context)
