"""Requests that go on after the token that their producer samples."""

from __future__ import annotations

import dataclasses
import warnings

import pytest

from vllm_pd_plugin.errors import ParamsError, Reason
from vllm_pd_plugin.ids import Source
from vllm_pd_plugin.protocol.events import Lost, Offered

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    from tests.fakes.consumer import BIT_FOR_BIT, PINNED, TOKENS, Consumer, new_source
    from vllm_pd_plugin.edge.metadata import FetchReport
    from vllm_pd_plugin.edge.prompts import PromptFingerprint
    from vllm_pd_plugin.transfer.specs import Segment

PROMPT = list(range(TOKENS))
SAMPLED = 777


@pytest.fixture
def consumer() -> Consumer:
    return Consumer()


def elsewhere() -> tuple[Source, Source]:
    first = new_source()
    return first, dataclasses.replace(first, address=("127.0.0.1", 7001))


def fetching(consumer: Consumer, *sources: Source) -> Request:
    request = consumer.add_seeded(*sources)
    consumer.offer(request)
    consumer.match(request)
    consumer.allocate(request, TOKENS)
    return request


def assert_untouched(request: Request) -> None:
    assert request.prompt_token_ids == PROMPT
    assert list(request.all_token_ids) == PROMPT
    assert (request.num_prompt_tokens, request.num_tokens) == (TOKENS, TOKENS)


# --- what is fetched -------------------------------------------------------------------------


def test_the_workers_are_told_that_the_kv_is_of_use_with_its_token_only(
    consumer: Consumer,
) -> None:
    fetching(consumer)
    (spec,) = consumer.requests.take_orders().fetches
    assert spec.seeds


def test_an_ordinary_fetch_is_of_use_without(consumer: Consumer) -> None:
    request = consumer.add()
    consumer.offer(request)
    consumer.match(request)
    consumer.allocate(request, TOKENS)
    (spec,) = consumer.requests.take_orders().fetches
    assert not spec.seeds


def test_every_producer_is_asked_for_its_token(consumer: Consumer) -> None:
    request = fetching(consumer, *elsewhere())
    consumer.requests.take_orders()
    consumer.fail_on_a_rank(request, Reason.READ_FAILED, attempt=0)
    consumer.offer(request)
    (again,) = consumer.requests.take_orders().fetches
    assert (again.attempt, again.seeds) == (1, True)


@pytest.mark.parametrize("cached", [0, 16, TOKENS - 1])
def test_one_missing_token_is_enough_for_a_load(consumer: Consumer, cached: int) -> None:
    """Its KV could be computed here; what the producer sampled after it could not."""
    request = consumer.add_seeded()
    consumer.offer(request)
    assert consumer.match(request, cached) == (TOKENS - cached, True)
    consumer.allocate(request, TOKENS - cached)
    (spec,) = consumer.requests.take_orders().fetches
    assert spec.segments == (Segment(range(cached, TOKENS), PINNED),)
    assert spec.seeds


# --- the token -------------------------------------------------------------------------------


def test_the_token_becomes_a_part_of_the_prompt(consumer: Consumer) -> None:
    request = fetching(consumer)
    consumer.collect(request, sampled=SAMPLED)
    assert request.prompt_token_ids == [*PROMPT, SAMPLED]
    assert list(request.all_token_ids) == [*PROMPT, SAMPLED]
    assert request.num_prompt_tokens == request.num_tokens == TOKENS + 1
    assert request.num_output_tokens == 0
    assert consumer.requests.take_hopeless() == []
    assert consumer.control.calls[-1] == ("close", "r", False)
    assert len(consumer.requests) == 0


def test_a_token_may_be_the_first_of_the_vocabulary(consumer: Consumer) -> None:
    request = fetching(consumer)
    consumer.collect(request, sampled=0)
    assert request.prompt_token_ids == [*PROMPT, 0]


