"""A producer and a consumer of any two shapes, and a prompt that one computes while the other
fetches it: every move of their schedulers and ranks, and of the network between them."""

from __future__ import annotations

import collections
import dataclasses
import random
from collections.abc import Collection

import numpy as np

from tests.fakes.clock import FakeClock
from tests.fakes.engines import Settings, Surroundings, make_layout
from tests.fakes.network import FakeNetwork
from tests.fakes.ranks import FakeRank, RankedEngine
from tests.fakes.shapes import Shape, ShapedCoder
from tests.fakes.transport import FakeFabric
from vllm_pd_plugin.ids import Source, new_handoff_id
from vllm_pd_plugin.memory.layout import BlockTables
from vllm_pd_plugin.packing.incoming import Packing
from vllm_pd_plugin.protocol.events import Lost, Offered, Released
from vllm_pd_plugin.protocol.steps import Advance
from vllm_pd_plugin.transfer.rank import Timeouts
from vllm_pd_plugin.transfer.specs import FetchCounts, FetchSpec, Segment

LEASE_S = 30.0
TIMEOUTS = Timeouts(queue_s=40.0, read_s=10.0, drain_s=4.0)
PROMPT, ANOTHER, BEFORE = 1, 2, 3
"""Whose KV is handed off, who writes to what was given back, and what was there before."""


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """The consumer has [0, first_token) and wants [0, num_tokens)."""

    num_tokens: int
    first_token: int = 0


@dataclasses.dataclass(slots=True, eq=False)
class _Pass:
    """A step that a rank has still to go through; ``written`` of its layers are done."""

    step: int
    tokens: range
    tables: BlockTables
    written: int = 0


