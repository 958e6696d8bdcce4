"""A consumer's stretches, and the blocks that their plans read."""

from __future__ import annotations

from collections.abc import Sequence

from tests.fakes.engines import full_group, make_kv_cache, make_layout, sliding_group
from vllm_pd_plugin.ids import HandoffId
from vllm_pd_plugin.mapping.route import find_route
from vllm_pd_plugin.memory.layout import BlockTables, Group, RankLayout, RankMemory, Region, Stretch
from vllm_pd_plugin.net.transport import ReadPlan
from vllm_pd_plugin.protocol import wire
from vllm_pd_plugin.transfer.stretches import Stretches

T = 4
"""Tokens in a block; a block has 32 bytes."""
BLOCK = 32
H = HandoffId("h")
FULL = [full_group("layers.0", "layers.1")]
INTERLEAVED = [full_group("layers.1", "layers.3"), full_group("layers.0", "layers.2")]
WINDOWED = [full_group("layers.0"), sliding_group(6, "layers.1")]


class Consumer:
    """A consumer's stretches: local block i of a table is 10 + i, remote block i is 50 + i.

    Every region is at a million times its number, locally at nothing more and remotely at 500,000.
    """

    def __init__(self, groups: Sequence[Group], num_tokens: int, first_token: int = 0) -> None:
        self.layout: RankLayout = make_layout(groups=groups)
        num_blocks = -(-num_tokens // T)
        layers = range(len(self.layout.layers))
        self.local: BlockTables = [[10 + i for i in range(num_blocks)] for _ in groups]
        self.remote: BlockTables = [[50 + i for i in range(num_blocks)] for _ in groups]
        self.local_regions = [Region(layer * 1_000_000, 99, BLOCK, BLOCK) for layer in layers]
        self.remote_regions = [
            Region(layer * 1_000_000 + 500_000, 99, BLOCK, BLOCK) for layer in layers
        ]
        self.num_tokens, self.first_token = num_tokens, first_token
        ours, theirs = (
            make_kv_cache(self.layout, RankMemory(tuple(regions), b""))
            for regions in (self.local_regions, self.remote_regions)
        )
        self.route = find_route(theirs, ours, 0)
        self.stretches = Stretches(
            self.layout,
            self.route,
            (self.local, self.local_regions),
            {0: self.remote_regions},
            first_token,
            num_tokens,
        )

    def tables(
        self, num_blocks: int | None = None, start: int = 0, shift: int = 0
    ) -> tuple[wire.TableSlice, ...]:
        """A slice of each block table; ``shift`` makes them those of another epoch."""
        return tuple(
            wire.TableSlice(start, tuple(block + shift for block in table[start:num_blocks]))
            for table in self.remote
        )

    def progress(
        self, base: int, tokens: int, layers: int, epoch: int = 0, shift: int = 0
    ) -> wire.Progress:
        """Progress with whole block tables, as long as ``tokens`` need."""
        tables = self.tables(-(-tokens // T), shift=shift)
        return wire.Progress(H, epoch, (wire.Written(base, tokens, layers),), tables)

    def seal(self, epoch: int = 0, num_tokens: int | None = None) -> wire.Seal:
        tokens = self.num_tokens if num_tokens is None else num_tokens
        return wire.Seal(H, epoch, tokens, self.tables())

    def taken(self) -> set[tuple[int, int]]:
        """Plan a stretch; return it as (layer by region, position in the block table)."""
        return set(places(self.plan()))

    def plan(self) -> ReadPlan | None:
        """Plan all that is final and was not planned before."""
        stretch = self.stretches.take()
        return None if stretch is None else self.plan_of(stretch)

    def plan_of(self, stretch: Stretch) -> ReadPlan:
        (plan,) = self.stretches.plan(stretch, self.route.shares).values()
        return plan

    def everything(self) -> list[tuple[int, int]]:
        groups = [group for group in self.layout.groups for _ in group.layers]
        return [
            (layer, position)
            for layer, group in enumerate(groups)
            for position in group.needed_blocks(self.first_token, self.num_tokens)
        ]


def places(plan: ReadPlan | None, shift: int = 0) -> list[tuple[int, int]]:
    """Which blocks a plan reads, as (layer by region, position), each checked on both sides."""
    if plan is None:
        return []
    found = []
    rows = zip(plan.local.tolist(), plan.remote.tolist(), plan.num_bytes.tolist(), strict=True)
    for local, remote, num_bytes in rows:
        assert num_bytes % BLOCK == 0
        for offset in range(0, num_bytes, BLOCK):
            layer, here = divmod(local + offset, 1_000_000)
            there = remote + offset - 500_000 - layer * 1_000_000
            position = here // BLOCK - 10
            assert there // BLOCK == 50 + position + shift, "the wrong block is read"
            found.append((layer, position))
    return sorted(found)


def blocks(layers: Sequence[int], positions: range) -> set[tuple[int, int]]:
    return {(layer, position) for layer in layers for position in positions}
