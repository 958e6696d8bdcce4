"""An attempt to read from a peer goes the ways that the table has, all of them, and no other."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.fakes.streaming import HERE, TIMEOUTS, TOKENS, VOUCH_S, StreamingCluster
from vllm_pd_plugin.errors import PeerError, Reason
from vllm_pd_plugin.packing.incoming import Packing
from vllm_pd_plugin.transfer import states
from vllm_pd_plugin.transfer.states import ENDS, TRANSITIONS, FetchEvent, FetchState

Transition = tuple[FetchState, FetchEvent]


class Attempt(StreamingCluster):
    """A fetch that a test brings so far, and then lets something happen to."""

    def come_to(self, state: FetchState) -> None:
        if state is FetchState.CONNECTING:
            self.consumer.fetch("c", self.producer.begin("p", TOKENS), HERE, TOKENS)
        elif state is FetchState.FETCHING:
            self.start()
        elif state in (FetchState.CHECKING, FetchState.COMMITTING):
            self.start_reading()
            self.consumer.transport.finish_reads()
            self.consumer.look_at_reads()
        else:
            assert state is FetchState.DRAINING
            self.start_reading()
            self.cancel_fetch()
        assert self.consumer.attempt("c").state is state

    def let(self, event: FetchEvent) -> None:
        HAPPENINGS[event](self)

    # --- what happens

    def cancel_fetch(self) -> None:
        self.consumer.plane.cancel("c", Reason.ABORTED)

    def read_all(self) -> None:
        self.compute(range(TOKENS))
        self.settle()

    def preempt(self) -> None:
        self.producer.preempt("p")
        self.settle()

    def read_and_cancel(self) -> None:
        self.consumer.transport.holds_reads = True
        self.read_all()
        self.cancel_fetch()

    def end_reads(self) -> None:
        self.consumer.transport.finish_reads()
        self.settle()

    def lose(self, reason: Reason) -> None:
        error = PeerError(reason, "gone")
        self.consumer.plane._peers._peers.drop(self.producer_address, error)


HAPPENINGS: dict[FetchEvent, Callable[[Attempt], None]] = {
    FetchEvent.SUBSCRIBED: Attempt.settle,
    FetchEvent.NEW_EPOCH: Attempt.preempt,
    FetchEvent.ALL_READ: Attempt.read_all,
    FetchEvent.ALL_READ_UNCHECKED: Attempt.read_all,
    FetchEvent.BYTES_EQUAL: Attempt.settle,
    FetchEvent.COMMITTED: Attempt.settle,
    FetchEvent.FAILED: Attempt.cancel_fetch,
    FetchEvent.FAILED_WRITING: Attempt.read_and_cancel,
    FetchEvent.READS_ENDED: Attempt.end_reads,
    FetchEvent.PEER_LOST: lambda attempt: attempt.lose(Reason.PEER_UNREACHABLE),
    FetchEvent.INTERRUPTED: lambda attempt: attempt.lose(Reason.READ_FAILED),
}


@pytest.fixture
def followed(monkeypatch: pytest.MonkeyPatch) -> list[Transition]:
    """The transitions that were made, in order."""
    made: list[Transition] = []
    follow = states.follow

    def note(state: FetchState, event: FetchEvent) -> FetchState:
        made.append((state, event))
        return follow(state, event)

    monkeypatch.setattr(states, "follow", note)
    return made


@pytest.mark.parametrize(
    "transition", TRANSITIONS, ids=[f"{s.name}-{e.name}" for s, e in TRANSITIONS]
)
def test_every_transition_is_made(transition: Transition, followed: list[Transition]) -> None:
    state, event = transition
    checks_bytes = state is FetchState.CHECKING or event is FetchEvent.ALL_READ_UNCHECKED
    attempt = Attempt(checks_bytes=checks_bytes)
    attempt.come_to(state)
    reading = attempt.consumer.attempt("c")
    followed.clear()
    attempt.let(event)
    assert followed[0] == transition
    if TRANSITIONS[transition] in ENDS:
        assert reading.state is TRANSITIONS[transition]
        assert reading.has_ended


@pytest.mark.parametrize("end", sorted(ENDS, key=lambda state: state.value))
def test_an_attempt_that_has_ended_stays_so(end: FetchState) -> None:
    assert not [state for state, _ in TRANSITIONS if state is end]


def test_an_attempt_that_was_interrupted_ends_with_its_reason_and_another_begins() -> None:
    attempt = Attempt()
    attempt.come_to(FetchState.FETCHING)
    first = attempt.consumer.attempt("c")
    attempt.lose(Reason.READ_FAILED)
    second = attempt.consumer.attempt("c")
    assert second is not first
    assert (first.state, first.reason) == (FetchState.INTERRUPTED, Reason.READ_FAILED)
    assert (second.state, second.reason) == (FetchState.CONNECTING, None)
    attempt.settle()
    attempt.read_all()
    assert attempt.consumer.outcome("c") is None
    assert second.state is FetchState.DONE


def test_the_third_attempt_is_the_last() -> None:
    attempt = Attempt()
    attempt.come_to(FetchState.FETCHING)
    for _ in range(2):
        attempt.lose(Reason.READ_FAILED)
        attempt.settle()
        assert attempt.consumer.attempt("c").state is FetchState.FETCHING
    attempt.lose(Reason.READ_FAILED)
    assert attempt.consumer.outcome("c") is Reason.READ_FAILED


def test_a_fetch_that_is_cancelled_between_two_attempts_begins_no_other() -> None:
    attempt = Attempt()
    attempt.come_to(FetchState.FETCHING)
    attempt.lose(Reason.READ_FAILED)
    attempt.cancel_fetch()
    assert attempt.consumer.outcome("c") is Reason.ABORTED
    attempt.settle()
    assert not attempt.consumer.plane._fetches


def test_a_piece_that_comes_while_reads_are_waited_for_does_not_prolong_that() -> None:
    attempt = Attempt(packing=Packing.ALWAYS)
    attempt.consumer.transport.holds_reads = True
    attempt.start()
    attempt.compute(range(8))
    attempt.settle()
    attempt.compute(range(8, TOKENS))
    attempt.deliver_until("packed")
    attempt.cancel_fetch()
    attempt.settle()
    assert attempt.network.delivered.count("packed") == 2
    assert attempt.consumer.attempt("c").state is FetchState.DRAINING
    attempt.pass_time(TIMEOUTS.drain_s)
    assert attempt.consumer.outcome("c") is Reason.ABORTED


def test_what_was_vouched_for_counts_until_another_attempt_writes_it_anew() -> None:
    attempt = Attempt()
    attempt.start()
    attempt.compute(range(8))
    attempt.settle()
    attempt.clock.advance(VOUCH_S)
    attempt.settle()
    attempt.lose(Reason.READ_FAILED)
    assert attempt.consumer.attempt("c").valid_tokens == 8, "nothing has been written since"
    attempt.settle()
    assert attempt.consumer.attempt("c").valid_tokens == 0
    attempt.cancel_fetch()
    assert attempt.consumer.result("c").valid_tokens == 0
