from __future__ import annotations

import pytest

from vllm_pd_plugin.ids import Incarnation, Source, new_handoff_id, new_incarnation
from vllm_pd_plugin.protocol.wants import TRANSITIONS, ConsumerTable, Wanted, WantEvent, WantState

LATER = 1e9
KNOWN = new_incarnation()


def source(port: int = 7000, incarnation: Incarnation | None = KNOWN) -> Source:
    return Source(new_handoff_id(), ("127.0.0.1", port), incarnation)


def test_an_offer_reaches_the_request_that_waits_for_it() -> None:
    table, wanted_from = ConsumerTable(), source()
    wanted = table.want("r", wanted_from, LATER)
    assert wanted is not None
    assert not wanted.is_offered
    assert table.offered(wanted_from.handoff_id, KNOWN) is wanted
    assert wanted.is_offered


def test_an_offer_counts_once() -> None:
    table, wanted_from = ConsumerTable(), source()
    table.want("r", wanted_from, LATER)
    table.offered(wanted_from.handoff_id, KNOWN)
    assert table.offered(wanted_from.handoff_id, KNOWN) is None


def test_an_offer_of_another_incarnation_is_ignored() -> None:
    table, wanted_from = ConsumerTable(), source()
    wanted = table.want("r", wanted_from, LATER)
    assert table.offered(wanted_from.handoff_id, new_incarnation()) is None
    assert wanted is not None
    assert not wanted.is_offered


def test_an_offer_that_nobody_waits_for_is_ignored() -> None:
    table = ConsumerTable()
    assert table.offered(new_handoff_id(), new_incarnation()) is None


def test_two_requests_cannot_want_the_same_handoff() -> None:
    table, wanted_from = ConsumerTable(), source()
    wanted = table.want("first", wanted_from, LATER)
    assert table.want("second", wanted_from, LATER) is None
    assert table.close("second") is None
    assert table.get(wanted_from.handoff_id) is wanted


def test_a_closed_handoff_may_be_wanted_again() -> None:
    table, wanted_from = ConsumerTable(), source()
    table.want("first", wanted_from, LATER)
    table.close("first")
    assert table.want("second", wanted_from, LATER) is not None


def test_a_handoff_is_closed_once() -> None:
    table, wanted_from = ConsumerTable(), source()
    wanted = table.want("r", wanted_from, LATER)
    assert len(table) == 1
    assert table.close("r") is wanted
    assert table.close("r") is None
    assert table.get(wanted_from.handoff_id) is None
    assert table.offered(wanted_from.handoff_id, KNOWN) is None
    assert len(table) == 0


def test_what_is_wanted_is_found_by_peer() -> None:
    table = ConsumerTable()
    a, b, c = (
        table.want(name, source(port), LATER) for name, port in zip("abc", (1, 2, 1), strict=True)
    )
    assert table.at(("127.0.0.1", 1)) == [a, c]
    assert table.at(("127.0.0.1", 2)) == [b]
    assert table.at(("127.0.0.1", 3)) == []
    assert table.is_wanted_from(("127.0.0.1", 2))
    table.close("b")
    assert not table.is_wanted_from(("127.0.0.1", 2))
    assert table.is_wanted_from(("127.0.0.1", 1))


def test_a_request_without_blocks_is_overdue_at_its_deadline() -> None:
    table = ConsumerTable()
    early, late = table.want("early", source(), 10.0), table.want("late", source(), 20.0)
    assert table.next_deadline() == 10.0
    assert table.overdue(9.999) == []
    assert table.overdue(10.0) == [early]
    assert table.overdue(10.0) == []
    assert table.overdue(20.0) == [early, late], "what was not closed is overdue again, later"
    table.close("early")
    table.close("late")
    assert table.next_deadline() is None


def test_a_request_that_has_its_blocks_is_never_overdue() -> None:
    table = ConsumerTable()
    table.want("r", source(), 10.0)
    table.allocated("r")
    assert table.next_deadline() is None
    assert table.overdue(1e9) == []


def test_blocks_for_a_request_that_is_over_change_nothing() -> None:
    table = ConsumerTable()
    table.allocated("nobody")
    assert len(table) == 0


def test_a_source_without_an_incarnation_may_be_asked_again_until_it_has_offered() -> None:
    table, wanted_from = ConsumerTable(), source(incarnation=None)
    wanted = table.want("r", wanted_from, LATER)
    assert wanted is not None
    wanted.source = source()
    wanted.follow(WantEvent.ASK)
    assert wanted.ask_again()
    assert wanted.source.incarnation is None
    assert not wanted.is_asked
    wanted.follow(WantEvent.OFFER)
    assert not wanted.ask_again()


def test_a_source_with_an_incarnation_is_not_asked_again() -> None:
    wanted = ConsumerTable().want("r", source(), LATER)
    assert wanted is not None
    wanted.follow(WantEvent.ASK)
    assert not wanted.ask_again()
    assert wanted.source.incarnation == KNOWN


# --- how far a want is -------------------------------------------------------------------------

BEFORE: dict[WantState, list[WantEvent]] = {
    WantState.NEW: [],
    WantState.ASKED: [WantEvent.ASK],
    WantState.DOUBTED: [WantEvent.ASK, WantEvent.DOUBT],
    WantState.ASKED_ANEW: [WantEvent.ASK, WantEvent.DOUBT, WantEvent.ASK],
    WantState.OFFERED: [WantEvent.ASK, WantEvent.OFFER],
}


def want_at(state: WantState) -> Wanted:
    wanted = Wanted("r", source(), accepts_any=True)
    for event in BEFORE[state]:
        wanted.follow(event)
    assert wanted.state is state
    return wanted


@pytest.mark.parametrize("state", WantState)
@pytest.mark.parametrize("event", WantEvent)
def test_a_want_goes_on_as_the_table_says_and_no_other_way(
    state: WantState, event: WantEvent
) -> None:
    wanted = want_at(state)
    if (state, event) in TRANSITIONS:
        wanted.follow(event)
        assert wanted.state is TRANSITIONS[state, event]
    else:
        with pytest.raises(KeyError):
            wanted.follow(event)


@pytest.mark.parametrize(
    ("state", "doubt", "restart"),
    [
        (WantState.NEW, WantState.DOUBTED, None),
        (WantState.ASKED, WantState.DOUBTED, WantState.NEW),
        (WantState.DOUBTED, None, None),
        (WantState.ASKED_ANEW, None, WantState.DOUBTED),
    ],
)
def test_what_is_doubted_is_asked_for_once_more_and_a_restart_does_not_excuse_it(
    state: WantState, doubt: WantState | None, restart: WantState | None
) -> None:
    doubted, restarted = want_at(state), want_at(state)
    assert doubted.doubt() is (doubt is not None)
    assert doubted.state is (doubt or state)
    if restart is not None:
        assert restarted.ask_again()
        assert restarted.state is restart


@pytest.mark.parametrize("state", WantState)
def test_only_what_its_producer_has_been_asked_for_is_kept_alive(state: WantState) -> None:
    is_asked = state not in (WantState.NEW, WantState.DOUBTED)
    assert want_at(state).is_asked is is_asked