def test_a_block_that_the_token_completes_has_a_hash(consumer: Consumer) -> None:
    hashed: list[int] = []

    def hasher(request: Request) -> list[bytes]:
        """Blocks of three tokens: 40 have 13, and 41 still have; 42 have 14."""
        hashed.append(request.num_tokens)
        done = len(request.block_hashes) if hasattr(request, "block_hashes") else 0
        return [bytes([block]) for block in range(done, request.num_tokens // 3)]

    params = SamplingParams(max_tokens=8)
    request = Request("r", list(range(TOKENS + 1)), params, None, block_hasher=hasher)
    consumer.requests.add(request, [new_source()], BIT_FOR_BIT, seeds=True)
    prompt = PromptFingerprint(request).of(TOKENS + 1)
    consumer.requests.offered(Offered("r", PINNED, TOKENS + 1, prompt))
    consumer.match(request)
    consumer.allocate(request, TOKENS + 1)
    assert len(request.block_hashes) == 13
    consumer.collect(request, sampled=SAMPLED)
    assert len(request.block_hashes) == 14
    assert hashed == [TOKENS + 1, TOKENS + 2]


def test_a_report_that_comes_twice_extends_once(consumer: Consumer) -> None:
    request = fetching(consumer)
    consumer.collect(request, sampled=SAMPLED)
    consumer.collect(request, sampled=SAMPLED)
    assert request.prompt_token_ids == [*PROMPT, SAMPLED]


def test_an_ordinary_request_is_not_extended(consumer: Consumer) -> None:
    """A producer always says what it sampled; here nobody asked."""
    request = Request("r", list(PROMPT), SamplingParams(max_tokens=8), None)
    consumer.requests.add(request, [new_source()], BIT_FOR_BIT)
    consumer.offer(request)
    consumer.match(request)
    consumer.allocate(request, TOKENS)
    consumer.collect(request, sampled=SAMPLED)
    assert_untouched(request)


def test_a_request_that_has_ended_is_not_extended(consumer: Consumer) -> None:
    request = fetching(consumer)
    consumer.requests.finish("r")
    consumer.collect(request, sampled=SAMPLED)
    assert_untouched(request)
    assert len(consumer.requests) == 0


def test_a_token_that_a_rank_reports_earlier_is_kept_until_all_have(consumer: Consumer) -> None:
    request = fetching(consumer)
    consumer.report(FetchReport({}, {}, {}, {"r": SAMPLED}, {}))
    assert_untouched(request)
    consumer.collect(request)
    assert request.prompt_token_ids == [*PROMPT, SAMPLED]


# --- without it ------------------------------------------------------------------------------


def test_a_success_without_a_token_is_hopeless(consumer: Consumer) -> None:
    request = fetching(consumer)
    consumer.collect(request)
    assert consumer.requests.take_hopeless() == ["r"]
    assert consumer.requests.take_hopeless() == []
    assert consumer.stats.data["failures"] == {"producer_ended": 1}
    assert_untouched(request)


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("offered", [TOKENS - 1, TOKENS + 1])
def test_a_token_that_is_not_the_next_one_is_not_taken(recomputes: bool, offered: int) -> None:
    """A token after a shorter prompt says nothing of what comes after this one."""
    consumer = Consumer(recomputes)
    request = consumer.add_seeded()
    prompt = PromptFingerprint(request).of(offered)
    consumer.requests.offered(Offered("r", PINNED, offered, prompt))
    assert consumer.stats.data["failures"] == {"prompt_mismatch": 1}
    assert consumer.match(request) == ((None, False) if recomputes else (1, True))


def test_a_failed_fetch_extends_nothing(consumer: Consumer) -> None:
    request = fetching(consumer)
    consumer.collect(request, Reason.PEER_UNREACHABLE, valid_tokens=32)
    assert_untouched(request)
    assert consumer.requests.take_hopeless() == []  # vLLM fails it
    assert len(consumer.requests) == 0


def test_a_failed_fetch_is_not_made_up_for_here() -> None:
    """This engine would sample the first token again, and the client has it already."""
    consumer = Consumer(recomputes=True)
    request = fetching(consumer)
    consumer.collect(request, Reason.PEER_UNREACHABLE, valid_tokens=32)
    assert consumer.requests.take_hopeless() == ["r"]
    assert_untouched(request)
    # With computed tokens, vLLM would not even ask before it goes on.
    assert request.num_computed_tokens == 0
    assert consumer.match(request) == (None, False)
    assert consumer.stats.data["kept_tokens"] == 0
    consumer.requests.finish("r")
    assert len(consumer.requests) == 0


def test_one_that_has_ended_is_not_to_be_ended_when_its_fetch_fails() -> None:
    consumer = Consumer(recomputes=True)
    request = fetching(consumer)
    consumer.requests.finish("r")
    consumer.collect(request, Reason.ABORTED)
    assert consumer.requests.take_hopeless() == []
    assert len(consumer.requests) == 0


def test_a_lost_handoff_is_not_made_up_for_here() -> None:
    consumer = Consumer(recomputes=True)
    request = consumer.add_seeded()
    consumer.requests.lost(Lost("r", Reason.PEER_UNREACHABLE, "silence"))
    assert consumer.match(request) == (None, False)
    assert consumer.requests.take_hopeless() == ["r"]
    assert consumer.requests.take_hopeless() == []
    consumer.requests.finish("r")
    assert len(consumer.requests) == 0


def test_a_handoff_that_cannot_even_begin_is_not_made_up_for_here() -> None:
    consumer = Consumer(recomputes=True)
    request = Request("r", list(PROMPT), SamplingParams(max_tokens=8), None)
    consumer.requests.add_failed(request, ParamsError("nonsense"), seeds=True)
    assert consumer.match(request) == (None, False)
    assert consumer.requests.take_hopeless() == ["r"]


def test_an_ordinary_request_is_made_up_for_here_and_never_hopeless() -> None:
    consumer = Consumer(recomputes=True)
    request = consumer.fetching()
    consumer.collect(request, Reason.PEER_UNREACHABLE, valid_tokens=32)
    assert consumer.match(request) == (0, False)
    assert consumer.requests.take_hopeless() == []


def test_a_failure_is_no_end_while_there_is_another_producer() -> None:
    consumer = Consumer(recomputes=True)
    request = fetching(consumer, *elsewhere())
    consumer.requests.take_orders()
    consumer.fail_on_a_rank(request, Reason.READ_FAILED, attempt=0)
    assert consumer.requests.take_hopeless() == []
    consumer.offer(request)
    consumer.requests.take_orders()
    consumer.collect(request, sampled=SAMPLED)
    assert request.prompt_token_ids == [*PROMPT, SAMPLED]


# --- what ranks report -----------------------------------------------------------------------


def test_reports_of_several_ranks_name_each_token_once() -> None:
    first = FetchReport({"a": Reason.READ_FAILED}, {"a": 3}, {"a": 0}, {"b": 5}, {})
    second = FetchReport({}, {}, {}, {"b": 5, "c": 6}, {})
    together = first.aggregate(second)
    assert together.sampled == {"b": 5, "c": 6}
    assert together.reasons == {"a": Reason.READ_FAILED}
