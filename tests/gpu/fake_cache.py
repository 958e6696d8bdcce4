"""A KV cache of five layers, as two kinds of attention have it, and prompts' KV for it.

Keys beside values in three layers, tokens before heads in memory; MLA in the two between them. The
blocks of the same prompt are other ones in the two engines.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable

import torch

from vllm_pd_plugin.codecs import ops_reference
from vllm_pd_plugin.codecs.codec import Codec, Part, encoding_of
from vllm_pd_plugin.codecs.ops import as_plane, part_of
from vllm_pd_plugin.memory.layout import BlockTables, Group, RankLayout

NUM_TOKENS = 301
NUM_BLOCKS = 40
_HEADS, _WIDTH = 4, 128
_LATENT, _ROPE = 512, 64
_DTYPE = torch.bfloat16
_KV_LAYERS = ("model.layers.0.attn", "model.layers.2.attn", "model.layers.4.attn")
_MLA_LAYERS = ("model.layers.1.attn", "model.layers.3.attn")
_KV_TOKENS, _MLA_TOKENS = 16, 64

_KV_SHAPE = (NUM_BLOCKS, _KV_TOKENS, _HEADS, 2 * _WIDTH)
_MLA_SHAPE = (NUM_BLOCKS, _MLA_TOKENS, _LATENT + _ROPE)
_ROW = _HEADS * 2 * _WIDTH

LAYOUT = RankLayout(
    (
        Group(
            "full", _KV_TOKENS, None, _KV_LAYERS, (_HEADS, _KV_TOKENS, 2 * _WIDTH), "bfloat16",
            (2 * _WIDTH, _ROW, 1),
            (Part.of_rows("key", _WIDTH, 0, _ROW), Part.of_rows("value", _WIDTH, _WIDTH, _ROW)),
        ),
        Group(
            "full", _MLA_TOKENS, None, _MLA_LAYERS, _MLA_SHAPE[1:], "bfloat16",
            (_LATENT + _ROPE, 1),
            (
                Part.of_rows("latent", _LATENT, 0, _LATENT + _ROPE),
                Part.of_rows("rope", _ROPE, _LATENT, _LATENT + _ROPE),
            ),
        ),
    ),
)  # fmt: skip


def tables(seed: int) -> BlockTables:
    """Return which blocks the prompt has, in each group; scattered, and never block 0."""
    draw = random.Random(seed)
    return tuple(
        draw.sample(range(1, NUM_BLOCKS), math.ceil(NUM_TOKENS / group.block_tokens))
        for group in LAYOUT.groups
    )


def kv_of(prompt: int, layer: str) -> torch.Tensor:
    """Return a prompt's KV in one layer, in rows of tokens: another for each prompt and layer."""
    generator = torch.Generator().manual_seed(1000 * prompt + LAYOUT.layers.index(layer))
    shape = _KV_SHAPE[2:] if layer in _KV_LAYERS else _MLA_SHAPE[2:]
    return torch.randn((NUM_TOKENS, *shape), generator=generator).to(_DTYPE)


@dataclasses.dataclass(frozen=True, slots=True)
class FakeCache:
    """caches: one a layer, as attention sees it."""

    caches: dict[str, torch.Tensor]

    @classmethod
    def allocate(cls, allocate: Callable[[int], torch.Tensor]) -> FakeCache:
        """allocate: returns so many bytes."""
        caches = {}
        for layer in LAYOUT.layers:
            shape = _KV_SHAPE if layer in _KV_LAYERS else _MLA_SHAPE
            memory = allocate(math.prod(shape) * _DTYPE.itemsize).view(_DTYPE).view(shape)
            caches[layer] = memory.transpose(1, 2) if layer in _KV_LAYERS else memory
        return cls(caches)

    def fill(self, value: float) -> None:
        for cache in self.caches.values():
            cache.fill_(value)

    def places(self, layer: str, blocks: BlockTables, tokens: range) -> tuple[torch.Tensor, ...]:
        """Return in which block, and where in it, each of some tokens is."""
        group = next(i for i, group in enumerate(LAYOUT.groups) if layer in group.layers)
        size, device = LAYOUT.groups[group].block_tokens, self.caches[layer].device
        numbers = [blocks[group][token // size] for token in tokens]
        within = [token % size for token in tokens]
        return torch.tensor(numbers, device=device), torch.tensor(within, device=device)

    def write(self, layer: str, places: tuple[torch.Tensor, ...], kv: torch.Tensor) -> None:
        """Write tokens' KV as an attention layer does."""
        numbers, within = places
        if layer in _KV_LAYERS:
            self.caches[layer][numbers, :, within] = kv
        else:
            self.caches[layer][numbers, within] = kv

    def copy_blocks(self, other: FakeCache, here: BlockTables, there: BlockTables) -> None:
        for group, ours, theirs in zip(LAYOUT.groups, here, there, strict=True):
            for layer in group.layers:
                self.caches[layer][list(ours)] = other.caches[layer][list(theirs)]

    def recode(self, blocks: BlockTables, codec: Codec) -> None:
        """Make of the prompt's KV what a codec brings; with one whose result does not depend on the
        pieces that it is sent in."""
        assert codec is Codec.INT8
        for group, table in zip(LAYOUT.groups, blocks, strict=True):
            chosen = torch.tensor(table)
            for layer in group.layers:
                for part in group.parts:
                    view = part_of(self.caches[layer], part)
                    encoding = encoding_of(codec, part)
                    heads = as_plane(self.caches[layer]).shape[1]
                    size = heads * encoding.stripe_bytes(NUM_TOKENS, part.width, 0)
                    slab = torch.zeros(size, dtype=torch.uint8)
                    how = (encoding.bits, encoding.group, encoding.by_channel, 0)
                    ops_reference.encode_blocks([view], chosen, NUM_TOKENS, *how, slab)
                    ops_reference.decode_blocks(slab, chosen, NUM_TOKENS, *how, [view])

    def differences(self, expected: FakeCache) -> list[str]:
        """Return in which layers how many elements differ."""
        found = []
        for layer, cache in self.caches.items():
            other = expected.caches[layer]
            count = int((cache.cpu().view(torch.int16) != other.view(torch.int16)).sum())
            if count:
                found.append(f"{count} of {cache.numel()} elements of {layer} are wrong")
        return found


def expected_after(
    prompt: int, codec: Codec, here: BlockTables, there: BlockTables, before: tuple[float, float]
) -> FakeCache:
    """Return what a consumer's cache must be after a handoff, every element of it.

    before: what its own cache, and the producer's, were filled with.
    """
    ours, theirs = (FakeCache.allocate(lambda n: torch.empty(n, dtype=torch.uint8)) for _ in "ab")
    ours.fill(before[0])
    theirs.fill(before[1])
    everything = range(NUM_TOKENS)
    for layer in LAYOUT.layers:
        for cache, blocks in ((ours, here), (theirs, there)):
            cache.write(layer, cache.places(layer, blocks, everything), kv_of(prompt, layer))
    if codec is Codec.RAW:
        ours.copy_blocks(theirs, here, there)  # with what lies behind the last token
    else:
        ours.recode(here, codec)
    return ours
