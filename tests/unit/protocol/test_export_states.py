"""The table of an export's transitions: each is reached, does what it says, and no pair is left
out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from tests.fakes.producer import BLOCKS, LEASE_S, RANK_0, SCHEDULER, TOKENS, Producer
from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.ids import HandoffId, new_handoff_id
from vllm_pd_plugin.protocol import exports, wire
from vllm_pd_plugin.protocol.export_states import (
    IGNORED,
    TRANSITIONS,
    Action,
    ExportEvent,
    ExportState,
)

S, E, A = ExportState, ExportEvent, Action
NOBODY = (S.UNKNOWN, S.AWAITED)
OPEN = (S.QUEUED, S.GROWING, S.SEALED)
UNSEALED = (S.COMMITTED_UNSEALED, S.CANCELLED_UNSEALED, S.EXPIRED_UNSEALED)
OVER = (S.COMMITTED, S.CANCELLED, S.EXPIRED)
Pair = tuple[ExportState, ExportEvent]


def names(pairs: list[Pair]) -> list[Any]:
    return [pytest.param(*pair, id=f"{pair[0].name}-{pair[1].name}") for pair in pairs]


# --- on paper --------------------------------------------------------------------------------


def test_every_pair_of_a_state_and_an_event_either_has_a_transition_or_a_reason_why_not() -> None:
    assert TRANSITIONS.keys() | IGNORED.keys() == set(itertools.product(S, E))
    assert not TRANSITIONS.keys() & IGNORED.keys()
    assert all(IGNORED.values())


def test_every_state_is_of_one_sort() -> None:
    assert {*NOBODY, *OPEN, *UNSEALED, *OVER} == set(S)
    assert {state for state in S if state.is_open} == set(OPEN)
    assert {state for state in S if state.is_over} == set(OVER)
    assert [state.outcome for state in (*UNSEALED, *OVER)] == [*OVER, *OVER]
    assert {state.outcome for state in (*NOBODY, *OPEN)} == {None}


def test_blocks_are_released_only_and_always_when_what_was_sealed_is_over() -> None:
    for (state, event), (after, actions) in TRANSITIONS.items():
        was_sealed = state is S.SEALED or event is E.SEALED
        assert (A.RELEASE in actions) == (was_sealed and after.is_over), (state, event)


def test_what_is_no_longer_open_has_no_lease_and_nothing_in_the_staging_memory() -> None:
    for (state, event), (after, actions) in TRANSITIONS.items():
        closes = state.is_open and not after.is_open
        assert (A.UNSTAGE in actions) == closes, (state, event)
        leaves = closes or (state is S.AWAITED and after not in (S.AWAITED, S.QUEUED))
        assert (A.END_LEASE in actions) == leaves, (state, event)


def test_only_a_holder_that_still_makes_it_hears_that_nobody_wants_it() -> None:
    for (state, event), (after, actions) in TRANSITIONS.items():
        if A.ABANDON in actions:
            assert after in UNSEALED, (state, event)
    kept = {p for p, (to, acts) in TRANSITIONS.items() if to in UNSEALED and A.ABANDON not in acts}
    assert kept == {(S.GROWING, E.COMMITTED), (S.GROWING, E.BLOCKS_LOST)}


def test_nothing_that_is_over_is_open_again() -> None:
    reachable = set(OVER)
    while more := {to for (state, _), (to, _) in TRANSITIONS.items() if state in reachable} - (
        reachable
    ):
        reachable |= more
    assert reachable == {*OVER, *UNSEALED}


def test_whatever_is_open_can_end_and_then_its_blocks_are_free() -> None:
    """By its consumer's silence, whatever else happens; with its holder's own end before the
    seal."""
    assert TRANSITIONS[S.SEALED, E.EXPIRED].state in OVER
    for state in (S.QUEUED, S.GROWING):
        after = TRANSITIONS[state, E.EXPIRED].state
        assert {TRANSITIONS[after, event].state for event in (E.SEALED, E.DROPPED)} == {S.EXPIRED}


# --- in the table of exports -----------------------------------------------------------------


def queued(producer: Producer) -> HandoffId:
    """Wanted, and a rank has subscribed and wants a piece of it."""
    handoff = producer.queued()
    producer.answering.want(handoff, SCHEDULER)
    producer.subscribe(handoff, 0, RANK_0)
    pack = wire.Pack(handoff, 0, 0, 0, 1, Codec.RAW, TOKENS, (), False)
    assert isinstance(producer.pack(pack), wire.Stage)
    return handoff


def growing(producer: Producer) -> HandoffId:
    handoff = queued(producer)
    producer.table.open(handoff)
    producer.compute(handoff, TOKENS)
    return handoff


def sealed(producer: Producer) -> HandoffId:
    handoff = growing(producer)
    producer.seal(handoff)
    return handoff


def awaited(producer: Producer) -> HandoffId:
    handoff = new_handoff_id()
    producer.answering.want(handoff, SCHEDULER)
    return handoff


def ended(
    begin: Callable[[Producer], HandoffId], how: ExportEvent
) -> Callable[[Producer], HandoffId]:
    def reach(producer: Producer) -> HandoffId:
        handoff = begin(producer)
        happen(producer, handoff, how)
        return handoff

    return reach


REACH: dict[ExportState, Callable[[Producer], HandoffId]] = {
    S.UNKNOWN: lambda producer: new_handoff_id(),
    S.AWAITED: awaited,
    S.QUEUED: queued,
    S.GROWING: growing,
    S.SEALED: sealed,
    **{to: ended(growing, E[to.name.removesuffix("_UNSEALED")]) for to in UNSEALED},
    **{to: ended(sealed, E[to.name]) for to in OVER},
}


def happen(producer: Producer, handoff: HandoffId, event: ExportEvent) -> list[wire.Message]:
    """Bring an event about by what brings it about; returns what is said unasked."""
    table = producer.table
    match event:
        case E.ENQUEUED:
            table.enqueue(handoff, "r", TOKENS, b"digest")
        case E.REPLACED:
            table.enqueue(handoff, "another", TOKENS, b"digest")
        case E.OPENED:
            return [message for _, message in table.open(handoff)]
        case E.WITHDRAWN:
            return [message for _, message in table.withdraw(handoff, 1)]
        case E.BLOCKS_LOST:
            producer.advance(handoff, TOKENS, ([0, 2, 3], [4]))
        case E.SEALED:
            return [message for _, message in producer.seal(handoff)]
        case E.DROPPED:
            return [message for _, message in table.drop(handoff)]
        case E.WANTED:
            producer.answering.want(handoff, SCHEDULER)
        case E.COMMITTED:
            producer.commit(handoff)
        case E.CANCELLED:
            producer.answering.cancel(handoff)
        case E.EXPIRED:
            producer.expire()
        case E.VOIDED:
            table.void()
    return []


SAID = {
    wire.Offer: A.OFFER,
    wire.Progress: A.TELL,
    wire.Seal: A.TELL,
    wire.Refuse: A.REFUSE,
}


def done(producer: Producer, handoff: HandoffId, event: ExportEvent) -> set[Action]:
    """Let an event happen; return what was seen to follow."""
    before = (list(producer.released), list(producer.abandoned), list(producer.unpacked))
    lease = producer.table.tick()
    producer.clock.advance(1)
    actions = {SAID[type(message)] for message in happen(producer, handoff, event)}
    now = (producer.released, producer.abandoned, producer.unpacked)
    for was, is_now, action in zip(before, now, (A.RELEASE, A.ABANDON, A.UNSTAGE), strict=True):
        assert len(is_now) - len(was) in (0, 1), f"more than once: {action}"
        if is_now != was:
            actions.add(action)
    renewed = producer.table.tick()
    if lease is not None and renewed is None:
        actions.add(A.END_LEASE)
    elif renewed != lease:
        assert renewed == producer.clock() + LEASE_S
        actions.add(A.RENEW)
    return actions


@pytest.mark.parametrize(("state", "event"), names(list(TRANSITIONS)))
def test_each_transition_is_reached_and_does_what_it_says(
    monkeypatch: pytest.MonkeyPatch, state: ExportState, event: ExportEvent
) -> None:
    reached: list[Pair] = []

    class Noting(dict[Pair, Any]):
        def get(self, pair: Pair, default: Any = None) -> Any:
            reached.append(pair)
            return super().get(pair, default)

    monkeypatch.setattr(exports, "TRANSITIONS", Noting(TRANSITIONS))
    producer = Producer()
    handoff = REACH[state](producer)
    assert producer.table.state_of(handoff) is state
    reached.clear()
    actions = done(producer, handoff, event)
    after, expected = TRANSITIONS[state, event]
    if event is E.REPLACED:  # and the holder that comes then finds its id used
        assert reached == [(state, event), (S.CANCELLED, E.ENQUEUED)]
        assert producer.abandoned[-1] == ("another", S.CANCELLED)
        assert actions - {A.ABANDON} == set(expected)
        return
    assert (state, event) in reached
    assert producer.table.state_of(handoff) is after
    assert actions == set(expected)
    for action, told in (A.RELEASE, producer.released), (A.ABANDON, producer.abandoned):
        if action in expected:
            assert told[-1] == ("r", after.outcome)


ELSEWHERE = {
    pair for pair in IGNORED
    if pair[1] in (E.ENQUEUED, E.WANTED) or pair[0] in NOBODY and pair[1] in (E.SEALED, E.REPLACED)
} | {(state, E.REPLACED) for state in OVER}  # fmt: skip
"""What is answered, or becomes another event, before the table is asked."""


@pytest.mark.parametrize(("state", "event"), names([p for p in IGNORED if p not in ELSEWHERE]))
def test_what_is_ignored_changes_nothing(state: ExportState, event: ExportEvent) -> None:
    producer = Producer()
    handoff = REACH[state](producer)
    if event is E.EXPIRED:
        assert producer.table.tick() is None, "it would not come"
    assert done(producer, handoff, event) == set()
    assert producer.table.state_of(handoff) is state


def test_a_holder_whose_export_is_forgotten_may_free_its_blocks(producer: Producer) -> None:
    producer.seal(new_handoff_id(), "long ago", TOKENS, BLOCKS)
    assert producer.released == [("long ago", S.CANCELLED)]


def test_one_that_was_committed_before_its_seal_is_refused_to_who_wants_it_then(
    producer: Producer,
) -> None:
    handoff = growing(producer)
    producer.commit(handoff)
    answer = producer.answering.want(handoff, SCHEDULER)
    assert answer == wire.Refuse(handoff, S.COMMITTED.refusal)
    assert producer.table.num_awaited == 0
