"""Which prompt KV belongs to, whoever mixed two of them up."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_pd_plugin.edge.identity import AdapterFingerprints


def prompt_fingerprint(
    request: Request, num_tokens: int, adapters: AdapterFingerprints | None = None
) -> bytes:
    """Return 16 bytes that stand for all that the KV of the first ``num_tokens`` depends on.

    They cover the token ids, what the LoRA adapter contains and the multi-modal inputs, so that KV
    can never be used for another prompt, whoever mixed the two up.
    """
    tokens = np.asarray(request.all_token_ids[:num_tokens], dtype=np.int64)
    digest = hashlib.blake2b(tokens.tobytes(), digest_size=16)
    lora = request.lora_request
    if lora:
        assert adapters is not None
        digest.update(adapters.of(lora).encode())
    for feature in request.mm_features or ():
        position = feature.mm_position
        digest.update(repr((feature.identifier, position.offset, position.length)).encode())
    return digest.digest()
