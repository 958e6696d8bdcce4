"""Say which prompt KV belongs to, and which bytes it is, whoever mixed two of them up."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_pd_plugin.codecs.ops import as_plane, digest_blocks
from vllm_pd_plugin.memory.layout import BlockTables, Group

if TYPE_CHECKING:
    from vllm.v1.request import Request


def prompt_digest(request: Request, num_tokens: int) -> bytes:
    """Return a 16-byte digest of all that the KV of the first ``num_tokens`` depends on.

    It covers the token ids, the LoRA adapter and the multi-modal inputs, so that KV can never be
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


def kv_digest(
    groups: Sequence[Group],
    caches: Sequence[torch.Tensor],
    tables: BlockTables,
    first_token: int,
    num_tokens: int,
) -> bytes:
    """Return a digest of the blocks that a consumer of tokens [first_token, num_tokens) needs, in
    every layer of one rank: 8 bytes for each group.

    caches: one for each layer, in the order of the groups' layers; see ``as_plane``.
    """
    digests = []
    layers = iter(caches)
    for group, table in zip(groups, tables, strict=True):
        planes = [as_plane(next(layers)) for _ in group.layers]
        blocks = [table[i] for i in group.needed_blocks(first_token, num_tokens)]
        digests.append(
            digest_blocks(planes, torch.tensor(blocks, dtype=torch.int64, device=planes[0].device))
        )
    together: bytes = torch.cat(digests).cpu().numpy().tobytes()
    return together
