"""Hand a request's KV from one engine of the model to another, and look at every byte."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import numpy as np

from tests.mapping.memory import Engine, Numbers, heads_on
from vllm_pd_plugin.mapping.direct import Direct
from vllm_pd_plugin.mapping.kv_cache import ITEM_BYTES
from vllm_pd_plugin.mapping.match import Share, Slab, match
from vllm_pd_plugin.mapping.reads import plan_reads


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """Two engines and a request: the consumer has [0, first_token) and wants [0, num_tokens).

    cut: what is read as it lies is read in two reads, every other layer's up to about this token.
    prefers_slabs: whether what could be read as it lies is written down all the same.
    """

    source: Engine
    local: Engine
    first_token: int
    num_tokens: int
    cut: int = 0
    prefers_slabs: bool = False


def check(pair: Pair) -> Counter[str]:
    """Hand over, compare with what one engine would have, and return what happened how often."""
    source, local = pair.source, pair.local
    seen: Counter[str] = Counter()
    written = [source.written(rank) for rank in range(source.told.num_ranks)]
    of_rank = match(source.told, local.told, allow_fp8=True)
    assert len(of_rank) == local.told.num_ranks
    for rank, shares in enumerate(of_rank):
        handover = Handover(pair, rank, written)
        for share in shares:
            assert rank in share.shared_by
            handover.take(share)
        _compare(pair, rank, handover)
        seen += handover.seen
    _check_turns(pair, of_rank)
    return seen


class Handover:
    """What one rank of the consumer reads, literally as its shares say."""

    def __init__(self, pair: Pair, rank: int, written: list[Numbers]) -> None:
        self._pair, self._rank, self._written = pair, rank, written
        self.memory = pair.local.empty(rank)
        self.times = np.zeros(len(self.memory), np.int64)
        """How often each byte here was written."""
        self._read = [np.zeros(len(memory), np.int64) for memory in written]
        """How often each byte there was read."""
        self.read_as_they_lie: set[int] = set()
        """Which of our groups were, in part or as a whole."""
        self.read_whole: set[int] = set()
        """Of which of them pages were, with whatever lies between what is in them."""
        self.seen: Counter[str] = Counter()

    @property
    def most_reads(self) -> int:
        return max(int(times.max(initial=0)) for times in self._read)

    def take(self, share: Share) -> None:
        pair = self._pair
        group = pair.local.told.groups[share.group]
        tokens = group.needed_tokens(pair.first_token, pair.num_tokens)
        if share.direct is None or (share.slab is not None and pair.prefers_slabs):
            assert share.slab is not None
            self._read_slab(share, share.slab, tokens)
        else:
            self._read_as_it_lies(share, share.direct, tokens)

    def _read_as_it_lies(self, share: Share, direct: Direct, tokens: range) -> None:
        source, local = self._pair.source, self._pair.local
        cut = min(max(direct.cover(range(0, self._pair.cut)).stop, tokens.start), tokens.stop)
        first = [range(tokens.start, cut) if n % 2 else tokens for n in range(len(share.layers))]
        rest = [range(part.stop, tokens.stop) for part in first]
        for wanted in (first, rest):
            plan = plan_reads(
                share,
                wanted,
                (source.tables, source.ranks[share.source_rank].regions),
                (local.tables, local.ranks[self._rank].regions),
            )
            for there, here, size in zip(plan.remote, plan.local, plan.num_bytes, strict=True):
                a, b, n = int(there), int(here), int(size)
                self.memory[b : b + n] = self._written[share.source_rank][a : a + n]
                self.times[b : b + n] += 1
                self._read[share.source_rank][a : a + n] += 1
            self.seen += Counter(descriptors=plan.num_descriptors, direct_bytes=plan.total_bytes)
        self.read_as_they_lie.add(share.group)
        if direct == Direct.of_whole_pages(local.told.groups[share.group].layout):
            self.read_whole.add(share.group)
        self.seen["direct"] += 1

    def _read_slab(self, share: Share, slab: Slab, tokens: range) -> None:
        wire = pack(self._pair.source, share, slab, tokens, self._written, self._read)
        assert wire.size == slab.num_bytes(len(share.layers), len(tokens))
        self.unpack(share, slab, tokens, wire)
        self.seen += Counter(slab=1, slab_bytes=wire.size)

    def unpack(self, share: Share, slab: Slab, tokens: range, wire: Numbers) -> None:
        """Write a slab into our pages."""
        local = self._pair.local
        heads = range(share.head, share.head + len(share.heads))
        counted = local.counted(share.group, tokens)
        numbers = _elements_of(wire.reshape(-1, ITEM_BYTES[slab.dtype]), slab.dtype)
        numbers = numbers.reshape(len(share.layers), len(tokens), len(heads), -1)
        nth = np.arange(ITEM_BYTES[local.told.groups[share.group].layout.dtype])
        for layer, region in enumerate(share.regions):
            done = 0
            for index, part in enumerate(local.parts[share.group]):
                places = local.places(self._rank, share.group, region, index, heads, counted)
                values = numbers[layer, :, :, done : done + part.width]
                done += part.width
                np.add.at(self.times, places[..., None] + nth, 1)
                self.memory[places[..., None] + nth] = values[..., None] + nth


def pack(
    source: Engine,
    share: Share,
    slab: Slab,
    tokens: range,
    written: list[Numbers],
    read: list[Numbers],
) -> Numbers:
    """Return the slab that the source writes down: the number of each of its bytes."""
    heads = range(share.source_head, share.source_head + len(share.heads))
    counted = source.counted(share.source_group, tokens)
    dtype = source.told.groups[share.source_group].layout.dtype
    layers = []
    for region in share.source_regions:
        channels = []
        for part in range(len(source.parts[share.source_group])):
            places = source.places(
                share.source_rank, share.source_group, region, part, heads, counted
            )
            places = places[..., None] + np.arange(ITEM_BYTES[dtype])
            np.add.at(read[share.source_rank], places, 1)
            channels.append(_elements_of(written[share.source_rank][places], dtype))
        layers.append(np.concatenate(channels, axis=2))
    numbers = np.stack(layers)
    return (numbers[..., None] + np.arange(ITEM_BYTES[slab.dtype])).ravel()


def _elements_of(numbers: Numbers, dtype: str) -> Numbers:
    """Return which elements some bytes are, ``[..., bytes]``; each has all of them, in order."""
    nth = np.arange(ITEM_BYTES[dtype])
    assert (numbers[..., 0] % 8 == 0).all(), "bytes of nothing, or of half an element"
    assert (numbers == numbers[..., :1] + nth).all(), "bytes of different elements"
    return numbers[..., 0]


def _compare(pair: Pair, rank: int, handover: Handover) -> None:
    """Every byte that is needed was written once and is the right one; of all others none was,
    but for those that were read with one in a chunk, and none of what the consumer had before."""
    local, times = pair.local, handover.times
    may = np.zeros(len(times), bool)
    must = np.zeros(len(times), bool)
    for group, told in enumerate(local.told.groups):
        needed = told.needed_tokens(pair.first_token, pair.num_tokens)
        for places, numbers in local.contents(rank, group, needed):
            assert (handover.memory[places] == numbers).all(), "a wrong element"
            must[places] = True
        chunk, larger = sorted((told.layout.block_tokens, _their_block(pair, group)))
        if group in handover.read_as_they_lie and larger % chunk == 0:
            start = max(pair.first_token, needed.start // chunk * chunk)
            spare = range(start, -(-needed.stop // chunk) * chunk)
            for places, _ in local.contents(rank, group, spare):
                may[places] = True
        if group in handover.read_whole and needed:
            may |= _whole_pages(local, rank, group, needed)
    assert (times[must] == 1).all(), "an element was not written once"
    assert (times[may] <= 1).all(), "a byte was written twice"
    assert not times[~(may | must)].any(), "what nobody wanted was written"
    assert handover.most_reads <= 1, "a byte was read twice"


def _their_block(pair: Pair, group: int) -> int:
    """Return the block size that the layers of a group of ours have on the other side."""
    layers = {layer for stage in pair.local.told.groups[group].layout.layers for layer in stage}
    sizes = {
        other.layout.block_tokens
        for other in pair.source.told.groups
        if layers & {layer for stage in other.layout.layers for layer in stage}
    }
    (size,) = sizes
    return size


def _whole_pages(engine: Engine, rank: int, group: int, tokens: range) -> Numbers:
    """Return which bytes are in the pages of some tokens, with what fills the pages up."""
    told = engine.told.groups[group]
    stage = rank // engine.told.tensor_parallel_size
    first = sum(len(other.layout.layers[stage]) for other in engine.told.groups[:group])
    inside = np.zeros(len(engine.empty(rank)), bool)
    for region in engine.ranks[rank].regions[first : first + len(told.layout.layers[stage])]:
        for position in {token // told.layout.block_tokens for token in tokens}:
            at = region.address(engine.tables[group][position])
            inside[at : at + region.block_bytes] = True
    return inside


def _check_turns(pair: Pair, of_rank: tuple[tuple[Share, ...], ...]) -> None:
    """Of the source's ranks that hold the same head of the same layer, none serves two ranks more
    than another; and ranks that are told to share hold the same."""
    served: dict[tuple[str, int], Counter[int]] = {}
    for shares in of_rank:
        for share in shares:
            for layer, head in itertools.product(share.layers, share.heads):
                served.setdefault((layer, head), Counter())[share.source_rank] += 1
            for other in share.shared_by:
                held = {(s.layers, s.heads) for s in of_rank[other]}
                assert (share.layers, share.heads) in held, "a rank shares what it has not"
    tp = pair.source.told.tensor_parallel_size
    holders = {
        (layer, head): [
            stage * tp + rank
            for rank in range(tp)
            if head in heads_on(group.spec.num_heads, tp, rank)
        ]
        for group in pair.source.told.groups
        for stage, layers in enumerate(group.layout.layers)
        for layer, head in itertools.product(layers, range(group.spec.num_heads))
    }
    for what, counts in served.items():
        assert counts.keys() <= set(holders[what]), "a head was taken from who has it not"
        each = [counts[holder] for holder in holders[what]]
        assert max(each) - min(each) <= 1, "one source serves more than its part"
