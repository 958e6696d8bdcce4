"""Digests of bytes: what blocks of a cache hold, and what a piece holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_pd_plugin.codecs import ops
from vllm_pd_plugin.memory.layout import BlockTables, Group


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
        planes = [ops.as_plane(next(layers)) for _ in group.layers]
        if not planes:  # another pipeline stage has them
            continue
        blocks = [table[i] for i in group.needed_blocks(first_token, num_tokens)]
        digests.append(
            ops.digest_blocks(
                planes, torch.tensor(blocks, dtype=torch.int64, device=planes[0].device)
            )
        )
    together: bytes = torch.cat(digests).cpu().numpy().tobytes()
    return together


def slab_digest(slab: torch.Tensor) -> bytes:
    """Return the digest of a piece's bytes, 8 of them."""
    plane = slab.view(1, 1, 1, -1)
    first = torch.zeros(1, dtype=torch.int64, device=slab.device)
    digest: bytes = ops.digest_blocks([plane], first).cpu().numpy().tobytes()
    return digest
