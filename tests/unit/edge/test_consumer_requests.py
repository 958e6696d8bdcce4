"""Requests whose KV comes from elsewhere, with a recorder in place of the control thread."""

from __future__ import annotations

import dataclasses
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_pd_plugin.codecs.codec import Codec, CodecChoice
from vllm_pd_plugin.errors import OTHER_KV, ParamsError, Reason
from vllm_pd_plugin.ids import Source
from vllm_pd_plugin.protocol.events import Lost, Offered
from vllm_pd_plugin.transfer.specs import Segment

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from tests.fakes.consumer import (
        BIT_FOR_BIT,
        BLOCKS,
        PINNED,
        TOKENS,
        Consumer,
        FakeRequest,
        new_source,
    )
    from vllm_pd_plugin.edge.consumer_request import FetchOrders


@pytest.fixture
def consumer() -> Consumer:
    return Consumer()


def test_a_request_is_asked_for_when_it_arrives(consumer: Consumer) -> None:
    source = new_source()
    consumer.add("r", source)
    assert consumer.control.calls == [("want", "r", source)]


def test_a_request_of_somebody_else_matches_nothing(consumer: Consumer) -> None:
    assert consumer.match(FakeRequest("other", [1])) == (0, False)


def test_no_blocks_are_allocated_before_the_offer(consumer: Consumer) -> None:
    request = consumer.add()
    assert consumer.match(request) == (None, False)
    consumer.offer(request)
    assert consumer.match(request) == (TOKENS, True)


def test_only_what_is_missing_is_fetched_from_who_has_offered(consumer: Consumer) -> None:
    request = consumer.add()
    consumer.offer(request)
    assert consumer.match(request, 16) == (TOKENS - 16, True)
    consumer.allocate(request, TOKENS - 16)
    (spec,) = consumer.requests.take_orders().fetches
    assert spec.segments == (Segment(range(16, TOKENS), PINNED),)
    assert spec.blocks == BLOCKS
    assert consumer.requests.take_orders().fetches == ()


@pytest.mark.parametrize("cached", [TOKENS - 1, TOKENS])
def test_a_handoff_of_which_nothing_is_missing_is_cancelled(
    consumer: Consumer, cached: int
) -> None:
    request = consumer.add()
    consumer.offer(request)
    assert consumer.match(request, cached) == (0, False)
    consumer.allocate(request, 0)
    assert consumer.control.calls[-1] == ("close", "r", True)
    assert len(consumer.requests) == 0
    assert consumer.stats.is_empty()


def test_a_handoff_that_vllm_does_not_load_is_cancelled_and_counted(consumer: Consumer) -> None:
    request = consumer.add()
    consumer.offer(request)
    consumer.match(request)
    consumer.allocate(request, 0)
    assert consumer.stats.data["failures"] == {"not_loaded": 1}
    assert len(consumer.requests) == 0


@pytest.mark.parametrize("offered", [TOKENS - 1, TOKENS + 1])
def test_an_offer_of_another_prompt_is_not_taken(consumer: Consumer, offered: int) -> None:
    request = consumer.add()
    consumer.requests.offered(Offered("r", PINNED, offered, b"digest of another prompt"))
    assert consumer.stats.data["failures"] == {"prompt_mismatch": 1}
    assert consumer.control.calls[-1] == ("close", "r", False)
    assert consumer.match(request) == (1, True)  # staged, to be reported as failed


def test_a_failed_request_is_refused_through_the_workers(consumer: Consumer) -> None:
    request = consumer.add()
    consumer.requests.lost(Lost("r", Reason.PEER_UNREACHABLE, "silence"))
    assert consumer.match(request) == (1, True)
    consumer.allocate(request, 1)
    assert consumer.requests.take_orders().refused == ("r",)
    consumer.collect(request, Reason.INTERNAL)
    assert consumer.stats.data["failures"] == {"peer_unreachable": 1}  # once
    assert len(consumer.requests) == 0


def test_a_failed_request_is_computed_here_where_configured() -> None:
    consumer = Consumer(recomputes=True)
    request = consumer.add()
    consumer.requests.lost(Lost("r", Reason.PEER_UNREACHABLE, "silence"))
    assert consumer.match(request) == (0, False)
    consumer.allocate(request, 0)
    assert len(consumer.requests) == 0


