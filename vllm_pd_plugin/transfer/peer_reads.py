"""Per attempt: the reads from a peer, from block to block or in packed pieces."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Mapping, Sequence

from vllm_pd_plugin.mapping.match import Share
from vllm_pd_plugin.memory.layout import Stretch
from vllm_pd_plugin.net.transport import ReadPlan, ReadState
from vllm_pd_plugin.protocol import wire
from vllm_pd_plugin.transfer.peer_pieces import PeerPieces
from vllm_pd_plugin.transfer.rank import Rank
from vllm_pd_plugin.transfer.reads import Pending, Read, ToPack, ToPlan, ToRead
from vllm_pd_plugin.transfer.remote import ASK_AGAIN_S, RemoteHandoff
from vllm_pd_plugin.transfer.specs import FetchCounts, FetchSpec, Segment
from vllm_pd_plugin.transfer.stretches import Stretches

MAX_READS = 2
"""Reads of one segment that are under way together: the next is there when one ends, and what is
announced meanwhile gathers into one."""

_MIN_POLL_S, _MAX_POLL_S, _POLL_SHARE = 0.0001, 0.002, 0.05
_MAX_BLOCKS, _MAX_DESCRIPTORS = 2048, 256
"""Of one plan, and of one read: more would hold up everything else on the thread. NIXL and UCX take
two microseconds or more to start what one descriptor says."""
_MEASURABLE_BYTES = 512 * 2**10
"""What is smaller tells more of the delay than of the link."""


class PeerReads:
    """All reads of one attempt; the methods raise HandoffError when it cannot go on."""

    def __init__(
        self, spec: FetchSpec, segment: Segment, rank: Rank, remote: RemoteHandoff
    ) -> None:
        self.arrived_tokens = 0
        self.counts = FetchCounts()
        self.pieces = PeerPieces(spec, segment, rank, remote)
        self.stretches = Stretches(
            rank.local.layout,
            remote.route,
            (spec.blocks, rank.local.regions),
            {source: remote.memory(source).regions for source in remote.route.source_ranks},
            segment.tokens.start,
            segment.tokens.stop,
        )
        self.remote = remote
        self._transport = rank.transport
        self._clock = rank.clock
        self._reads: deque[Read] = deque()
        """In the order in which they were begun, which is that in which they are waited for."""
        self._pending: deque[Pending] = deque()
        """What is final, in the order in which it is read."""
        self._last_end = 0.0

    @property
    def writes(self) -> bool:
        """Whether something may still be written to local memory."""
        return any(read.handle is not None for read in self._reads)

    @property
    def is_done(self) -> bool:
        """Whether all that was wanted has arrived, and the producer would grant it."""
        return self.is_idle and self.stretches.is_exhausted and self.stretches.is_written

    @property
    def is_idle(self) -> bool:
        """Whether it waits for nothing but the producer's word that more is final."""
        return not self._reads and not self._pending

    @property
    def oldest(self) -> float | None:
        """When the read that is waited for began."""
        return self._reads[0].began_at if self._reads else None

    def wait_s(self) -> float:
        """Return for how many seconds there is nothing to do."""
        if not self._reads:  # what waits for room is told when there is some
            return math.inf
        if self._reads[0].handle is None:
            return self._reads[0].asked_at + ASK_AGAIN_S - self._clock()
        elapsed = self._clock() - self._reads[0].posted_at
        return min(max(_POLL_SHARE * elapsed, _MIN_POLL_S), _MAX_POLL_S)

    def begin_epoch(self) -> None:
        """All that was read, or asked for, is void."""
        self.arrived_tokens = 0
        self.give_up()

    def give_up(self) -> None:
        """Nothing of this fetch is wanted any more; reads that are under way still have to end."""
        self._forget_pending()
        self._forget_asked()
        for read in self._reads:
            read.is_void = True

    def disconnected(self) -> None:
        """The connection is closed: nothing is written any more."""
        for read in self._reads:
            if read.coding is not None:  # that is not a matter of the connection
                read.coding.wait()
            elif read.handle is not None:
                self._transport.release_read(read.handle)
            self.pieces.lose(read)
        self._reads.clear()
        self._forget_pending()

    def follow(self, before: PeerReads) -> None:
        """Take the place of the reads of a connection that was closed: all is read anew."""
        self.counts = before.counts
        self.pieces.follow(before.pieces)

    def go_on(self) -> None:
        """Begin reads of what is final and was not asked for."""
        # A read of an earlier epoch may still write to the same blocks.
        if any(read.is_void for read in self._reads):
            return
        while len(self._reads) < MAX_READS:
            if not self._pending:
                stretch = self.stretches.take()
                if stretch is None:
                    return
                self._begin(stretch)
            match self._pending[0]:
                case ToPack() as piece:
                    read = self.pieces.begin(piece, self.stretches.epoch)
                    if read is None:
                        return
                    self._pending.popleft()
                    self._reads.append(read)
                    self.pieces.send(read)
                case ToPlan(part, shares, prefix):
                    reads = self._in_reads(self.stretches.plan(part, shares))
                    self._pending.popleft()
                    self._pending.extendleft(reversed(_with_prefix(reads, prefix)))
                case ToRead() as planned:
                    self._pending.popleft()
                    self._read(planned)

    def poll(self) -> bool:
        """Take the reads that have ended, and ask again for what does not come; False when a read
        has failed."""
        for read in self._reads:
            self.pieces.ask_again(read)
        while self._reads and (handle := self._reads[0].handle) is not None:
            read = self._reads[0]
            if read.coding is None:
                state = self._transport.poll_read(handle)
                if state is ReadState.PENDING:
                    return True
                if state is ReadState.FAILED:
                    return False
                self._transport.release_read(handle)
                self._arrived(read)
            if read.coding is not None and not read.coding.is_done():
                return True
            self._taken_in(self._reads.popleft())
        return True

    def packed(self, message: wire.Packed) -> None:
        """A piece that was asked for can be read."""
        pieces = (read for read in self._reads if read.asked is not None)
        read = next((read for read in pieces if read.number == message.number), None)
        if read is None:
            self.pieces.refuse(message)
        elif read.handle is None:  # else it is a message that came twice
            self._post(read, self.pieces.plan(read, message))

    # --- inside ------------------------------------------------------------------------------

    def _begin(self, stretch: Stretch) -> None:
        """Take up a stretch, to be read as it lies or packed."""
        direct = tuple(share for share in self.remote.route.shares if share.direct is not None)
        first, *others = self.stretches.cut(stretch, _MAX_BLOCKS)
        plans = self.stretches.plan(first, direct)  # the others lie about as scattered
        descriptor_bytes = _mean_bytes(plans)
        asked, shares = self.pieces.cut(self.stretches, stretch, descriptor_bytes)
        pending: list[Pending] = [ToPack(one, descriptor_bytes) for one in asked]
        if shares and shares == self.remote.route.shares:
            pending += self._in_reads(plans)
            pending += (ToPlan(part, shares) for part in others)
        elif shares:
            rest = self.stretches.cut(_only(stretch, shares), _MAX_BLOCKS)
            pending += (ToPlan(part, shares) for part in rest if any(part))
        # Only with the last of them has a longer prefix arrived.
        self._pending += _with_prefix(pending, self.stretches.taken_tokens)

    def _in_reads(self, plans: Mapping[int, ReadPlan]) -> list[ToRead]:
        return [
            ToRead(source_rank, part)
            for source_rank, plan in plans.items()
            for part in plan.split(_MAX_DESCRIPTORS, self._transport.max_read_bytes)
        ]

    def _read(self, planned: ToRead) -> None:
        plan, num_bytes = planned.plan, planned.plan.total_bytes
        read = Read(
            planned.source_rank,
            planned.prefix_tokens,
            num_bytes / plan.num_descriptors,
            self._clock(),
            num_bytes,
            num_bytes,
        )
        self._reads.append(read)
        self._post(read, plan)

    def _post(self, read: Read, plan: ReadPlan) -> None:
        name = self.remote.name(read.source_rank)  # to connect is not the link's time
        read.posted_at = self._clock()
        read.handle = self._transport.post_read(name, plan)
        self.counts.posted(plan, read.kv_bytes, read.asked is not None)

    def _arrived(self, read: Read) -> None:
        now = self._clock()
        if read.num_bytes >= _MEASURABLE_BYTES:
            self.remote.rates.link.add(read.num_bytes, now - max(read.posted_at, self._last_end))
        if read.asked is not None and not read.is_void:
            try:
                read.coding = self.pieces.take_in(read, read.asked)
            except BaseException:
                self._reads.remove(read)
                self.pieces.release(read)
                raise

    def _taken_in(self, read: Read) -> None:
        """What was read is where it belongs."""
        self.pieces.release(read)
        now = self._clock()
        self.remote.rates.moved(
            read.asked is not None,
            read.descriptor_bytes,
            read.kv_bytes,
            now - max(read.began_at, self._last_end),
        )
        self._last_end = now
        if not read.is_void:
            self.arrived_tokens = max(self.arrived_tokens, read.prefix_tokens)

    def _forget_pending(self) -> None:
        self._pending.clear()
        self.pieces.leave_queue()

    def _forget_asked(self) -> None:
        for read in [read for read in self._reads if read.handle is None]:
            self._reads.remove(read)
            self.pieces.release(read)


def _with_prefix(pending: Sequence[Pending], prefix_tokens: int) -> list[Pending]:
    """Return the same, the last of which brings so many of the prompt's first tokens."""
    return [*pending[:-1], dataclasses.replace(pending[-1], prefix_tokens=prefix_tokens)]


def _mean_bytes(plans: Mapping[int, ReadPlan]) -> float:
    num_descriptors = sum(plan.num_descriptors for plan in plans.values())
    return sum(plan.total_bytes for plan in plans.values()) / max(1, num_descriptors)


def _only(stretch: Stretch, shares: Sequence[Share]) -> Stretch:
    """Return of a stretch the layers of some shares."""
    regions = {region for share in shares for region in share.regions}
    return tuple(part if layer in regions else range(0) for layer, part in enumerate(stretch))
