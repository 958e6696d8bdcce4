"""Once for each peer: from two descriptions, what each of our ranks takes from which of theirs."""

from __future__ import annotations

import dataclasses

from vllm_pd_plugin.codecs.codec import FLOATS
from vllm_pd_plugin.mapping.checks import check_description, incompatible
from vllm_pd_plugin.mapping.direct import Direct, Heads, find_direct
from vllm_pd_plugin.mapping.kv_cache import (
    FP8,
    ITEM_BYTES,
    EngineKvCache,
    KvCacheGroup,
    KvCacheLayout,
    KvCacheSpec,
    Place,
    heads_of,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Slab:
    """Written down by the source: ``[layers, tokens, heads, channels]``, exactly those that are
    wanted, without gaps; the channels are ``KvCacheSpec.channels``, one after the other.

    dtype: on the wire; the source converts to it from its own, and we from it to ours.
    token_bytes: what a token of one layer takes.
    """

    dtype: str
    token_bytes: int

    def num_bytes(self, num_layers: int, num_tokens: int) -> int:
        return num_layers * num_tokens * self.token_bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Share:
    """What one of our ranks takes from one of theirs: some layers and heads, of all tokens that
    are wanted (``KvCacheGroup.needed_tokens`` of our group).

    source_rank: which rank of theirs has it.
    source_group, group: whose block tables say in which blocks, on their side and on ours.
    source_block_tokens: tokens of a block on their side.
    layers, source_regions, regions: names, and places among the regions of both ranks.
    heads: of the model. source_head, head: which the first of them is, in their page and in ours.
    is_whole: whether that is every head of their page and of ours.
    direct: how it is read as it lies; None where it cannot be.
    slab: how it is written down; None where what is in a page is not known. One of both is there.
    shared_by: our ranks that hold the same, this one included; where several share a host, the
        bytes need to come there only once.
    """

    source_rank: int
    source_group: int
    group: int
    source_block_tokens: int
    layers: tuple[str, ...]
    source_regions: tuple[int, ...]
    regions: tuple[int, ...]
    heads: range
    source_head: int
    head: int
    is_whole: bool
    direct: Direct | None
    slab: Slab | None
    shared_by: tuple[int, ...]


def match(
    theirs: EngineKvCache, ours: EngineKvCache, allow_fp8: bool = False, is_whole: bool = True
) -> tuple[tuple[Share, ...], ...]:
    """Return for each of our ranks what it takes: every head of every layer that it holds, from
    one of their ranks each.

    Where several of theirs hold the same heads, those of ours that want them take turns.

    allow_fp8: whether bfloat16 may become vLLM's fp8, which is lossy.
    is_whole: whether ``ours`` has all layers; else it is what a rank of ours can say.

    Raises:
        PeerError: the two do not fit, or one contradicts itself; names both sides' values.
    """
    check_description(ours, "our")
    check_description(theirs, "their")
    their_places, our_places = theirs.places(), ours.places()
    _check_same_layers(their_places, our_places, is_whole)
    shares: list[list[Share]] = [[] for _ in range(ours.num_ranks)]
    together: dict[tuple[int, int, int, int], list[str]] = {}
    for layer, place in our_places.items():
        there = their_places[layer]
        together.setdefault((place.stage, place.group, there.stage, there.group), []).append(layer)
    for (stage, group, their_stage, their_group), layers in together.items():
        pair = _Pair(layers[0], theirs, theirs.groups[their_group], ours, ours.groups[group])
        pair.check(allow_fp8)
        for tp_rank in range(ours.tensor_parallel_size):
            first_rank = stage * ours.tensor_parallel_size
            shared_by = tuple(first_rank + other for other in pair.holders_of_the_same(tp_rank))
            for source, heads in pair.sources(tp_rank):
                share = Share(
                    source_rank=their_stage * theirs.tensor_parallel_size + source,
                    source_group=their_group,
                    group=group,
                    source_block_tokens=pair.there.layout.block_tokens,
                    layers=tuple(layers),
                    source_regions=tuple(their_places[layer].region for layer in layers),
                    regions=tuple(our_places[layer].region for layer in layers),
                    heads=heads,
                    source_head=heads.start - pair.heads_there(source).start,
                    head=heads.start - pair.heads_here(tp_rank).start,
                    is_whole=heads == pair.heads_there(source) == pair.heads_here(tp_rank),
                    direct=pair.direct(source, tp_rank, heads),
                    slab=pair.slab(len(heads)),
                    shared_by=shared_by,
                )
                shares[first_rank + tp_rank].append(share)
    return tuple(map(tuple, shares))


@dataclasses.dataclass(frozen=True, slots=True)
class _Pair:
    """A group of theirs and one of ours that have layers in common; layer: one of those."""

    layer: str
    theirs: EngineKvCache
    there: KvCacheGroup
    ours: EngineKvCache
    here: KvCacheGroup

    def check(self, allow_fp8: bool) -> None:
        """Refuse a pair that does not mean the same, or cannot be converted. Raises PeerError."""
        for field in KvCacheSpec.__struct_fields__:
            there, here = getattr(self.there.spec, field), getattr(self.here.spec, field)
            if there != here:
                raise incompatible(
                    f"{self.layer} is of another model: its {field} is {there} there, {here} here"
                )
        there, here = self.there.layout.dtype, self.here.layout.dtype
        if there == here or {there, here} <= FLOATS.keys():
            return
        if (there, here) != ("bfloat16", FP8):
            raise incompatible(f"{self.layer} is {there} there and cannot become {here}, as here")
        if not allow_fp8:
            raise incompatible(
                f"{self.layer} is {there} there, {here} here; to make it that is lossy and has to "
                "be allowed"
            )

    def heads_there(self, tp_rank: int) -> range:
        return heads_of(self.here.spec.num_heads, self.theirs.tensor_parallel_size, tp_rank)

    def heads_here(self, tp_rank: int) -> range:
        return heads_of(self.here.spec.num_heads, self.ours.tensor_parallel_size, tp_rank)

    def holders_of_the_same(self, tp_rank: int) -> range:
        """Return which tensor parallel ranks of ours hold the same heads as one of them."""
        holders = self._holders(self.ours)
        first = tp_rank // holders * holders
        return range(first, first + holders)

    def sources(self, tp_rank: int) -> list[tuple[int, range]]:
        """Return which tensor parallel ranks of theirs one of ours takes which heads from.

        Of several that hold a head each serves as many of those who want it, give or take one.
        """
        their_holders, holders = self._holders(self.theirs), self._holders(self.ours)
        turn = self.ours.data_parallel_rank * holders + tp_rank % holders
        found: list[tuple[int, range]] = []
        for head in self.heads_here(tp_rank):
            first = head * self.theirs.tensor_parallel_size // self.here.spec.num_heads
            source = first + turn % their_holders
            if found and found[-1][0] == source:
                found[-1] = source, range(found[-1][1].start, head + 1)
            else:
                found.append((source, range(head, head + 1)))
        return found

    def _holders(self, engine: EngineKvCache) -> int:
        """Return how many tensor parallel ranks hold the same head."""
        return max(1, engine.tensor_parallel_size // self.here.spec.num_heads)

    def direct(self, source: int, tp_rank: int, heads: range) -> Direct | None:
        """Return how some heads are read as they lie, from a rank of theirs by one of ours.

        Raises:
            PeerError: they cannot be, and what is in the pages is not known.
        """
        heads_there, heads_here = self.heads_there(source), self.heads_here(tp_rank)
        there, here = self.there.layout, self.here.layout
        if not there.parts or not here.parts:
            return self._whole(heads_there, heads_here)
        found = find_direct(
            Heads(there, heads.start - heads_there.start, len(heads)),
            Heads(here, heads.start - heads_here.start, len(heads)),
        )
        if found is None and heads == heads_there == heads_here and there.is_like(here):
            return Direct.of_whole_pages(here)  # whatever lies between what is in them
        return found

    def slab(self, num_heads: int) -> Slab | None:
        """Return how so many heads are written down, where what is in the pages is known."""
        there, here = self.there.layout, self.here.layout
        if not there.parts or not here.parts:
            return None
        dtype = min(here.dtype, there.dtype, key=ITEM_BYTES.__getitem__)
        width = sum(width for _, width in self.here.spec.channels)
        return Slab(dtype, num_heads * width * ITEM_BYTES[dtype])

    def _whole(self, heads_there: range, heads_here: range) -> Direct:
        """Return how pages are read whose inside is not known: whole, where they are alike.

        Raises:
            PeerError: they are not.
        """
        there, here = self.there.layout, self.here.layout
        pages = [
            (layout.page_format, layout.dtype, layout.block_tokens, layout.page_bytes, heads)
            for layout, heads in ((there, heads_there), (here, heads_here))
        ]
        if pages[0] != pages[1] or there.parts or here.parts:
            raise incompatible(
                f"{self.layer} lies in pages whose inside is not known, which have to be alike: "
                f"{_spell(there, heads_there)} there, {_spell(here, heads_here)} here"
            )
        return Direct.of_whole_pages(here)


def _spell(layout: KvCacheLayout, heads: range) -> str:
    name = layout.page_format or ("known" if layout.parts else "without a name")
    return (
        f"format {name}, {layout.dtype}, {layout.block_tokens} tokens, {layout.page_bytes} bytes, "
        f"heads {heads.start} to {heads.stop - 1}"
    )


def _check_same_layers(theirs: dict[str, Place], ours: dict[str, Place], is_whole: bool) -> None:
    """Refuse a model with other layers. Raises PeerError."""
    if missing := [layer for layer in ours if layer not in theirs]:
        lacking, has = "theirs", missing[0]
    elif is_whole and (missing := [layer for layer in theirs if layer not in ours]):
        lacking, has = "ours", missing[0]
    else:
        return
    raise incompatible(
        f"another model: theirs has {len(theirs)} layers, ours {len(ours)}; {lacking} has no {has}"
    )
