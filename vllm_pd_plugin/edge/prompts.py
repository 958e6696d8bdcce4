"""Which prompt KV belongs to, whoever mixed two of them up."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from vllm.v1.request import Request


def prompt_fingerprint(request: Request, num_tokens: int) -> bytes:
    """Return 16 bytes that stand for all that the KV of the first ``num_tokens`` depends on.

    They cover the token ids, the LoRA adapter and the multi-modal inputs, so that KV can never be
    used for another prompt, whoever mixed the two up.
    """
    tokens = np.asarray(request.all_token_ids[:num_tokens], dtype=np.int64)
    digest = hashlib.blake2b(tokens.tobytes(), digest_size=16)
    lora = request.lora_request
    digest.update(repr((lora.lora_name, lora.lora_path) if lora else None).encode())
    for feature in request.mm_features or ():
        position = feature.mm_position
        digest.update(repr((feature.identifier, position.offset, position.length)).encode())
    return digest.digest()