class UnequalPair:
    """packing: of both; None: neither has staging memory. bare: ranks of the producer, and of the
    consumer, that have none."""

    def __init__(
        self,
        theirs: Shape,
        ours: Shape,
        request: Request,
        packing: Packing | None = Packing.AUTO,
        checks_bytes: bool = False,
        staging_bytes: int = 4096,
        holds_reads: bool = False,
        bare: tuple[Collection[int], Collection[int]] = ((), ()),
    ) -> None:
        self.clock, self.network = FakeClock(), FakeNetwork()
        around = Surroundings(self.network, FakeFabric(), self.clock)
        settings = Settings(
            LEASE_S, 60.0, TIMEOUTS, make_layout(), checks_bytes, packing, staging_bytes
        )
        self.producer, self.consumer = (
            RankedEngine(name, ("127.0.0.1", port), shape, around, settings, without)
            for name, port, shape, without in (
                ("producer", 7001, theirs, bare[0]),
                ("consumer", 7002, ours, bare[1]),
            )
        )
        self.request = request
        # Blocks that follow each other on neither side.
        self.free = [random.Random(group).sample(range(1, 60), 59) for group in range(2)]
        self.tables: list[list[int]] = [[] for _ in range(theirs.num_groups)]
        self.computed = self.epoch = self.steps = 0
        self.passes: dict[int, collections.deque[_Pass]] = {
            rank: collections.deque() for rank in range(len(self.producer.ranks))
        }
        self.is_sealed = self.is_released = self.is_fetching = self.is_lost = False
        self.num_epochs = 1
        self._seen = 0
        for group in range(ours.num_groups):
            for first in range(0, 64, 8):
                self.consumer.fill(group, range(first, first + 8), BEFORE)
        for rank in self.consumer.ranks:
            rank.transport.holds_reads = holds_reads
        self._before = [rank.copy() for rank in self.consumer.ranks]
        positions = -(-request.num_tokens // ours.block_tokens)
        rng = random.Random(7)
        self.blocks: BlockTables = [
            rng.sample(range(1, 60), positions) for _ in range(ours.num_groups)
        ]
        self.source = Source(
            new_handoff_id(), self.producer.address, self.producer.identity.incarnation
        )
        self.producer.control.enqueue(self.source.handoff_id, "p", request.num_tokens, b"prompt")
        self.consumer.control.want("c", self.source)

    # --- the producer's scheduler ------------------------------------------------------------

    def schedule(self, num_tokens: int) -> None:
        """A step begins that computes so many tokens more; every rank has still to go through it.

        Blocks that a window has left behind are another's by then, as with vLLM.
        """
        start, end = self.computed, min(self.computed + num_tokens, self.request.num_tokens)
        if start == end:
            return
        if not self.steps:
            self.producer.control.open(self.source.handoff_id)
        self._leave_behind()
        for group, table in enumerate(self.tables):
            while len(table) * self.producer.shape.block_tokens < end:
                table.append(self.free[group].pop())
        self.steps += 1
        tables = tuple(list(table) for table in self.tables)
        after = tuple(tuple(range(1, len(of) + 1)) for of in self.producer.shape.stages)
        handoff_id = self.source.handoff_id
        advance = Advance(handoff_id, self.epoch, end, tables, after)
        self.producer.control.advance(self.steps, [advance])
        for passes in self.passes.values():
            passes.append(_Pass(self.steps, range(start, end), tables))
        self.computed = end

    def write(self, rank: int, says_so: bool = True) -> None:
        """A rank writes the next layer of the step that it goes through, and announces it; the
        last one always."""
        if not self.passes[rank]:
            return
        passing, engine = self.passes[rank][0], self.producer.ranks[rank]
        order = engine.layout.forward_order()
        engine.write(PROMPT, passing.tables, passing.tokens, order[passing.written])
        passing.written += 1
        is_last = passing.written == len(order)
        if is_last:
            self.passes[rank].popleft()
        if says_so or is_last:
            engine.announce(passing.step, passing.written)

    def compute(self, num_tokens: int) -> None:
        """A whole step."""
        self.schedule(num_tokens)
        for rank, passes in self.passes.items():
            while passes:
                self.write(rank)

    def preempt(self, announces: bool = False) -> None:
        """The request loses its blocks, whatever ranks are still going through: they may say so."""
        if self.is_sealed or not any(self.tables):
            return
        for rank, passes in self.passes.items():
            while announces and passes:
                layers = self.producer.ranks[rank].num_layers
                self.producer.ranks[rank].announce(passes.popleft().step, layers)
            passes.clear()
        self.epoch += 1
        self.num_epochs += 1
        self.computed = 0
        self.producer.control.withdraw(self.source.handoff_id, self.epoch)
        self._give_back()

    @property
    def is_computed(self) -> bool:
        return self.computed == self.request.num_tokens and not any(self.passes.values())

    def seal(self) -> None:
        """The request has ended."""
        if self.is_computed and not self.is_sealed:
            self.is_sealed = True
            self._leave_behind()
            tables, num_tokens = tuple(map(tuple, self.tables)), self.request.num_tokens
            self.producer.control.seal(self.source.handoff_id, "p", num_tokens, tables)

    def _leave_behind(self) -> None:
        """Give back what no window reaches any more."""
        shape = self.producer.shape
        for group, table in enumerate(self.tables):
            if group:
                gone = max(0, self.computed - shape.window) // shape.block_tokens
                left = [block for block in table[:gone] if block]
                table[:gone] = [0] * min(gone, len(table))
                self._give(group, left)

    def _give_back(self) -> None:
        for group, table in enumerate(self.tables):
            self._give(group, [block for block in table if block])
        self.tables = [[] for _ in self.tables]

    def _give(self, group: int, blocks: list[int]) -> None:
        for block in blocks:
            self.producer.fill(group, [block], ANOTHER)
        self.free[group] = blocks + self.free[group]

    # --- the world ---------------------------------------------------------------------------

    def look(self) -> None:
        """Take what both control planes and the consumer's ranks say."""
        while self._seen < len(self.consumer.events):
            event = self.consumer.events[self._seen]
            self._seen += 1
            if isinstance(event, Offered) and not self.is_lost:
                self.is_fetching = True
                self.consumer.control.allocated("c")
                tokens = range(self.request.first_token, self.request.num_tokens)
                spec = FetchSpec("c", (Segment(tokens, self.source),), self.blocks)
                for rank in self.consumer.ranks:
                    rank.fetch(spec)
            elif isinstance(event, Lost) and not self.is_lost:
                self.is_lost = True
                for rank in self.consumer.ranks:
                    rank.plane.cancel("c", event.reason)
        released = any(isinstance(event, Released) for event in self.producer.events)
        if released and not self.is_released:
            self.is_released = True
            self._give_back()
        for rank in self.consumer.ranks:
            if rank.results:
                self.check(rank)

    def settle(self) -> None:
        """Deliver messages, and let all ranks go on, until nothing happens any more."""
        for _ in range(1000):
            self.turn()
            if not self.network.deliver():
                return
        raise AssertionError("the messages never end")

    def turn(self) -> None:
        for engine in (self.producer, self.consumer):
            engine.turn()
            self.look()

    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.turn()

    @property
    def coders(self) -> list[ShapedCoder]:
        """Of all ranks of both."""
        return [rank.coder for engine in (self.producer, self.consumer) for rank in engine.ranks]

    # --- what comes of it --------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether the consumer's scheduler knows what has become of it, from every rank."""
        if not self.is_fetching:
            return self.is_lost
        return all(rank.results for rank in self.consumer.ranks)

    @property
    def reasons(self) -> list[object]:
        return [result.reason for rank in self.consumer.ranks for result in rank.results]

    @property
    def lacks_tokens(self) -> list[bool]:
        return [result.lacks_tokens for rank in self.consumer.ranks for result in rank.results]

    @property
    def counts(self) -> FetchCounts:
        """What was read, by all ranks together."""
        results = (result for rank in self.consumer.ranks for result in rank.results)
        return sum((result.counts for result in results), FetchCounts())

    def check(self, rank: FakeRank) -> None:
        """What a rank calls usable is right, in every element; what others may find in its blocks
        is; and nothing else was touched, were it only by one byte."""
        (result,) = rank.results
        request, shape = self.request, self.consumer.shape
        kept = result.valid_tokens
        assert result.reason is not None or kept == request.num_tokens
        for region in range(rank.num_layers):
            group = rank.layout.groups[rank.group_of(region)]
            needed = group.needed_blocks(request.first_token, request.num_tokens)
            start = needed.start * shape.block_tokens
            if result.lacks_tokens:
                assert group.window is None or start < request.num_tokens - group.window
                start = start if group.window is None else request.num_tokens - group.window
            if result.reason is None or group.window is None:
                usable = range(start, kept)
                assert rank.has(PROMPT, self.blocks, usable, region), "stale bytes"
            if result.reason is None:
                for token in range(needed.start * shape.block_tokens, start):
                    one = range(token, token + 1)
                    is_old = rank.is_like(self._before[rank.place.rank], self.blocks, one, region)
                    is_ours = rank.has(PROMPT, self.blocks, one, region)
                    assert is_ours or is_old, "somebody else's bytes"
            self._check_untouched(rank, region, needed)

    def _check_untouched(self, rank: FakeRank, region: int, needed: range) -> None:
        """Blocks that were not fetched to are what they were."""
        table = self.blocks[rank.group_of(region)]
        fetched = [table[position] for position in needed]
        now = np.delete(rank.caches[region], fetched, axis=0)
        was = np.delete(self._before[rank.place.rank].caches[region], fetched, axis=0)
        assert np.array_equal(now, was), "what is not the request's was written to"

    def close(self) -> None:
        """The consumer's scheduler is done with it, and the producer's ends what it computes."""
        self.consumer.control.close("c", cancel=any(self.reasons) or not self.is_over)
        if not self.is_sealed:
            self.producer.control.drop(self.source.handoff_id)
        self.settle()

    def leaks(self) -> dict[str, int]:
        """What is still open of both engines, where anything is."""
        return {
            f"{name} {what}": count
            for name, engine in (("producer", self.producer), ("consumer", self.consumer))
            for what, count in engine.open_handoffs().items()
            if count
        }
