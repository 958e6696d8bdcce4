"""Two schedulers as a model: what each tells its planes, and what it makes of their reports."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from tests.fakes.cluster import FakeCluster
from tests.fakes.engines import BLOCK_TOKENS, FakeEngine, full_group, make_layout
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import Source, new_handoff_id, new_incarnation
from vllm_pd_plugin.memory.layout import BlockTables
from vllm_pd_plugin.packing.incoming import Packing
from vllm_pd_plugin.protocol.events import Abandoned, Lost, Offered, Released
from vllm_pd_plugin.transfer.rank import Timeouts

LAYOUT = make_layout(groups=[full_group("layers.0", "layers.2"), full_group("layers.1")])
LAYERS = LAYOUT.forward_order()
GROUPS = range(len(LAYOUT.groups))
LEASE_S, PEER_S, CONTROL_QUEUE_S = 8.0, 5.0, 20.0
TIMEOUTS = Timeouts(queue_s=20.0, read_s=10.0, drain_s=4.0)
OVERWRITTEN, GIVEN_BACK = 0xEE, 0xDD
STAGING_BYTES = 1024
"""For four pieces, and too small for a long prompt in one."""


@dataclasses.dataclass(eq=False)
class Computing:
    """A prompt in the producer's scheduler."""

    name: str
    prompt: int
    num_tokens: int
    source: Source
    engine: FakeEngine
    is_open: bool = False
    computed: int = 0
    blocks: tuple[list[int], ...] = dataclasses.field(default_factory=lambda: ([], []))
    step: int | None = None
    """The step that runs, which computes up to ``target``; ``written`` layers are done."""
    target: int = 0
    written: int = 0


@dataclasses.dataclass(eq=False)
class Wanting:
    """The same prompt in the consumer's scheduler; ``honest`` unless its source is invented."""

    name: str
    prompt: int
    num_tokens: int
    source: Source
    honest: bool
    blocks: BlockTables | None = None
    offer: Offered | None = None
    is_over: bool = False