def test_a_request_with_bad_parameters_fails_without_a_word_to_anybody(consumer: Consumer) -> None:
    request = FakeRequest("r", [1, 2])
    consumer.requests.add_failed(request, ParamsError("nonsense"))  # type: ignore[arg-type]
    assert consumer.match(request) == (1, True)
    assert consumer.control.calls == []
    assert consumer.stats.data["failures"] == {"bad_params": 1}


def test_a_fetch_that_ends_well_is_closed(consumer: Consumer) -> None:
    request = consumer.fetching()
    consumer.collect(request)
    assert consumer.control.calls[-1] == ("close", "r", False)
    assert len(consumer.requests) == 0


def test_a_lost_producer_cancels_the_fetch_and_the_workers_report_its_end(
    consumer: Consumer,
) -> None:
    request = consumer.fetching()
    consumer.requests.lost(Lost("r", Reason.PEER_RESTARTED, "another one"))
    assert consumer.requests.take_orders().cancels == {"r": Reason.PEER_RESTARTED}
    assert consumer.stats.is_empty()
    consumer.collect(request, Reason.PEER_RESTARTED)
    assert consumer.stats.data["failures"] == {"peer_restarted": 1}
    assert len(consumer.requests) == 0


def test_what_arrived_of_a_failed_fetch_is_kept_where_the_rest_is_computed_here() -> None:
    consumer = Consumer(recomputes=True)
    request = consumer.fetching()
    consumer.collect(request, Reason.PEER_UNREACHABLE, valid_tokens=32)
    assert request.num_computed_tokens == 32
    assert consumer.stats.data["kept_tokens"] == 32
    consumer.allocate(request, 0)
    assert len(consumer.requests) == 0


@pytest.mark.parametrize("change", sorted(OTHER_KV))
def test_nothing_is_kept_that_is_no_kv_of_this_model_any_more(change: Reason) -> None:
    """Whatever the rank says that heard of it last."""
    consumer = Consumer(recomputes=True)
    request = consumer.fetching()
    consumer.requests.lost(Lost("r", change, "other weights"))
    consumer.collect(request, Reason.PEER_UNREACHABLE, valid_tokens=32)
    assert request.num_computed_tokens == 0
    assert consumer.stats.data["kept_tokens"] == 0


def test_what_comes_before_it_is_said_that_the_weights_were_changed_is_not_used() -> None:
    """The control thread may be late: what is being fetched is void at once."""
    consumer = Consumer(recomputes=True)
    provenance: Any = SimpleNamespace(disown=lambda request: None)
    consumer.requests._provenance = provenance
    request = consumer.fetching()
    consumer.requests.void()
    assert consumer.requests.take_orders().cancels == {"r": Reason.KV_CHANGED}
    consumer.collect(request)
    assert consumer.requests.take_hopeless() == ["r"]
    assert consumer.stats.data["failures"] == {"kv_changed": 1}


def test_what_is_void_on_one_rank_is_not_fetched_anew_from_another_producer() -> None:
    """Another rank may have it all, from before; and so has what was here already."""
    consumer = Consumer(recomputes=True)
    request = consumer.fetching("r", *elsewhere())
    consumer.requests.void()
    consumer.fail_on_a_rank(request, Reason.PEER_UNREACHABLE, attempt=0)
    assert consumer.requests.take_orders().refused == ("r",)
    assert [call[0] for call in consumer.control.calls].count("want") == 1
    consumer.collect(request, Reason.INTERNAL, valid_tokens=32)
    assert request.num_computed_tokens == 0
    assert consumer.stats.data["failures"] == {"peer_unreachable": 1}
    assert consumer.match(request) == (0, False)


def test_what_waits_for_another_producer_with_void_kv_in_its_blocks_fails_at_once() -> None:
    consumer = Consumer(recomputes=True)
    request = consumer.fetching("r", *elsewhere())
    consumer.fail_on_a_rank(request, Reason.PEER_UNREACHABLE, attempt=0)
    consumer.requests.void()
    assert consumer.requests.take_orders().refused == ("r",)
    assert consumer.control.calls[-1] == ("close", "r", True)
    consumer.requests.lost(Lost("r", Reason.KV_CHANGED, "said late"))
    consumer.offer(request)
    assert consumer.requests.take_orders() == FetchOrders((), (), {})
    consumer.collect(request, Reason.INTERNAL, valid_tokens=32)
    assert request.num_computed_tokens == 0
    assert consumer.stats.data["failures"] == {"kv_changed": 1}


