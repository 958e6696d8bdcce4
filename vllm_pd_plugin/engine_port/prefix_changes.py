"""What frontends can use of what vLLM says of its prefix cache."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.v1.kv_cache_interface import KVCacheSpecKind

from vllm_pd_plugin.engine_port.messages import Cleared, Removed, Stored

_WHOLE_PREFIX = (KVCacheSpecKind.FULL_ATTENTION.value, KVCacheSpecKind.MLA_ATTENTION.value)
"""Kinds of layers that need the whole prefix: where these have it, the others do."""


class PrefixChanges:
    """Knows which groups of blocks were told of; owned by the engine's own thread."""

    def __init__(self) -> None:
        self._groups: set[int | None] = set()

    def of(self, event: Any) -> Stored | Removed | Cleared | None:
        """Return what a frontend can use of an event: plain text, in layers that need all of it.

        What a LoRA adapter, a cache salt or an image had a part in is no plain text.
        """
        match event:
            case BlockStored():
                is_plain = not event.lora_name and not any(event.extra_keys or ())
                if event.kv_cache_spec_kind not in _WHOLE_PREFIX or not is_plain:
                    return None
                self._groups.add(event.group_idx)
                hashes, token_ids = tuple(event.block_hashes), tuple(event.token_ids)
                return Stored(event.parent_block_hash, hashes, token_ids, event.block_size)
            case BlockRemoved() if event.group_idx in self._groups:
                return Removed(tuple(event.block_hashes))
            case AllBlocksCleared():
                return Cleared()
            case _:
                return None
