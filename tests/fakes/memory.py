"""KV memory, and what a prompt's KV is."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vllm_pd_plugin.memory.layout import BlockTables, RankLayout, Region

BLOCK_TOKENS = 4
BLOCK_BYTES = 32
TOKEN_BYTES = BLOCK_BYTES // BLOCK_TOKENS
_NUM_BLOCKS = 64
_MAX_TOKENS = 64


def kv_of(prompt: int, num_layers: int, num_tokens: int) -> NDArray[np.uint8]:
    """A prompt's KV, bytes ``[num_layers, num_tokens, TOKEN_BYTES]``: the same at every call,
    another for every prompt, layer and token, and that of a prefix is its prefix."""
    assert num_tokens <= _MAX_TOKENS
    return np.stack([_layer_kv(prompt, layer)[:num_tokens] for layer in range(num_layers)])


@functools.cache
def _layer_kv(prompt: int, layer: int) -> NDArray[np.uint8]:
    generator = np.random.default_rng((prompt, layer))
    return generator.integers(0, 256, (_MAX_TOKENS, TOKEN_BYTES), dtype=np.uint8)


class FakeMemory:
    """The KV cache of one rank: for each layer of its layout an array of zeros, 64 blocks long.

    block_bytes: of each layer.

    Layers are numbered as their regions are.
    """

    def __init__(self, layout: RankLayout, block_bytes: int = BLOCK_BYTES) -> None:
        self.layout = layout
        self.num_layers = len(layout.layers)
        self.caches = [
            np.zeros((_NUM_BLOCKS, block_bytes), np.uint8) for _ in range(self.num_layers)
        ]
        self.regions = tuple(
            Region(cache.ctypes.data, _NUM_BLOCKS, block_bytes, block_bytes)
            for cache in self.caches
        )

    def spans(self) -> list[tuple[int, int]]:
        """What a transport registers: each layer's address and bytes."""
        return [(cache.ctypes.data, cache.nbytes) for cache in self.caches]

    def fill(self, blocks: Sequence[int], value: int, layers: Sequence[int] | None = None) -> None:
        """Set every byte of some blocks, in some layers or in all."""
        for layer in range(self.num_layers) if layers is None else layers:
            self.caches[layer][list(blocks)] = value

    def holds(self, blocks: Sequence[int], value: int) -> bool:
        return all(bool((cache[list(blocks)] == value).all()) for cache in self.caches)

    def write_kv(self, prompt: int, blocks: BlockTables, tokens: range, layer: int) -> None:
        """Write a prompt's KV of some tokens in one layer, as a forward pass does."""
        kv = kv_of(prompt, self.num_layers, tokens.stop)[layer]
        cache, table = self.caches[layer], blocks[self.group_of(layer)]
        for token in tokens:
            block, place = table[token // BLOCK_TOKENS], token % BLOCK_TOKENS
            cache[block, place * TOKEN_BYTES : (place + 1) * TOKEN_BYTES] = kv[token]

    def kv_in(self, layer: int, blocks: Sequence[int]) -> NDArray[np.uint8]:
        """What some blocks hold in one layer, bytes ``[num_tokens, TOKEN_BYTES]``."""
        return self.caches[layer][list(blocks)].reshape(-1, TOKEN_BYTES)

    def holds_kv(self, prompt: int, blocks: BlockTables, num_tokens: int) -> bool:
        """Say whether blocks hold the KV of a prompt's first tokens in every layer."""
        kv = kv_of(prompt, self.num_layers, num_tokens)
        return all(
            np.array_equal(self.kv_in(layer, blocks[self.group_of(layer)])[:num_tokens], kv[layer])
            for layer in range(self.num_layers)
        )

    def digest(self, blocks: BlockTables, first_token: int, num_tokens: int) -> bytes:
        """Stand in for ``digest.kv_digest``."""
        digest = hashlib.blake2b(digest_size=16)
        for layer, cache in enumerate(self.caches):
            group = self.group_of(layer)
            needed = self.layout.groups[group].needed_blocks(first_token, num_tokens)
            digest.update(cache[[blocks[group][i] for i in needed]].tobytes())
        return digest.digest()

    def group_of(self, layer: int) -> int:
        """The KV cache group of a layer."""
        sizes = [len(group.layers) for group in self.layout.groups]
        return int(np.searchsorted(np.cumsum(sizes), layer, side="right"))
