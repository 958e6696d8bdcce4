"""Per request: which of a handoff's KV is final at its producer, and which has been asked for.

A stretch is what has become final since the last read was planned. Pure, as ``plan`` is.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_pd_plugin.errors import HandoffError, Reason
from vllm_pd_plugin.ids import BlockId
from vllm_pd_plugin.memory.layout import BlockTables, EngineLayout, Group, Region, Stretch
from vllm_pd_plugin.net.transport import ReadPlan
from vllm_pd_plugin.protocol import wire
from vllm_pd_plugin.transfer.plan import plan_reads


class Stretches:
    """One fetch on one rank: learns from the producer's messages, plans the reads.

    The consumer has KV for tokens [0, first_token) and wants [0, num_tokens) in ``blocks``.
    """

    def __init__(
        self,
        layout: EngineLayout,
        local: tuple[BlockTables, Sequence[Region]],
        remote_regions: Sequence[Region],
        first_token: int,
        num_tokens: int,
    ) -> None:
        self._groups = layout.groups
        self._order = layout.forward_order()
        self._group_of = [group for group in layout.groups for _ in group.layers]
        self._local = local
        self._remote_regions = remote_regions
        self._first_token = first_token
        self._num_tokens = num_tokens
        self._begin(0)

    def _begin(self, epoch: int) -> None:
        self.epoch = epoch
        self._tables: list[list[BlockId]] = [[] for _ in self._groups]
        wanted = [g.needed_blocks(self._first_token, self._num_tokens) for g in self._group_of]
        self._wanted = wanted
        """Positions in the block table that are still to be asked for, for each layer."""
        self.wanted: Stretch = tuple(wanted)
        self._final = [positions.start for positions in wanted]
        """End of those of them that are final at the producer."""

    def learn(self, message: wire.Progress | wire.Seal) -> bool:
        """Take in what the producer says; a new epoch voids all before it, an old one is ignored.

        Returns False when a message before this one is missing: the tables have a gap.

        Raises:
            HandoffError: the producer sealed fewer tokens than it had offered.
        """
        if message.epoch < self.epoch:
            return True
        if message.epoch > self.epoch:
            self._begin(message.epoch)
        if not self._extend(message.tables):
            return False
        if isinstance(message, wire.Seal) and message.num_tokens < self._num_tokens:
            raise HandoffError(
                Reason.MISSING_BLOCKS,
                f"sealed with {message.num_tokens} tokens, offered {self._num_tokens}",
            )
        for place, layer in enumerate(self._order):
            tokens = message.num_tokens
            if isinstance(message, wire.Progress) and place >= message.num_layers:
                tokens = message.base_tokens
            final = self._final_blocks(self._group_of[layer], tokens)
            self._final[layer] = max(self._final[layer], min(final, self._wanted[layer].stop))
        return True

    def take(self) -> Stretch | None:
        """Return all that is final and was not taken before; None when that is nothing."""
        stretch = tuple(
            range(wanted.start, final)
            for wanted, final in zip(self._wanted, self._final, strict=True)
        )
        if not any(stretch):
            return None
        self._wanted = [
            range(final, wanted.stop)
            for wanted, final in zip(self._wanted, self._final, strict=True)
        ]
        return stretch

    def plan(self, stretch: Stretch) -> ReadPlan:
        """Plan the reads of a stretch, from block to block.

        Raises:
            HandoffError: see ``plan_reads``.
        """
        return plan_reads(self._groups, self._local, (self._tables, self._remote_regions), stretch)

    def cut(self, stretch: Stretch, max_blocks: int) -> list[Stretch]:
        """Return a stretch in parts that are quickly planned, of so many layers' blocks at most."""
        if sum(map(len, stretch)) <= max_blocks:
            return [stretch]
        nothing = [range(0)] * len(stretch)
        parts, part, room = [], list(nothing), max_blocks
        for layer, positions in enumerate(stretch):
            rest = positions
            while rest:
                part[layer], rest = rest[:room], rest[room:]
                room -= len(part[layer])
                if not room:
                    parts.append(tuple(part))
                    part, room = list(nothing), max_blocks
        if any(part):
            parts.append(tuple(part))
        return parts

    @property
    def final_bytes(self) -> int:
        """KV that is final at the producer, of what was wanted at first."""
        regions = self._local[1]
        return sum(
            (final - wanted.start) * region.block_bytes
            for final, wanted, region in zip(self._final, self.wanted, regions, strict=True)
        )

    @property
    def is_exhausted(self) -> bool:
        """Whether everything has been taken."""
        return not any(self._wanted)

    @property
    def taken_tokens(self) -> int:
        """How many of the prompt's first tokens have KV in every layer, once all that was taken
        has arrived. A sliding window is fetched for the prompt's end only, so that with one there
        is no such prefix before everything has been taken."""
        if self.is_exhausted:
            return self._num_tokens
        if any(group.window is not None for group in self._groups):
            return self._first_token
        ends = (
            wanted.start * group.block_tokens
            for wanted, group in zip(self._wanted, self._group_of, strict=True)
        )
        return max(self._first_token, min(ends))

    def _extend(self, slices: Sequence[wire.TableSlice]) -> bool:
        if len(slices) != len(self._tables):
            raise HandoffError(
                Reason.MISSING_BLOCKS,
                f"the producer sent {len(slices)} block tables, {len(self._tables)} are needed",
            )
        if any(part.start > len(t) for part, t in zip(slices, self._tables, strict=True)):
            return False
        for part, table in zip(slices, self._tables, strict=True):
            if part.start + len(part.blocks) > len(table):  # tables only grow in an epoch
                table[part.start :] = part.blocks
        return True

    def _final_blocks(self, group: Group, tokens: int) -> int:
        """The last block is final only with the last token: until then more is written to it."""
        if tokens >= self._num_tokens:
            return -(-self._num_tokens // group.block_tokens)
        return tokens // group.block_tokens
