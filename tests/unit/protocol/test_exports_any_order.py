"""The table of exports in any order of events, against what was promised, said in the plainest way:
each claim with its facts side by side, and no table of transitions."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable

import hypothesis.strategies as st
from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.fakes.producer import (
    BLOCKS,
    LEASE_S,
    RANK_0,
    RANK_1,
    SCHEDULER,
    TOKENS,
    Producer,
)
from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.ids import HandoffId
from vllm_pd_plugin.protocol import wire
from vllm_pd_plugin.protocol.export_states import ExportState

RANKS = (RANK_0, RANK_1)
LOST = ([0, 2, 3], [4])
"""``BLOCKS`` without one that a consumer needs."""

MOVES = 40
COMMITTED, CANCELLED, EXPIRED = ExportState.COMMITTED, ExportState.CANCELLED, ExportState.EXPIRED


@dataclasses.dataclass(eq=False)
class Claim:
    """What is promised of one export.

    outcome: how it is over for its consumer. is_held: its holder has not ended it, or has sealed it
        and waits for its release.
    """

    owner: str
    handoff: HandoffId
    outcome: ExportState | None = None
    is_held: bool = True
    is_open: bool = False
    is_sealed: bool = False
    is_asked_for: bool = False
    silent_from: float | None = None
    epoch: int = 0
    has_blocks: bool = False
    complete: set[int] = dataclasses.field(default_factory=set)
    committed: set[int] = dataclasses.field(default_factory=set)
    packed: set[int] = dataclasses.field(default_factory=set)
    subscribed: set[int] = dataclasses.field(default_factory=set)

    @property
    def is_live(self) -> bool:
        return self.is_held and self.outcome is None


class AnyOrder(RuleBasedStateMachine):
    """Blocks are released once, and only when they were sealed and nobody may read them; a commit
    is granted only while that is certain; and nothing is left in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.producer = Producer(num_ranks=len(RANKS))
        self.table, self.answering = self.producer.table, self.producer.answering
        self.ids = [HandoffId("a"), HandoffId("b")]
        """Those that things happen to; whoever held the ones before may still end."""
        self.claims: dict[HandoffId, Claim] = {}
        self.awaited: dict[HandoffId, float] = {}
        self.endings: dict[HandoffId, ExportState] = {}
        self.running: list[Claim] = []
        """Whose holders have not ended yet; those that were replaced, too."""
        self.released: dict[str, ExportState] = {}
        self.abandoned: dict[str, ExportState] = {}
        self.unpacked: list[tuple[HandoffId, int]] = []
        self.num_owners = 0

    # --- what is promised

    @property
    def now(self) -> float:
        return self.producer.clock()

    def live(self, handoff: HandoffId) -> Claim | None:
        claim = self.claims.get(handoff)
        return claim if claim is not None and claim.is_live else None

    def speak(self, claim: Claim) -> None:
        if claim.is_sealed or claim.is_asked_for:
            claim.silent_from = self.now

    def conclude(self, claim: Claim, outcome: ExportState, is_wanted: bool = False) -> None:
        """It is over for its consumer; the holder hears of it unless others want what it makes."""
        claim.outcome = outcome
        self.unpacked += [(claim.handoff, rank) for rank in sorted(claim.packed)]
        if claim.is_sealed:
            self.release(claim)
        elif not is_wanted:
            self.abandoned[claim.owner] = outcome

    def release(self, claim: Claim) -> None:
        assert claim.is_sealed
        assert claim.outcome is not None
        self.released[claim.owner] = claim.outcome
        self.leave(claim)

    def leave(self, claim: Claim) -> None:
        """It has no holder any more."""
        claim.is_held = False
        if self.claims.get(claim.handoff) is claim:
            assert claim.outcome is not None
            self.endings[claim.handoff] = claim.outcome
            del self.claims[claim.handoff]

    def let_time_tell(self) -> None:
        """What the table must have noticed before it answers."""
        for claim in list(self.claims.values()):
            silent = claim.silent_from
            if claim.is_live and silent is not None and self.now >= silent + LEASE_S:
                self.conclude(claim, EXPIRED)
        for handoff, since in list(self.awaited.items()):
            if self.now >= since + LEASE_S:
                del self.awaited[handoff]

    @rule(seed=st.integers(0, 2**32))
    def go_on(self, seed: int) -> None:
        """Much happens, in the order of a seed: what an export lives through takes many events."""
        chance = random.Random(seed)
        for _ in range(MOVES):
            self.move(chance)
            self.holders_hear_what_they_must_and_once()

    def move(self, chance: random.Random) -> None:
        slot, index = chance.choice([0, 0, 0, 1]), chance.randrange(100)
        rank, ranks = chance.choice([0, 1]), chance.choice([(0,), (1,), (0, 1), (0, 1)])
        rarely, sometimes = chance.random() < 0.1, chance.random() < 0.4
        moves: list[Callable[[], None]] = [
            lambda: self.arrive(slot, rarely, sometimes),
            lambda: self.open(slot),
            lambda: self.compute(slot, ranks, TOKENS // 2 if sometimes else TOKENS, rarely),
            lambda: self.compute(slot, (0, 1), TOKENS, False),
            lambda: self.seal(index),
            lambda: self.want(slot),
            lambda: self.subscribe(slot, rank),
            lambda: self.heartbeat(slot),
            lambda: self.pack(slot, rank),
            lambda: self.commit(slot, ranks, sometimes, rarely),
            lambda: self.commit(slot, (0, 1), False, False),
            lambda: self.pass_time(chance.choice([0.3, 0.3, 0.6, 1.0])),
            self.tick,
        ]
        trouble: list[Callable[[], None]] = [
            lambda: self.preempt(slot),
            lambda: self.lose_a_block(slot),
            lambda: self.drop(index),
            lambda: self.cancel(slot),
            self.void,
        ]
        chance.choice(trouble if chance.random() < 0.1 else moves)()

    # --- holders

    def arrive(self, slot: int, is_used_again: bool, is_scheduled: bool) -> None:
        handoff = self.ids[slot]
        if handoff in (*self.claims, *self.endings) and not is_used_again:
            handoff = self.ids[slot] = HandoffId(f"{handoff}'")
        self.num_owners += 1
        claim = Claim(f"owner {self.num_owners}", handoff)
        if before := self.claims.get(handoff):
            if before.is_live:
                self.conclude(before, CANCELLED, is_wanted=True)
            before.outcome = CANCELLED
            self.leave(before)
        self.claims[handoff] = claim
        self.running.append(claim)
        if handoff in self.awaited:
            del self.awaited[handoff]
            claim.is_asked_for = True
            self.speak(claim)
        if handoff in self.endings:
            self.conclude(claim, self.endings.pop(handoff))
        self.table.enqueue(handoff, claim.owner, TOKENS, b"digest")
        if is_scheduled:
            self.open(slot)

    def open(self, slot: int) -> None:
        handoff = self.ids[slot]
        answers = self.table.open(handoff)
        claim = self.live(handoff)
        offered = claim is not None and not claim.is_open and not claim.is_sealed
        assert bool(answers) == bool(claim and offered and claim.is_asked_for)
        if claim and offered:
            claim.is_open = True
            self.speak(claim)

    def compute(self, slot: int, ranks: tuple[int, ...], num_tokens: int, old: bool) -> None:
        handoff = self.ids[slot]
        claim = self.live(handoff)
        epoch = (claim.epoch if claim else 0) - old
        self.producer.compute(handoff, num_tokens, BLOCKS, epoch, ranks)
        if claim and claim.is_open and not claim.is_sealed and not old:
            claim.has_blocks = True
            claim.complete -= set(ranks)
            claim.complete |= set(ranks) if num_tokens == TOKENS else set()

    def lose_a_block(self, slot: int) -> None:
        handoff = self.ids[slot]
        claim = self.live(handoff)
        if claim and claim.is_open and not claim.is_sealed and claim.has_blocks:
            self.conclude(claim, CANCELLED, is_wanted=True)
            self.producer.advance(handoff, TOKENS, LOST, claim.epoch)

    def preempt(self, slot: int) -> None:
        handoff = self.ids[slot]
        claim = self.live(handoff)
        self.table.withdraw(handoff, claim.epoch + 1 if claim else 1)
        if claim and claim.is_open and not claim.is_sealed:
            claim.epoch += 1
            claim.has_blocks = False
            claim.complete.clear()

    def seal(self, index: int) -> None:
        if not self.running:
            return
        claim = self.running.pop(index % len(self.running))
        claim.is_sealed = True
        if not claim.is_held:  # replaced, or dropped: nobody reads its blocks
            self.released[claim.owner] = self.endings.get(claim.handoff, CANCELLED)
        elif claim.outcome is not None:
            self.release(claim)
        else:
            self.speak(claim)
        self.table.seal(claim.handoff, claim.owner, TOKENS, BLOCKS)

    def drop(self, index: int) -> None:
        if not self.claims:
            return
        claim = list(self.claims.values())[index % len(self.claims)]
        if claim in self.running and index % 3:  # else it may still be said to have ended well
            self.running.remove(claim)
        if claim.is_live:
            self.conclude(claim, CANCELLED, is_wanted=True)
        self.leave(claim)
        self.table.drop(claim.handoff)

    def void(self) -> None:
        for claim in list(self.claims.values()):
            if claim.is_live and (claim.is_open or claim.is_sealed):
                self.conclude(claim, CANCELLED)
        self.table.void()

    # --- consumers

    def want(self, slot: int) -> None:
        handoff = self.ids[slot]
        answer = self.answering.want(handoff, SCHEDULER)
        self.let_time_tell()
        claim = self.live(handoff)
        if claim:
            claim.is_asked_for = True
            self.speak(claim)
            assert (answer is None) == (not claim.is_open and not claim.is_sealed)
        elif handoff in self.claims or handoff in self.endings:
            assert isinstance(answer, wire.Refuse)
        else:
            assert answer is None
            self.awaited[handoff] = self.now

    def subscribe(self, slot: int, rank: int) -> None:
        handoff = self.ids[slot]
        subscribe = wire.Subscribe(handoff, rank, len(RANKS), (rank,))
        answer = self.answering.subscribe(subscribe, RANKS[rank])
        self.let_time_tell()
        claim = self.live(handoff)
        assert isinstance(answer, wire.Refuse) == (claim is None)
        if claim:
            claim.subscribed.add(rank)
            self.speak(claim)

    def heartbeat(self, slot: int) -> None:
        handoff = self.ids[slot]
        self.answering.heartbeat([handoff], SCHEDULER)
        self.let_time_tell()
        if claim := self.live(handoff):
            self.speak(claim)

    def pack(self, slot: int, rank: int) -> None:
        handoff = self.ids[slot]
        epoch = self.claims[handoff].epoch if handoff in self.claims else 0
        pack = wire.Pack(handoff, epoch, rank, rank, 1, Codec.RAW, TOKENS, (), False)
        answer = self.answering.pack(pack, RANKS[rank].incarnation)
        self.let_time_tell()
        claim = self.live(handoff)
        assert isinstance(answer, wire.Stage) == (claim is not None)
        if claim:
            claim.packed.add(rank)

    def commit(self, slot: int, ranks: tuple[int, ...], is_vouch: bool, old: bool) -> None:
        handoff = self.ids[slot]
        for rank in ranks:
            epoch = (self.claims[handoff].epoch if handoff in self.claims else 0) - old
            answer = self.answering.commit(wire.Commit(handoff, epoch, rank, not is_vouch))
            self.let_time_tell()
            claim = self.live(handoff)
            held = claim is not None and claim.epoch == epoch
            has_all = (
                claim is not None
                and rank in claim.subscribed
                and (claim.is_sealed or rank in claim.complete)
            )
            may = held and (has_all or is_vouch)
            assert isinstance(answer, wire.Committed) == may, answer
            if may and not is_vouch and claim:
                claim.committed.add(rank)
                if claim.committed == set(range(len(RANKS))):
                    self.conclude(claim, COMMITTED, is_wanted=True)

    def cancel(self, slot: int) -> None:
        handoff = self.ids[slot]
        if claim := self.live(handoff):
            self.conclude(claim, CANCELLED)
        elif handoff not in self.claims and handoff not in self.endings:
            self.awaited.pop(handoff, None)
            self.endings[handoff] = CANCELLED
        self.answering.cancel(handoff)

    def pass_time(self, share: float) -> None:
        """Nobody looks yet."""
        self.producer.clock.advance(share * LEASE_S)

    def tick(self) -> None:
        self.table.tick()
        self.let_time_tell()

    # --- at any time

    @invariant()
    def holders_hear_what_they_must_and_once(self) -> None:
        assert Counter(self.producer.released) == Counter(self.released.items())
        assert Counter(self.producer.abandoned) == Counter(self.abandoned.items())

    @invariant()
    def pieces_are_let_go_of_when_it_is_over_and_once(self) -> None:
        assert Counter(self.producer.unpacked) == Counter(self.unpacked)

    @invariant()
    def what_is_open_is_known(self) -> None:
        assert len(self.table) == len(self.claims)
        assert self.table.num_awaited == len(self.awaited)

    def teardown(self) -> None:
        """Every holder ends, and time passes."""
        while self.running:
            self.seal(len(self.running))
        self.pass_time(1.0)
        self.tick()
        self.holders_hear_what_they_must_and_once()
        self.pieces_are_let_go_of_when_it_is_over_and_once()
        assert len(self.table) == self.table.num_awaited == 0
        assert self.table.tick() is None, "a lease without an export"
        assert {self.table.state_of(handoff) for handoff in self.ids} <= {
            ExportState.UNKNOWN, COMMITTED, CANCELLED, EXPIRED
        }  # fmt: skip


# Without shrinking, which cannot shorten what comes from a seed.
AnyOrder.TestCase.settings = settings(
    max_examples=150, stateful_step_count=5, deadline=None, phases=[Phase.generate]
)
TestWhateverHappensBlocksAreHeldAsPromised = AnyOrder.TestCase
