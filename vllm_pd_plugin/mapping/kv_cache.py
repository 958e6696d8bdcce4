"""What an engine's KV cache means and how it lies, over all of its ranks.

An engine is one data parallel rank; each of those has a control channel and a description of its
own. Rank ``r`` of an engine is tensor parallel rank ``r % tp`` of pipeline stage ``r // tp``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec

from vllm_pd_plugin.codecs.codec import FLOATS, Part
from vllm_pd_plugin.errors import HandoffError, Reason
from vllm_pd_plugin.memory.layout import Group, RankLayout, RankMemory

FP8 = "fp8_e4m3"
"""vLLM's name of the KV cache type; PyTorch may call what such a cache has ``uint8``."""

ITEM_BYTES = {**FLOATS, FP8: 1}
"""Element types that can be taken apart, and their bytes."""


class KvCacheSpec(msgspec.Struct, frozen=True):
    """What a group's KV *means*, on whatever engine (vLLM's ``KVCacheSpec``).

    num_heads: KV heads of the whole model; 1 where all attention heads share one row (MLA).
    channels: what a head has of a token, in this order, and how many channels each is:
        ``(("key", 128), ("value", 128))``, ``(("latent", 512), ("rope", 64))``.
    window: tokens that a sliding window looks back on, the current one included; None for others.
    """

    kind: Literal["full", "sliding_window", "mla", "mamba"]
    num_heads: int
    channels: tuple[tuple[str, int], ...]
    window: int | None = None


class KvCacheLayout(msgspec.Struct, frozen=True):
    """How a group's KV *lies* (vLLM's ``KVCacheLayout``, and how it is divided among ranks).

    A *page* is one layer's block on one rank.

    dtype: of the elements, see ``ITEM_BYTES``; of a page that is not taken apart, any name.
    block_tokens: tokens in a block of vLLM's block tables.
    page_bytes: all of it, with what fills it up.
    layers: for each pipeline stage the names of its layers, in the order of their regions.
    page_format: names the page's inside where that is not known; pages of one name are alike.
    parts: the page's inside, one for each of ``KvCacheSpec.channels``; empty where not known. A
        block that is made of several blocks of the attention kernel is tiles of so many tokens.
    head_stride: elements from one head to the next, in every part.
    """

    dtype: str
    block_tokens: int
    page_bytes: int
    layers: tuple[tuple[str, ...], ...]
    page_format: str = ""
    parts: tuple[Part, ...] = ()
    head_stride: int = 0

    def is_like(self, other: KvCacheLayout) -> bool:
        """Say whether pages of both lie alike, whichever layers they are of."""
        return msgspec.structs.replace(other, layers=self.layers) == self


class KvCacheGroup(msgspec.Struct, frozen=True):
    """Layers that share one block table."""

    spec: KvCacheSpec
    layout: KvCacheLayout

    def needed_tokens(self, first_token: int, num_tokens: int) -> range:
        """Return the tokens of which a consumer needs KV, that has [0, first_token) and wants
        [0, num_tokens).

        It then computes token ``num_tokens - 1`` again, so a window reaches back from that token.
        A Mamba state is that after all tokens of its block, and stands for all before it.

        Raises:
            HandoffError: a Mamba state is wanted of tokens that do not end with a block.
        """
        first = first_token
        if self.spec.window is not None:
            first = max(first, num_tokens - self.spec.window)
        if self.spec.kind == "mamba":
            block = self.layout.block_tokens
            if num_tokens % block:
                raise HandoffError(
                    Reason.MISSING_BLOCKS,
                    f"a Mamba state after {num_tokens} tokens is wanted; there is one after every "
                    f"{block}",
                )
            first = max(first, num_tokens - block)
        return range(first, max(first, num_tokens))


class Place(NamedTuple):
    """Where a layer is: its pipeline stage, its group, and which region of a rank there it has."""

    stage: int
    group: int
    region: int


