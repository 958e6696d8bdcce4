"""A fetch of several segments: what it comes to is a prefix of the prompt."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.fakes.clock import FakeClock
from tests.fakes.fetching import HERE, KV, TOKENS, FetchingCluster
from tests.fakes.sources import FakeReading, FakeSources
from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.errors import OTHER_KV, Reason
from vllm_pd_plugin.ids import Source, new_handoff_id, new_incarnation
from vllm_pd_plugin.packing.incoming import Packing
from vllm_pd_plugin.transfer.fetch import Fetch
from vllm_pd_plugin.transfer.reading import Arrived
from vllm_pd_plugin.transfer.specs import FetchCounts, FetchResult, FetchSpec, Segment

SPLIT, END = 16, 40


def somewhere() -> Source:
    return Source(new_handoff_id(), ("127.0.0.1", 7000), new_incarnation())


class Two:
    """A fetch whose first tokens come from one source, and the others from another."""

    def __init__(self, first_token: int = 0) -> None:
        self.clock = FakeClock()
        self.results: list[FetchResult] = []
        tokens = (range(first_token, SPLIT), range(SPLIT, END))
        segments = tuple(Segment(part, somewhere()) for part in tokens)
        sources = FakeSources()
        self.fetch = Fetch(
            FetchSpec("c", segments, ((7, 9, 4),), is_last=False),
            sources.open,
            self.clock,
            self._attend,
            lambda _, result: self.results.append(result),
        )
        self.first, self.second = sources.opened

    def _attend(self, fetch: Fetch, act: Callable[[], None]) -> None:
        act()

    def begin(self) -> Two:
        self.fetch.begin()
        return self

    @property
    def result(self) -> FetchResult:
        (result,) = self.results
        return result


@pytest.fixture
def two() -> Two:
    return Two().begin()


# --- both are good -----------------------------------------------------------------------------


def test_all_segments_are_read_together(two: Two) -> None:
    assert (two.first.begun, two.second.begun) == (1, 1)
    two.first.poll_in_s, two.second.poll_in_s = 3.0, 2.0
    assert two.fetch.wait_s() == 2.0
    two.fetch.poll()
    assert (two.first.polled, two.second.polled) == (1, 1)


@pytest.mark.parametrize("order", ["first", "second"])
def test_a_fetch_ends_well_when_all_of_its_segments_are_valid(two: Two, order: str) -> None:
    early, late = (two.first, two.second) if order == "first" else (two.second, two.first)
    early.succeed()
    assert two.results == []
    two.fetch.poll()
    assert (early.polled, late.polled) == (0, 1), "one that has ended is not polled"
    two.clock.advance(2.5)
    late.succeed()
    assert (two.result.reason, two.result.valid_tokens) == (None, END)
    assert two.result.seconds == 2.5


def test_a_result_has_what_all_segments_have_brought() -> None:
    two = Two().begin()
    two.first.arrived = Arrived(FetchCounts(1, 2, 3, 4, 5), Codec.INT8, None)
    two.second.arrived = Arrived(FetchCounts(10, 20, 30, 40, 50), Codec.RAW, 17)
    two.first.succeed()
    two.second.succeed()
    assert two.result.counts == FetchCounts(11, 22, 33, 44, 55)
    assert two.result.codec is Codec.INT8, "the narrowest"
    assert two.result.sampled == 17, "what follows the last of them"


def test_a_token_that_follows_another_segment_than_the_last_is_not_the_prompt_s() -> None:
    two = Two().begin()
    two.first.arrived = Arrived(FetchCounts(), Codec.RAW, 17)
    two.first.succeed()
    two.second.succeed()
    assert two.result.sampled is None


# --- one fails ---------------------------------------------------------------------------------


def test_the_first_is_kept_when_the_second_fails(two: Two) -> None:
    two.first.succeed()
    two.second.fail(Reason.PEER_UNREACHABLE)
    assert (two.result.reason, two.result.valid_tokens) == (Reason.PEER_UNREACHABLE, SPLIT)


def test_what_is_before_a_segment_that_failed_goes_on_and_is_kept(two: Two) -> None:
    two.second.valid_tokens = SPLIT + 8
    two.second.fail(Reason.PEER_UNREACHABLE)
    assert two.first.given_up == []
    assert two.results == []
    two.first.succeed()
    assert (two.result.reason, two.result.valid_tokens) == (Reason.PEER_UNREACHABLE, SPLIT + 8)


def test_what_is_behind_a_segment_that_failed_is_given_up(two: Two) -> None:
    two.second.valid_tokens = SPLIT + 8
    two.first.fail(Reason.READ_FAILED)
    assert two.second.given_up == [Reason.CANCELLED]
    assert (two.result.reason, two.result.valid_tokens) == (Reason.READ_FAILED, 0)


def test_a_segment_counts_only_if_all_before_it_are_valid(two: Two) -> None:
    two.second.succeed()
    two.first.valid_tokens = 8
    two.first.fail(Reason.READ_FAILED)
    assert two.result.valid_tokens == 8


def test_both_that_fail_leave_what_the_first_has_made_valid_and_the_reason_of_the_earlier(
    two: Two,
) -> None:
    two.first.valid_tokens, two.second.valid_tokens = 8, SPLIT + 8
    two.second.fail(Reason.PEER_UNREACHABLE)
    two.first.fail(Reason.READ_FAILED)
    assert (two.result.reason, two.result.valid_tokens) == (Reason.PEER_UNREACHABLE, 8)


def test_nothing_is_reported_while_a_segment_that_was_given_up_writes(two: Two) -> None:
    two.second.writes = True
    two.first.fail(Reason.READ_FAILED)
    assert two.results == []
    two.second.fail(Reason.CANCELLED)
    assert two.result.reason is Reason.READ_FAILED


def test_one_that_fails_before_the_next_has_begun_ends_the_fetch() -> None:
    two = Two()
    two.first.fails_at_once = Reason.PEER_UNREACHABLE
    two.begin()
    assert two.second.begun == 0
    assert two.result.reason is Reason.PEER_UNREACHABLE


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("reason", sorted(OTHER_KV))
def test_nothing_is_kept_where_either_may_be_another_model_s(
    two: Two, reason: Reason, order: str
) -> None:
    two.first.valid_tokens = 8
    reasons = [Reason.READ_FAILED, reason] if order == "first" else [reason, Reason.READ_FAILED]
    two.second.fail(reasons[0])
    two.first.fail(reasons[1])
    assert two.result.valid_tokens == 0


# --- ending all of it ----------------------------------------------------------------------------


def test_a_cancel_ends_every_segment_and_keeps_the_prefix(two: Two) -> None:
    two.first.writes = True
    two.first.valid_tokens, two.second.valid_tokens = 8, SPLIT + 8
    two.fetch.fail(Reason.ABORTED)
    assert two.results == []
    two.first.fail(Reason.ABORTED)
    assert (two.result.reason, two.result.valid_tokens) == (Reason.ABORTED, 8)


def test_a_refusal_ends_every_segment_for_good(two: Two) -> None:
    two.fetch.refuse()
    assert two.result.reason is Reason.INTERNAL
    assert two.result.is_last


def test_one_that_cannot_be_given_up_either_is_cut_off(two: Two) -> None:
    two.first.writes = two.second.writes = True
    two.fetch.give_up()
    assert not two.first.is_cut_off
    two.fetch.give_up()
    assert two.first.is_cut_off
    assert two.second.is_cut_off
    assert two.result.reason is Reason.INTERNAL


# --- another attempt -----------------------------------------------------------------------------


def test_a_segment_is_tried_again_where_its_source_says_so(two: Two) -> None:
    another = FakeReading(two.second.segment, two.fetch)
    two.second.successor = another
    two.second.fail(Reason.READ_FAILED)
    assert (another.begun, two.first.begun) == (1, 1)
    two.fetch.poll()
    assert (another.polled, two.second.polled) == (1, 0)
    two.first.succeed()
    assert two.results == []
    another.succeed()
    assert (two.result.reason, two.result.valid_tokens) == (None, END)


def test_an_attempt_that_fails_at_once_is_the_segment_s_end_where_no_other_follows(
    two: Two,
) -> None:
    two.first.successor = FakeReading(
        two.first.segment, two.fetch, fails_at_once=Reason.PEER_UNREACHABLE
    )
    two.first.fail(Reason.READ_FAILED)
    assert two.second.given_up == [Reason.CANCELLED]
    assert two.result.reason is Reason.PEER_UNREACHABLE


# --- with peers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [None, Packing.ALWAYS])
def test_two_handoffs_of_one_prompt_give_a_segment_each(packing: Packing | None) -> None:
    cluster = FetchingCluster(packing)
    cluster.producer.fill([5], 0x22)
    cluster.producer.fill([6], KV)
    one = cluster.producer.produce("p1", [6, 5], TOKENS)
    other = cluster.producer.produce("p2", [5, 6], TOKENS)
    segments = (Segment(range(4), one), Segment(range(4, TOKENS), other))
    spec = FetchSpec("c", segments, (tuple(HERE),))
    cluster.consumer.specs["c"] = spec
    cluster.consumer.plane.fetch(spec)
    cluster.settle()
    assert cluster.consumer.outcome("c") is None
    assert cluster.consumer.holds(HERE, KV), "each has brought its own tokens only"
    assert sorted(cluster.producer.released()) == ["p1", "p2"]
    assert set(cluster.consumer.open_handoffs().values()) == {0}