def test_what_has_no_blocks_yet_when_the_weights_are_changed_may_be_had_elsewhere() -> None:
    consumer = Consumer(recomputes=True)
    request = consumer.add("r", *elsewhere())
    consumer.requests.void()
    consumer.requests.lost(Lost("r", Reason.KV_CHANGED, "other weights"))
    assert [call[0] for call in consumer.control.calls].count("want") == 2
    consumer.offer(request)
    consumer.match(request)
    consumer.allocate(request, TOKENS)
    assert len(consumer.requests.take_orders().fetches) == 1


def test_what_had_come_before_the_weights_were_changed_is_not_used() -> None:
    """Its commit was granted, and the engine has not heard of it yet."""
    consumer = Consumer(recomputes=True)
    disowned: list[Any] = []
    provenance: Any = SimpleNamespace(disown=disowned.append)
    consumer.requests._provenance = provenance
    request = consumer.fetching()
    consumer.requests.lost(Lost("r", Reason.KV_CHANGED, "other weights"))
    consumer.collect(request)
    assert consumer.requests.take_hopeless() == ["r"]
    assert disowned == [request]
    assert consumer.stats.data["failures"] == {"kv_changed": 1}
    assert len(consumer.requests) == 0


def test_what_is_fetched_anew_from_another_producer_is_kept() -> None:
    consumer = Consumer(recomputes=True)
    first, second = elsewhere()
    request = consumer.fetching("r", first, second)
    consumer.requests.lost(Lost("r", Reason.PEER_INCOMPATIBLE, "other weights"))
    consumer.fail_on_a_rank(request, Reason.PEER_INCOMPATIBLE, attempt=0)
    consumer.offer(request)
    consumer.collect(request)
    assert consumer.requests.take_hopeless() == []
    assert consumer.stats.data["failures"] == {}


def test_nothing_is_kept_where_the_request_fails(consumer: Consumer) -> None:
    request = consumer.fetching()
    consumer.collect(request, Reason.PEER_UNREACHABLE, valid_tokens=32)
    assert request.num_computed_tokens == 0
    assert consumer.stats.data["kept_tokens"] == 0


def test_an_aborted_request_ends_when_its_fetch_has_been_reported() -> None:
    consumer = Consumer(recomputes=True)
    request = consumer.fetching()
    consumer.requests.finish("r")
    assert consumer.requests.take_orders().cancels == {"r": Reason.ABORTED}
    assert len(consumer.requests) == 1
    consumer.collect(request, Reason.ABORTED)
    assert consumer.control.calls[-1] == ("close", "r", True)
    assert len(consumer.requests) == 0


def test_a_request_that_vllm_fails_for_its_fetch_counts_with_the_fetch_s_reason(
    consumer: Consumer,
) -> None:
    """With the policy ``fail`` vLLM ends the request before it hands the results over."""
    request = consumer.fetching()
    consumer.requests.finish("r")
    consumer.collect(request, Reason.READ_FAILED)
    assert consumer.stats.data["failures"] == {"read_failed": 1}
    assert len(consumer.requests) == 0


def test_a_request_that_is_aborted_before_its_fetch_is_forgotten_at_once(
    consumer: Consumer,
) -> None:
    consumer.add()
    consumer.requests.finish("r")
    assert consumer.control.calls[-1] == ("close", "r", True)
    assert len(consumer.requests) == 0


def test_the_second_choice_of_a_request_follows_the_first(consumer: Consumer) -> None:
    source = new_source()
    first, second = consumer.add("0_r", source), consumer.add("1_r", source)
    assert consumer.control.calls == [("want", "0_r", source)]
    consumer.offer(first)
    assert consumer.match(second) == (None, False)
    consumer.match(first)
    consumer.allocate(first, TOKENS)
    consumer.collect(first)
    assert consumer.match(second) == (0, False)  # the blocks are in the prefix cache


def test_events_of_requests_that_have_ended_are_ignored(consumer: Consumer) -> None:
    request = consumer.add()
    consumer.requests.finish("r")
    consumer.offer(request)
    consumer.requests.lost(Lost("r", Reason.CANCELLED, "too late"))
    assert consumer.stats.is_empty()
    assert len(consumer.requests) == 0