class EngineKvCache(msgspec.Struct, frozen=True):
    """An engine's KV cache, and how it is divided among the ranks.

    data_parallel_rank: which of several engines of one deployment this is; engines of different
        ranks take what several sources have from different ones.
    """

    tensor_parallel_size: int
    groups: tuple[KvCacheGroup, ...]
    data_parallel_rank: int = 0

    @property
    def pipeline_parallel_size(self) -> int:
        return len(self.groups[0].layout.layers)

    @property
    def num_ranks(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @classmethod
    def seen_by_rank(
        cls, layout: RankLayout, memory: RankMemory, place: RankPlace, data_parallel_rank: int = 0
    ) -> EngineKvCache:
        """Return what a rank can say: of the layers it knows only those of its own stage, and
        nothing of how a group lies that has none there."""
        groups, first = [], 0
        for group in layout.groups:
            page_bytes = memory.regions[first].block_bytes if group.layers else 1
            groups.append(_group_of(group, page_bytes, place))
            first += len(group.layers)
        return cls(place.tensor_parallel_size, tuple(groups), data_parallel_rank)

    @classmethod
    def merged(cls, stages: Sequence[EngineKvCache]) -> EngineKvCache:
        """Return an engine's from what a rank of each of its pipeline stages can say."""
        groups = []
        for of_stages in zip(*(stage.groups for stage in stages), strict=True):
            known = next((g for g in of_stages if any(g.layout.layers)), of_stages[0])
            layers = tuple(group.layout.layers[number] for number, group in enumerate(of_stages))
            layout = msgspec.structs.replace(known.layout, layers=layers)
            groups.append(KvCacheGroup(known.spec, layout))
        return msgspec.structs.replace(stages[0], groups=tuple(groups))

    def layers_of(self, stage: int) -> list[str]:
        """Return a pipeline stage's layers in the order of their regions."""
        return [layer for group in self.groups for layer in group.layout.layers[stage]]

    def places(self) -> dict[str, Place]:
        """Return where each layer is. A rank's regions come group by group, as its layers do."""
        places = {}
        for stage in range(self.pipeline_parallel_size):
            regions = 0
            for index, group in enumerate(self.groups):
                for layer in group.layout.layers[stage]:
                    places[layer] = Place(stage, index, regions)
                    regions += 1
        return places


class RankPlace(NamedTuple):
    """Which rank of an engine of which size: its stage, and its tensor parallel rank in that."""

    stage: int
    tensor_parallel_rank: int
    num_stages: int
    tensor_parallel_size: int

    @property
    def rank(self) -> int:
        return self.stage * self.tensor_parallel_size + self.tensor_parallel_rank

    @property
    def num_ranks(self) -> int:
        return self.num_stages * self.tensor_parallel_size


def _group_of(group: Group, page_bytes: int, place: RankPlace) -> KvCacheGroup:
    spec = KvCacheSpec(
        group.kind,
        group.model_heads or group.heads,
        tuple((part.kind, part.width) for part in group.parts) or group.channels,
        group.window,
    )
    layers: list[tuple[str, ...]] = [()] * place.num_stages
    layers[place.stage] = group.layers
    inside = f"{list(group.block_shape)} by {list(group.block_strides)}"
    layout = KvCacheLayout(
        dtype=group.dtype,
        block_tokens=group.block_tokens,
        page_bytes=page_bytes,
        layers=tuple(layers),
        page_format="" if group.parts else inside,
        parts=group.parts,
        head_stride=group.block_strides[0] if len(group.block_strides) > 2 else 0,
    )
    return KvCacheGroup(spec, layout)


def heads_of(num_heads: int, tensor_parallel_size: int, rank: int) -> range:
    """Return the KV heads that a tensor parallel rank has.

    As in vLLM's ``QKVParallelLinear``: equal shares, in order; with more ranks than heads each
    has one head, and neighbours have the same.
    """
    first = rank * num_heads // tensor_parallel_size
    return range(first, first + max(1, num_heads // tensor_parallel_size))
