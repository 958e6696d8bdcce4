"""Per request: which of a handoff's KV is final at its producer, and which has been asked for.

A stretch is what has become final since the last read was planned. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from vllm_pd_plugin.errors import HandoffError, Reason
from vllm_pd_plugin.ids import BlockId
from vllm_pd_plugin.mapping.match import Share
from vllm_pd_plugin.mapping.reads import plan_reads
from vllm_pd_plugin.mapping.route import Route
from vllm_pd_plugin.memory.layout import BlockTables, Group, RankLayout, Region, Stretch
from vllm_pd_plugin.net.transport import ReadPlan
from vllm_pd_plugin.protocol import wire


class Stretches:
    """One fetch on one rank: learns from the producer's messages, plans the reads.

    The consumer has KV for tokens [0, first_token) and wants [0, num_tokens) in its own blocks; a
    stretch counts in those, however long the producer's are.

    remote: the regions of each of the producer's ranks that have something for this one.
    """

    def __init__(
        self,
        layout: RankLayout,
        route: Route,
        local: tuple[BlockTables, Sequence[Region]],
        remote: Mapping[int, Sequence[Region]],
        first_token: int,
        num_tokens: int,
    ) -> None:
        self._groups = layout.groups
        self._route = route
        self._group_of = [group for group in layout.groups for _ in group.layers]
        self._local = local
        self._remote = remote
        self._first_token = first_token
        self._num_tokens = num_tokens
        self._begin(0)

    def _begin(self, epoch: int) -> None:
        self.epoch = epoch
        self._tables: list[list[BlockId]] = [[] for _ in range(self._route.num_groups)]
        wanted = [g.needed_blocks(self._first_token, self._num_tokens) for g in self._group_of]
        self._wanted = wanted
        """Positions in the block table that are still to be asked for, for each layer."""
        self.wanted: Stretch = tuple(wanted)
        self._final = [positions.start for positions in wanted]
        """End of those of them that are final at the producer."""
        self.is_written = False
        """Whether the producer's ranks that have what is wanted have written all that they have of
        the prompt, other layers included: before that they grant no last commit."""

    def learn(self, message: wire.Progress | wire.Seal) -> bool:
        """Take in what the producer says; a new epoch voids all before it, an old one is ignored.

        Returns False when a message before this one is missing: the tables have a gap.

        Raises:
            HandoffError: the producer sealed fewer tokens than it had offered, or does not say
                what there is to be known.
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
        is_written = True
        for layer, (stage, number) in enumerate(self._route.turns):
            if isinstance(message, wire.Seal):
                tokens = message.num_tokens
            else:
                if stage >= len(message.written):
                    text = f"the producer does not say how far pipeline stage {stage} is"
                    raise HandoffError(Reason.MISSING_BLOCKS, text)
                written = message.written[stage]
                is_ahead = number < written.num_layers
                tokens = written.num_tokens if is_ahead else written.base_tokens
                is_written = is_written and written.base_tokens >= self._num_tokens
            final = self._final_blocks(self._group_of[layer], tokens)
            self._final[layer] = max(self._final[layer], min(final, self._wanted[layer].stop))
        self.is_written = self.is_written or is_written
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

    def tokens_of(self, stretch: Stretch, share: Share) -> list[range]:
        """Return which tokens of each of a share's layers a stretch has, and the producer still."""
        group, first = self._groups[share.group], self._first_kept(share)
        wanted = (group.tokens_at(stretch[region], self._num_tokens) for region in share.regions)
        return [range(max(tokens.start, first), tokens.stop) for tokens in wanted]

    @property
    def lacks_tokens(self) -> bool:
        """Whether blocks of a sliding window begin with tokens that are not fetched: the producer,
        with blocks of another size, lets go of them earlier."""
        return any(
            self._first_kept(share) > group.tokens_at(self.wanted[region], self._num_tokens).start
            for share in self._route.shares
            if (group := self._groups[share.group]).window is not None
            for region in share.regions
            if self.wanted[region]
        )

    def _first_kept(self, share: Share) -> int:
        """Return the first token of which the producer keeps KV for certain."""
        window, block = self._groups[share.group].window, share.source_block_tokens
        if window is None:
            return 0
        return max(0, self._num_tokens - window) // block * block

    def plan(self, stretch: Stretch, shares: Iterable[Share]) -> dict[int, ReadPlan]:
        """Plan the reads of a stretch's shares, as they lie, from each of the producer's ranks.

        Raises:
            HandoffError: see ``plan_reads``.
        """
        plans: dict[int, list[ReadPlan]] = {}
        for share in shares:
            remote = self._tables, self._remote[share.source_rank]
            plan = plan_reads(share, self.tokens_of(stretch, share), remote, self._local)
            if plan.num_descriptors:
                plans.setdefault(share.source_rank, []).append(plan)
        return {rank: ReadPlan.together(parts) for rank, parts in plans.items()}

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
        has arrived. A sliding window has blocks for the prompt's end only, so that with one there
        is no such prefix before everything has been taken: not even the one that was there, whose
        own window has been let go."""
        if self.is_exhausted:
            return self._num_tokens
        if any(group.window is not None for group in self._groups):
            return 0
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
