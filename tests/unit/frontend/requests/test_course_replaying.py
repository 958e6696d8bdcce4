"""A request that is computed from its beginning again, and whose client must not notice."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from tests.fakes.courses import (
    PROMPT,
    WHOLE,
    D,
    FakeDispatcher,
    make_request,
    sampling_of,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.v1.engine import EngineCoreOutput, FinishReason
    from vllm.v1.outputs import LogprobsLists

    from vllm_pd_plugin.frontend.requests.course import Course
    from vllm_pd_plugin.frontend.requests.endings import Ending, Failure
    from vllm_pd_plugin.frontend.requests.legs import LegKind

DECODE, WHOLE_LEG = LegKind.DECODE, LegKind.WHOLE
STOP = FinishReason.STOP
REGENERATED: dict[str, Any] = {"presence_penalty": 0.5}
REFUSED: dict[str, Any] = {"presence_penalty": 0.5, "temperature": 0.7}


@pytest.fixture
def dispatcher() -> FakeDispatcher:
    return FakeDispatcher()


@pytest.fixture
def course(dispatcher: FakeDispatcher) -> Course:
    """Its client has got 50, 51 and 52, and the decode engine was lost then."""
    course = dispatcher.begin(make_request(**REGENERATED))
    dispatcher.give_first(course, 99)
    for token in (50, 51, 52):
        dispatcher.give(course, DECODE, token)
    dispatcher.lose(course, D)
    dispatcher.give_first(course, 99)
    return course


def rows(*tokens: int) -> LogprobsLists:
    """Log-probabilities of as many positions; each says which token it is of."""
    ids = np.array([[token, token + 100] for token in tokens], dtype=np.int32)
    return LogprobsLists(ids, -ids.astype(np.float32), np.array(tokens, dtype=np.int32))


def rows_of(output: EngineCoreOutput) -> tuple[list[int], list[float], list[int]]:
    logprobs = output.new_logprobs
    assert logprobs is not None
    return (
        logprobs.logprob_token_ids[:, 0].tolist(),
        logprobs.logprobs[:, 0].tolist(),
        logprobs.sampled_token_ranks.tolist(),
    )


def test_it_begins_with_its_own_prompt_and_all_its_tokens(
    dispatcher: FakeDispatcher, course: Course
) -> None:
    request = dispatcher.request(DECODE)
    assert request.prompt_token_ids == PROMPT
    assert sampling_of(request).max_tokens == 8


def test_no_token_comes_twice(dispatcher: FakeDispatcher, course: Course) -> None:
    for token in (50, 51, 52):
        dispatcher.give(course, DECODE, token)
    assert dispatcher.tokens == [50, 51, 52]
    dispatcher.give(course, DECODE, 53)
    dispatcher.give(course, DECODE, 54, finish=STOP)
    assert dispatcher.tokens == [50, 51, 52, 53, 54]
    assert (dispatcher.finish, dispatcher.endings) == (STOP, [None])


def test_an_output_that_is_known_in_part_is_given_out_in_part(
    dispatcher: FakeDispatcher, course: Course
) -> None:
    dispatcher.give(course, DECODE, 50, 51)
    dispatcher.give(course, DECODE, 52, 53, new_logprobs=rows(52, 53))
    dispatcher.give(course, DECODE, 54, new_logprobs=rows(54))
    assert dispatcher.tokens == [50, 51, 52, 53, 54]
    partly, after = dispatcher.emitted[-2:]
    assert rows_of(partly) == ([53], [-53.0], [53])
    assert rows_of(after) == ([54], [-54.0], [54])


def test_what_counts_all_tokens_is_left_out_of_an_output_that_is_known_in_part(
    dispatcher: FakeDispatcher, course: Course
) -> None:
    counted = np.zeros((3, 1, 1), dtype=np.int16)
    dispatcher.give(course, DECODE, 50, 51, 52, 53, routed_experts=counted)
    dispatcher.give(course, DECODE, 54, routed_experts=counted[:1])
    partly, after = dispatcher.emitted[-2:]
    assert (partly.new_token_ids, partly.routed_experts) == ([53], None)
    assert after.routed_experts is not None


def test_an_end_right_behind_what_is_known_is_given_out_without_a_token(
    dispatcher: FakeDispatcher, course: Course
) -> None:
    dispatcher.give(course, DECODE, 50, 51, 52, finish=STOP, new_logprobs=rows(50, 51, 52))
    assert (dispatcher.tokens, dispatcher.finish) == ([50, 51, 52], STOP)
    assert rows_of(dispatcher.emitted[-1]) == ([], [], [])
    assert dispatcher.endings == [None]


@pytest.mark.parametrize("tokens", [(49,), (50, 49), (50, 51, 49), (50, 51, 49, 53)])
def test_a_token_that_differs_ends_the_request(
    dispatcher: FakeDispatcher, course: Course, tokens: tuple[int, ...]
) -> None:
    dispatcher.give(course, DECODE, *tokens)
    assert dispatcher.tokens == [50, 51, 52]
    assert dispatcher.endings == [Ending.REPLAY_DIFFERS]
    assert dispatcher.open_legs == []
    assert dispatcher.aborted[-1] is DECODE


def test_a_token_that_differs_is_noticed_in_a_later_output_too(
    dispatcher: FakeDispatcher, course: Course
) -> None:
    dispatcher.give(course, DECODE, 50)
    dispatcher.give(course, DECODE, 51)
    dispatcher.give(course, DECODE, 49)
    assert dispatcher.endings == [Ending.REPLAY_DIFFERS]


def test_an_answer_that_ends_earlier_differs(dispatcher: FakeDispatcher, course: Course) -> None:
    dispatcher.give(course, DECODE, 50, 51, finish=STOP)
    assert dispatcher.endings == [Ending.REPLAY_DIFFERS]
    assert dispatcher.finish is None
    assert dispatcher.open_legs == []


def test_what_is_skipped_is_skipped_in_every_attempt(
    dispatcher: FakeDispatcher, course: Course
) -> None:
    dispatcher.give(course, DECODE, 50, 51)  # of an attempt that fails before there is news
    dispatcher.lose(course, D)
    dispatcher.give(course, DECODE, 50)
    dispatcher.give(course, DECODE, 51, 52, 53)
    assert dispatcher.tokens == [50, 51, 52, 53]


def test_an_attempt_that_has_brought_news_is_skipped_with_them(
    dispatcher: FakeDispatcher, course: Course
) -> None:
    dispatcher.give(course, DECODE, 50, 51, 52, 53)
    dispatcher.lose(course, D)
    dispatcher.give(course, DECODE, 50, 51, 52)
    assert dispatcher.tokens == [50, 51, 52, 53]
    dispatcher.give(course, DECODE, 53, 54, finish=STOP)
    assert dispatcher.tokens == [50, 51, 52, 53, 54]


def test_one_engine_can_replay_what_two_have_computed(
    dispatcher: FakeDispatcher, course: Course
) -> None:
    dispatcher.next_route = WHOLE
    dispatcher.lose(course, D)
    dispatcher.give(course, WHOLE_LEG, 50, 51, 52, 53, finish=STOP)
    assert (dispatcher.tokens, dispatcher.endings) == ([50, 51, 52, 53], [None])


def test_a_request_that_cannot_be_replayed_ends_with_its_engine(
    dispatcher: FakeDispatcher,
) -> None:
    course = dispatcher.begin(make_request(**REFUSED))
    dispatcher.give_first(course, 99)
    dispatcher.give(course, DECODE, 50)
    course.engine_lost(D)
    assert dispatcher.endings == [Ending.NOT_REPLAYABLE]
    assert (dispatcher.tokens, dispatcher.retries) == ([50], [])
    assert dispatcher.open_legs == []


def test_a_request_that_cannot_be_replayed_may_begin_again_while_nothing_was_sent(
    dispatcher: FakeDispatcher,
) -> None:
    course = dispatcher.begin(make_request(**REFUSED))
    dispatcher.lose(course, D)
    assert dispatcher.retries == [Failure.ENGINE_LOST]
    dispatcher.give(course, DECODE, 50, finish=STOP)
    assert (dispatcher.tokens, dispatcher.endings) == ([50], [None])
