"""What each engine gets of a client's request."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import msgspec
import pytest

from tests.fakes.courses import PROMPT, make_request, sampling_of, transfer_of
from vllm_pd_plugin.ids import new_handoff_id, new_incarnation

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.v1.engine import EngineCoreRequest

    from vllm_pd_plugin.frontend.requests.legs import (
        Handoff,
        Work,
        client_codec,
        decode_leg,
        prefill_leg,
        whole_leg,
    )
    from vllm_pd_plugin.protocol.params import parse_sources, wants_seed, wants_to_produce

SEEDING = Handoff(new_handoff_id(), ("10.0.0.1", 7001), new_incarnation(), seeds=True)
NOT_SEEDING = Handoff(new_handoff_id(), ("10.0.0.1", 7001), new_incarnation(), seeds=False)
CLIENT: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "logprobs": 3, "stop_token_ids": [9]}
CODEC: dict[str, Any] = {"kv_transfer_params": {"codec": "int8"}}


def work_of(request: EngineCoreRequest, sent: int = 0) -> Work:
    """What is left when the client has got so many tokens."""
    max_tokens = sampling_of(request).max_tokens
    assert max_tokens is not None
    return Work(request, PROMPT + list(range(50, 50 + sent)), max_tokens - sent)


def legs_of(work: Work, handoff: Handoff) -> list[EngineCoreRequest]:
    return [
        prefill_leg(work, "a", handoff),
        decode_leg(work, "b", handoff),
        whole_leg(work, "c"),
    ]


# --- the prefill engine's --------------------------------------------------------------------


def test_a_prefill_engine_samples_one_token_as_the_client_wants_it() -> None:
    request = make_request(**CLIENT)
    leg = prefill_leg(work_of(request), "leg", SEEDING)
    params = sampling_of(leg)
    assert params.max_tokens == 1
    assert (params.temperature, params.top_p, params.logprobs) == (0.7, 0.9, 3)
    assert params.stop_token_ids == [9]


def test_a_prefill_engine_is_told_to_produce() -> None:
    for handoff in (SEEDING, NOT_SEEDING):
        transfer = transfer_of(prefill_leg(work_of(make_request()), "leg", handoff))
        assert transfer == {"do_remote_decode": True, "handoff_id": handoff.id}
        assert wants_to_produce(transfer)


def test_a_token_that_is_not_used_is_sampled_as_simply_as_possible() -> None:
    request = make_request(
        **CLIENT, seed=3, presence_penalty=0.5, min_tokens=4, extra_args={"my_processor": 1}
    )
    leg = prefill_leg(work_of(request), "leg", NOT_SEEDING)
    params = sampling_of(leg)
    assert (params.temperature, params.top_p, params.logprobs) == (0.0, 1.0, None)
    assert (params.seed, params.presence_penalty, params.min_tokens) == (None, 0.0, 0)
    assert (params.max_tokens, params.detokenize) == (1, False)
    assert set(params.extra_args or {}) == {"kv_transfer_params"}


def test_a_prefill_engine_gets_the_seed_of_a_token_that_counts() -> None:
    request = make_request(seed=3)
    assert sampling_of(prefill_leg(work_of(request), "leg", SEEDING)).seed == 3
    assert sampling_of(prefill_leg(work_of(request), "leg", NOT_SEEDING)).seed is None
    assert sampling_of(request).seed == 3


# --- the decode engine's ---------------------------------------------------------------------


def test_a_decode_engine_is_told_where_the_kv_is() -> None:
    transfer = transfer_of(decode_leg(work_of(make_request()), "leg", SEEDING))
    (source,) = parse_sources(transfer, True)
    assert source.handoff_id == SEEDING.id
    assert source.address == SEEDING.address
    assert source.incarnation == SEEDING.incarnation
    assert not wants_to_produce(transfer)


@pytest.mark.parametrize("handoff", [SEEDING, NOT_SEEDING])
def test_a_decode_engine_goes_on_after_the_first_token_or_samples_it(handoff: Handoff) -> None:
    leg = decode_leg(work_of(make_request(max_tokens=8)), "leg", handoff)
    assert wants_seed(transfer_of(leg)) is handoff.seeds
    assert sampling_of(leg).max_tokens == (7 if handoff.seeds else 8)


@pytest.mark.parametrize("handoff", [SEEDING, NOT_SEEDING])
def test_a_decode_engine_samples_as_the_client_wants_it(handoff: Handoff) -> None:
    request = make_request(**CLIENT, seed=3)
    params = sampling_of(decode_leg(work_of(request), "leg", handoff))
    assert (params.temperature, params.top_p, params.logprobs, params.seed) == (0.7, 0.9, 3, 3)


def test_the_client_s_codec_goes_to_the_decode_engine() -> None:
    request = make_request(extra_args=CODEC)
    assert client_codec(request) == "int8"
    decode = transfer_of(decode_leg(work_of(request), "leg", SEEDING))
    prefill = transfer_of(prefill_leg(work_of(request), "leg", SEEDING))
    assert decode is not None
    assert prefill is not None
    assert decode["codec"] == "int8"
    assert "codec" not in prefill


@pytest.mark.parametrize("extra_args", [None, {}, {"kv_transfer_params": {}}, {"other": 1}])
def test_without_a_codec_of_the_client_s_the_engine_s_own_counts(
    extra_args: dict[str, Any] | None,
) -> None:
    request = make_request(extra_args=extra_args)
    assert client_codec(request) is None
    transfer = transfer_of(decode_leg(work_of(request), "leg", SEEDING))
    assert transfer is not None
    assert "codec" not in transfer


# --- one engine's ----------------------------------------------------------------------------


def test_an_engine_that_does_everything_gets_the_request_as_it_is() -> None:
    request = make_request(**CLIENT, seed=3, extra_args={"my_processor": 1})
    leg = whole_leg(work_of(request), "leg")
    assert sampling_of(leg) == sampling_of(request)


def test_an_engine_that_does_everything_hears_nothing_of_handoffs() -> None:
    leg = whole_leg(work_of(make_request(extra_args=CODEC)), "leg")
    assert transfer_of(leg) is None
    assert sampling_of(leg).extra_args is None


# --- of all of them --------------------------------------------------------------------------


def test_further_arguments_of_the_client_go_with_its_sampling() -> None:
    request = make_request(extra_args={**CODEC, "my_processor": 1})
    prefill, decode, whole = legs_of(work_of(request), SEEDING)
    for leg in (prefill, decode):
        assert set(sampling_of(leg).extra_args or {}) == {"kv_transfer_params", "my_processor"}
    assert sampling_of(whole).extra_args == {"my_processor": 1}


@pytest.mark.parametrize("handoff", [SEEDING, NOT_SEEDING])
@pytest.mark.parametrize("sent", [0, 3])
def test_a_leg_goes_on_after_what_the_client_has_got(handoff: Handoff, sent: int) -> None:
    work = work_of(make_request(max_tokens=8), sent)
    prefill, decode, whole = legs_of(work, handoff)
    for leg in (prefill, decode, whole):
        assert leg.prompt_token_ids == PROMPT + [50, 51, 52][:sent]
    assert sampling_of(prefill).max_tokens == 1
    assert sampling_of(decode).max_tokens == 8 - sent - handoff.seeds
    assert sampling_of(whole).max_tokens == 8 - sent


def test_a_leg_has_a_name_of_its_own_and_is_the_client_s_request_otherwise() -> None:
    request = make_request()
    request.priority, request.cache_salt, request.arrival_time = 4, "salt", 12.5
    for leg, name in zip(legs_of(work_of(request), SEEDING), "abc", strict=True):
        assert (leg.request_id, leg.external_req_id) == (name, None)
        assert (leg.priority, leg.cache_salt, leg.arrival_time) == (4, "salt", 12.5)


@pytest.mark.parametrize("handoff", [SEEDING, NOT_SEEDING])
def test_the_client_s_request_and_sampling_are_never_touched(handoff: Handoff) -> None:
    request = make_request(**CLIENT, seed=3, extra_args={**CODEC, "my_processor": [1]})
    before = copy.deepcopy(request)
    params = request.sampling_params
    for leg in legs_of(work_of(request, sent=2), handoff):
        assert leg is not request
        assert leg.sampling_params is not params
    assert msgspec.structs.asdict(request) == msgspec.structs.asdict(before)
    assert request.sampling_params is params