class Schedulers:
    """Those of a producer and a consumer; a method is a move of one of them, or of the world."""

    checks_bytes = False
    packing: Packing | None = None
    max_read_bytes = 2**20
    codes_slowly = False

    def __init__(self) -> None:
        super().__init__()
        self.cluster = FakeCluster(
            LEASE_S,
            CONTROL_QUEUE_S,
            TIMEOUTS,
            LAYOUT,
            self.checks_bytes,
            self.packing,
            STAGING_BYTES,
        )
        self.consumer = self.cluster.consumer
        self.consumer.transport.holds_reads = True
        self.consumer.transport.max_read_bytes = self.max_read_bytes
        for engine in (self.producer, self.consumer):
            engine.coder.holds = self.codes_slowly
        self.computing: dict[str, Computing] = {}
        self.held: dict[str, Computing] = {}
        """Sealed; the producer keeps their blocks."""
        self.wanting: dict[str, Wanting] = {}
        self.not_arrived: list[Computing] = []
        self.free = {group: list(range(1, 40)) for group in GROUPS}
        self.usable: list[tuple[int, BlockTables, int]] = []
        self.given_back: list[BlockTables] = []
        self.seen_results = self.seen_offers = self.seen_events = 0
        self.num_prompts = 0
        self.num_released: dict[str, int] = {}

    @property
    def producer(self) -> FakeEngine:
        return self.cluster.producer

    # --- requests --------------------------------------------------------------------------

    def send_prompt(self, index: int) -> None:
        """A dispatcher tells both sides, one of them first, or the producer much later."""
        num_tokens = 1 + index % 11
        order = ("producer first", "consumer first", "producer late")[index % 3]
        knows = ("incarnation", "incarnation", "incarnation", "address", "address", "invented")[
            index // 3 % 6
        ]
        self.num_prompts += 1
        name, prompt = f"r{self.num_prompts}", self.num_prompts
        incarnation = self.producer.identity.incarnation
        source = Source(new_handoff_id(), self.producer.address, incarnation)
        computing = Computing(name, prompt, num_tokens, source, self.producer)
        told = {
            "incarnation": source,
            "address": dataclasses.replace(source, incarnation=None),
            "invented": dataclasses.replace(source, incarnation=new_incarnation()),
        }[knows]
        wanting = Wanting(name, prompt, num_tokens, told, knows != "invented")
        self.wanting[name] = wanting
        if order == "producer first":
            self._arrive(computing)
        self.consumer.control.want(name, told)
        if order == "consumer first":
            self._arrive(computing)
        elif order == "producer late":
            self.not_arrived.append(computing)
        self.look()

    def prompt_reaches_producer(self, index: int) -> None:
        if self.not_arrived:
            self._arrive(self.not_arrived.pop(index % len(self.not_arrived)))
            self.look()

    def _arrive(self, computing: Computing) -> None:
        computing.engine = self.producer
        self.computing[computing.name] = computing
        source = computing.source
        self.producer.enqueue(
            computing.name, computing.num_tokens, source.handoff_id, bytes([computing.prompt])
        )

    # --- the producer's scheduler ----------------------------------------------------------

    def _some(self, index: int, suits: Callable[[Computing], bool]) -> Computing | None:
        fitting = [c for c in self.computing.values() if suits(c)]
        return fitting[index % len(fitting)] if fitting else None

    def _endangered(self, index: int) -> Computing | None:
        """One that holds blocks, rather one that is complete and may just be read."""
        complete = self._some(index, lambda c: c.computed == c.num_tokens)
        return complete or self._some(index, lambda c: any(c.blocks))

    def begin_step(self, index: int) -> None:
        computing = self._some(index, lambda c: c.step is None and c.computed < c.num_tokens)
        if computing is None:
            return
        if not computing.is_open:
            computing.is_open = True
            self.producer.control.open(computing.source.handoff_id)
        computing.target = min(computing.num_tokens, computing.computed + 1 + index % 8)
        for group, table in enumerate(computing.blocks):
            while len(table) * BLOCK_TOKENS < computing.target:
                table.append(self.free[group].pop())
        copies = tuple(list(table) for table in computing.blocks)
        computing.step = self.producer.advance(computing.name, computing.target, copies)
        computing.written = 0
        self.look()

    def write_layers(self, index: int) -> None:
        computing = self._some(index, lambda c: c.step is not None)
        if computing is None:
            return
        assert computing.step is not None
        end = min(len(LAYERS), computing.written + 1 + index % 2)
        tokens = range(computing.computed, computing.target)
        for layer in LAYERS[computing.written : end]:
            self.producer.write_kv(computing.prompt, computing.blocks, tokens, layer)
        computing.written = end
        is_finished = end == len(LAYERS)
        if is_finished or index % 3:
            self.producer.announce(computing.step, end)
        if is_finished:
            computing.computed, computing.step = computing.target, None

    def preempt(self, index: int) -> None:
        computing = self._endangered(index)
        if computing is None:
            return
        self.producer.preempt(computing.name)
        if index % 2 and computing.step is not None:  # the worker was already computing it
            self.producer.announce(computing.step)
        computing.computed, computing.step = 0, None
        self._free(computing)
        self.look()

    def finish_prompt(self, index: int) -> None:
        computing = self._some(index, lambda c: c.computed == c.num_tokens)
        if computing is None:
            return
        del self.computing[computing.name]
        self.held[computing.name] = computing
        self.producer.seal(computing.name, computing.blocks)
        self.look()

    def abort_at_producer(self, index: int) -> None:
        if computing := self._endangered(index) or self._some(index, lambda c: True):
            self._end(computing)

    def _end(self, computing: Computing) -> None:
        del self.computing[computing.name]
        self.producer.drop(computing.name)
        self._free(computing)
        self.look()

    def _free(self, computing: Computing) -> None:
        """The blocks are somebody else's now, who writes to them at once."""
        for group, table in enumerate(computing.blocks):
            layers = [x for x in range(len(LAYERS)) if computing.engine.group_of(x) == group]
            computing.engine.fill(table, OVERWRITTEN, layers)
            if computing.engine is self.producer:
                self.free[group] += table
        computing.blocks = ([], [])

    # --- the consumer's scheduler ----------------------------------------------------------

    def allocate(self, index: int) -> None:
        offered = [w for w in self.wanting.values() if w.offer and not w.blocks and not w.is_over]
        if not offered:
            return
        wanting = offered[index % len(offered)]
        assert wanting.offer is not None
        # Blocks that nobody has used before, so that every write can be told apart.
        first = 1 + 3 * wanting.prompt
        count = -(-wanting.num_tokens // BLOCK_TOKENS)
        wanting.blocks = tuple(list(range(first, first + count)) for _ in GROUPS)
        self.consumer.control.allocated(wanting.name)
        source = wanting.offer.source
        self.consumer.fetch(wanting.name, source, wanting.blocks, wanting.num_tokens)
        self.look()

    def abort_at_consumer(self, index: int) -> None:
        alive = [w for w in self.wanting.values() if not w.is_over]
        if not alive:
            return
        wanting = alive[index % len(alive)]
        if wanting.blocks:
            self.consumer.plane.cancel(wanting.name, Reason.ABORTED)
        else:
            wanting.is_over = True
            self.consumer.control.close(wanting.name, cancel=True)
        self.look()

    # --- the world -------------------------------------------------------------------------

    def wait(self, index: int) -> None:
        self.cluster.clock.advance(0.05 * (index % 5))
        self.turn()

    def finish_read(self, index: int) -> None:
        self.consumer.transport.finish_one(index)
        self.turn()

    def deliver_one(self, index: int) -> None:
        """The next message of any link; each keeps its own order."""
        network = self.cluster.network
        if not network.in_flight:
            return
        heads = network.next_of_each_lane()
        network.deliver_one(network.in_flight.index(heads[index % len(heads)]))
        self.look()

    def turn(self) -> None:
        self.producer.turn()
        self.look()
        self.consumer.turn()
        self.look()

    def pass_time(self, seconds: float) -> None:
        self.cluster.clock.advance(seconds)
        self.turn()

    def restart_producer(self) -> None:
        self.look()
        self.cluster.restart_producer().coder.finish()
        self.producer.coder.holds = self.codes_slowly
        self.seen_events = 0
        self.computing.clear()
        self.held.clear()
        self.free = {group: list(range(1, 40)) for group in GROUPS}
        self.look()

    # --- packing

    def finish_coding(self, index: int) -> None:
        """The device of either side has come to what it was given first."""
        under_way = (self.producer, self.consumer)[index % 2].coder.under_way
        if under_way:
            under_way[0].wait()

    def let_coders_finish(self) -> None:
        """From now on nothing takes its time."""
        for engine in (self.producer, self.consumer):
            engine.coder.holds = False
            engine.coder.finish()

    # --- what comes of it ------------------------------------------------------------------

    def look(self) -> None:
        """Take what the planes report, as both schedulers would; reuse what is given back."""
        events, self.seen_events = self.producer.events, self.seen_events
        while self.seen_events < len(events):
            event = events[self.seen_events]
            self.seen_events += 1
            if isinstance(event, Released):
                computing = self.held.pop(event.request_id)  # sealed, and not released before
                self._free(computing)
            elif isinstance(event, Abandoned) and event.request_id in self.computing:
                self._end(self.computing[event.request_id])
        while self.seen_offers < len(self.consumer.events):
            said = self.consumer.events[self.seen_offers]
            self.seen_offers += 1
            wanting = self.wanting[said.request_id]
            if isinstance(said, Offered):
                assert wanting.honest, "an invented source has offered"
                assert (said.num_tokens, said.prompt) == (
                    wanting.num_tokens,
                    bytes([wanting.prompt]),
                )
                wanting.offer = said
            elif isinstance(said, Lost) and not wanting.is_over:
                if wanting.blocks:
                    self.consumer.plane.cancel(wanting.name, said.reason)
                else:
                    wanting.is_over = True
        while self.seen_results < len(self.consumer.results):
            result = self.consumer.results[self.seen_results]
            self.seen_results += 1
            wanting = self.wanting[result.request_id]
            assert wanting.blocks is not None
            assert not wanting.is_over
            wanting.is_over = True
            self.consumer.control.close(wanting.name, cancel=result.reason is not None)
            kept = result.valid_tokens
            assert result.reason is not None or kept == wanting.num_tokens
            assert self.consumer.holds_kv(wanting.prompt, wanting.blocks, kept), "stale bytes"
            if kept == wanting.num_tokens:
                self.usable.append((wanting.prompt, wanting.blocks, kept))
            else:
                for table in wanting.blocks:
                    self.consumer.fill(table, GIVEN_BACK)
                self.given_back.append(wanting.blocks)