# --- several producers -----------------------------------------------------------------------


def elsewhere() -> tuple[Source, Source]:
    first = new_source()
    return first, dataclasses.replace(first, address=("127.0.0.1", 7001))


@pytest.mark.parametrize("is_offered", [False, True])
def test_the_next_producer_is_asked_when_one_is_lost_before_the_fetch(
    consumer: Consumer, is_offered: bool
) -> None:
    first, second = elsewhere()
    request = consumer.add("r", first, second)
    if is_offered:
        consumer.offer(request)
    consumer.requests.lost(Lost("r", Reason.PEER_UNREACHABLE, "silence"))
    assert consumer.control.calls == [("want", "r", first), ("want", "r", second)]
    assert consumer.match(request) == (None, False)
    assert consumer.stats.data["retries"] == {"peer_unreachable": 1}
    assert consumer.stats.data["failures"] == {}
    consumer.requests.lost(Lost("r", Reason.CANCELLED, "no more"))
    assert consumer.stats.data["failures"] == {"cancelled": 1}


def test_a_fetch_that_fails_is_begun_again_from_the_next_producer(consumer: Consumer) -> None:
    first, second = elsewhere()
    request = consumer.add("r", first, second)
    consumer.offer(request)
    consumer.match(request)
    consumer.allocate(request, TOKENS)
    (spec,) = consumer.requests.take_orders().fetches
    assert (spec.attempt, spec.is_last) == (0, False)
    consumer.control.calls.clear()
    consumer.fail_on_a_rank(request, Reason.READ_FAILED, attempt=0)
    assert consumer.control.calls == [("close", "r", True), ("want", "r", second)]
    consumer.fail_on_a_rank(request, Reason.READ_FAILED, attempt=0)  # the other rank, later
    assert len(consumer.control.calls) == 2
    assert consumer.requests.take_orders().fetches == ()
    consumer.offer(request)
    (again,) = consumer.requests.take_orders().fetches
    assert (again.attempt, again.is_last, again.blocks) == (1, True, spec.blocks)
    consumer.collect(request)
    assert consumer.stats.data["retries"] == {"read_failed": 1}
    assert consumer.stats.data["failures"] == {}
    assert len(consumer.requests) == 0


@pytest.mark.parametrize(
    "codec", [BIT_FOR_BIT, CodecChoice(Codec.INT4, Codec.INT4), CodecChoice(None, Codec.INT8)]
)
def test_every_producer_is_asked_for_kv_written_down_in_the_same_way(
    consumer: Consumer, codec: CodecChoice
) -> None:
    request = consumer.add("r", *elsewhere(), codec=codec)
    consumer.offer(request)
    consumer.match(request)
    consumer.allocate(request, TOKENS)
    (spec,) = consumer.requests.take_orders().fetches
    assert spec.codec == codec
    consumer.fail_on_a_rank(request, Reason.READ_FAILED, attempt=0)
    consumer.offer(request)
    (again,) = consumer.requests.take_orders().fetches
    assert (again.attempt, again.codec) == (1, codec)


def test_when_the_last_producer_is_lost_the_request_is_refused_through_the_workers(
    consumer: Consumer,
) -> None:
    request = consumer.fetching("r", *elsewhere())
    consumer.fail_on_a_rank(request, Reason.READ_FAILED, attempt=0)
    consumer.requests.lost(Lost("r", Reason.PEER_UNREACHABLE, "silence"))
    assert consumer.requests.take_orders().refused == ("r",)
    consumer.collect(request, Reason.INTERNAL)
    assert consumer.stats.data["failures"] == {"peer_unreachable": 1}
    assert len(consumer.requests) == 0


@pytest.mark.parametrize("is_waiting", [False, True])
def test_a_request_that_is_aborted_between_two_producers_is_reported_by_the_workers(
    consumer: Consumer, is_waiting: bool
) -> None:
    request = consumer.fetching("r", *elsewhere())
    if is_waiting:
        consumer.fail_on_a_rank(request, Reason.READ_FAILED, attempt=0)
    consumer.requests.finish("r")
    orders = consumer.requests.take_orders()
    assert (orders.refused, orders.cancels) == (("r",), {})
    consumer.collect(request, Reason.INTERNAL)
    assert consumer.stats.data["failures"] == {"aborted": 1}
    assert len(consumer.requests) == 0
