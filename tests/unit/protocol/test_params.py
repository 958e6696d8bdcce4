from __future__ import annotations

from typing import Any

import pytest

from vllm_pd_plugin.codecs.codec import Codec, CodecChoice
from vllm_pd_plugin.config import PdConfig
from vllm_pd_plugin.errors import ParamsError, Reason
from vllm_pd_plugin.ids import HandoffId, Incarnation, Source
from vllm_pd_plugin.protocol.params import (
    describe_handoff,
    parse_codec,
    parse_handoff_id,
    parse_sources,
    wants_to_produce,
)

HANDOFF = HandoffId("0123456789abcdef" * 2)
INCARNATION = Incarnation("fedcba9876543210")
SOURCE = Source(HANDOFF, ("127.0.0.1", 7000), INCARNATION)
FETCH = describe_handoff(SOURCE, "engine", "request", 100, 1)
NIXL_REQUEST = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


HOSTILE: dict[str, object] = {
    "a number": 7,
    "a fraction": 0.5,
    "NaN": float("nan"),
    "a large number": 10**4000,
    "a negative number": -1,
    "text": "yes",
    "empty text": "",
    "long text": "a" * 10_000_000,
    "control characters": "127.0.0.1\r\nX: \x00\x1b[31m",
    "bytes": b"127.0.0.1",
    "a list": ["127.0.0.1"],
    "a long list": [1] * 100_000,
    "a dict": {"a": {"b": {"c": 1}}},
    "a nested dict": nested(100),
    "an object": object(),
}


def refusal(params: Any, trusted_network: bool = False) -> str:
    with pytest.raises(ParamsError) as caught:
        parse_sources(params, trusted_network)
    message = str(caught.value)
    assert caught.value.reason is Reason.BAD_PARAMS
    assert len(message) < 400
    assert message.isprintable()
    return message


def test_what_a_producer_says_is_what_a_consumer_understands() -> None:
    assert parse_sources(FETCH, trusted_network=False) == (SOURCE,)
    assert not wants_to_produce(FETCH)


def test_no_block_ids_travel_by_way_of_the_client() -> None:
    assert not any("block" in key for key in FETCH)


@pytest.mark.parametrize("params", [None, {}, {"do_remote_prefill": False}, {"other": 1}])
def test_a_request_without_the_flags_neither_fetches_nor_produces(params: Any) -> None:
    assert parse_sources(params, trusted_network=False) == ()
    assert not wants_to_produce(params)


def test_a_nixl_connector_request_is_accepted_as_produce() -> None:
    assert wants_to_produce(NIXL_REQUEST)
    assert parse_sources(NIXL_REQUEST, trusted_network=False) == ()


def test_null_flags_are_not_set() -> None:
    params = {"do_remote_decode": None, "do_remote_prefill": None}
    assert not wants_to_produce(params)
    assert parse_sources(params, trusted_network=False) == ()


def test_both_flags_at_once_are_refused() -> None:
    assert "exclude each other" in refusal(FETCH | {"do_remote_decode": True})


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("flag", ["do_remote_prefill", "do_remote_decode"])
def test_a_flag_that_is_no_boolean_is_refused(flag: str, name: str) -> None:
    params = FETCH | {flag: HOSTILE[name]}
    assert flag in refusal(params)


@pytest.mark.parametrize("value", [0, 1, "true", "", [], {}])
def test_what_merely_looks_true_or_false_is_refused(value: object) -> None:
    with pytest.raises(ParamsError, match="do_remote_decode=.* is neither true nor false"):
        wants_to_produce({"do_remote_decode": value})


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("key", ["remote_host", "remote_handoff_id", "remote_incarnation"])
def test_a_hostile_text_field_is_refused(key: str, name: str) -> None:
    assert key in refusal(FETCH | {key: HOSTILE[name]})
    if (key, name) != ("remote_host", "text"):  # a host may be called so
        assert key in refusal(FETCH | {key: HOSTILE[name]}, trusted_network=True)


@pytest.mark.parametrize("name", [name for name in HOSTILE if name != "a number"])
def test_a_hostile_port_is_refused(name: str) -> None:
    assert "remote_port" in refusal(FETCH | {"remote_port": HOSTILE[name]})


# repr() itself raises, ValueError and RecursionError.
@pytest.mark.parametrize("value", [10**5000, nested(100_000)], ids=["number", "dict"])
@pytest.mark.parametrize("key", ["do_remote_prefill", "remote_host", "remote_port"])
def test_a_value_that_cannot_even_be_printed_is_refused(key: str, value: object) -> None:
    assert key in refusal(FETCH | {key: value})


@pytest.mark.parametrize("port", [0, -1, 65536, 2**64, True, 7000.0, "7000", None])
def test_a_port_that_is_none_is_refused(port: object) -> None:
    assert f"remote_port={port!r}" in refusal(FETCH | {"remote_port": port})


@pytest.mark.parametrize("port", [1, 65535])
def test_the_ends_of_the_port_range_are_allowed(port: int) -> None:
    (source,) = parse_sources(FETCH | {"remote_port": port}, trusted_network=False)
    assert source is not None
    assert source.address == ("127.0.0.1", port)


@pytest.mark.parametrize("key", ["remote_host", "remote_port", "remote_handoff_id"])
def test_an_absent_field_is_named(key: str) -> None:
    assert key in refusal({k: v for k, v in FETCH.items() if k != key})


@pytest.mark.parametrize(
    "params",
    [
        {k: v for k, v in FETCH.items() if k != "remote_incarnation"},
        FETCH | {"remote_incarnation": None},
    ],
    ids=["absent", "null"],
)
def test_a_dispatcher_need_not_know_the_producer_s_incarnation(params: dict[str, Any]) -> None:
    assert parse_sources(params, trusted_network=False) == (Source(HANDOFF, SOURCE.address, None),)


@pytest.mark.parametrize("params", [None, {}, NIXL_REQUEST, NIXL_REQUEST | {"handoff_id": None}])
def test_a_producer_chooses_the_id_unless_the_dispatcher_has(params: Any) -> None:
    assert parse_handoff_id(params) is None


def test_a_dispatcher_may_choose_the_id_of_a_handoff() -> None:
    params = {"do_remote_decode": True, "handoff_id": HANDOFF}
    assert wants_to_produce(params)
    assert parse_handoff_id(params) == HANDOFF


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_handoff_id_is_refused(name: str) -> None:
    with pytest.raises(ParamsError, match="handoff_id=") as caught:
        parse_handoff_id({"do_remote_decode": True, "handoff_id": HOSTILE[name]})
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


MALFORMED_IDS = [
    HANDOFF[:-1], HANDOFF + "0", HANDOFF.upper(), "g" + HANDOFF[1:], HANDOFF + "\n", "٣" * 32,
]  # fmt: skip


@pytest.mark.parametrize("value", MALFORMED_IDS)
def test_a_chosen_handoff_id_is_32_lower_case_hexadecimal_digits(value: str) -> None:
    with pytest.raises(ParamsError, match="handoff_id="):
        parse_handoff_id({"handoff_id": value})


@pytest.mark.parametrize("value", MALFORMED_IDS)
def test_a_handoff_id_is_32_lower_case_hexadecimal_digits(value: str) -> None:
    assert "remote_handoff_id" in refusal(FETCH | {"remote_handoff_id": value})


@pytest.mark.parametrize(
    "value", [INCARNATION[:-1], HANDOFF, INCARNATION.upper(), "g" + INCARNATION[1:], "٣" * 16]
)
def test_an_incarnation_is_16_lower_case_hexadecimal_digits(value: str) -> None:
    assert "remote_incarnation" in refusal(FETCH | {"remote_incarnation": value})


@pytest.mark.parametrize(
    "host",
    [
        "a b",
        "a/b",
        "a@b",
        "http://a",
        "a\n",
        "*",
        "a" * 254,
        "::1%eth0",
        "ａ.example",
        "",
        "-x",
        "_srv",
        ".....",
        "a..b",
        "0",
        "127.1",
        "2130706433",
        "a-.example",
        "x" * 64,
    ],
)
def test_a_host_with_other_characters_is_refused(host: str) -> None:
    assert "remote_host" in refusal(FETCH | {"remote_host": host}, trusted_network=True)


@pytest.mark.parametrize("host", ["10.0.0.1", "example.org", "fd00::1", "::ffff:10.0.0.1"])
def test_without_a_key_only_loopback_is_fetched_from(host: str) -> None:
    message = refusal(FETCH | {"remote_host": host})
    assert host in message
    assert "no cluster key" in message
    (source,) = parse_sources(FETCH | {"remote_host": host}, trusted_network=True)
    assert source is not None
    assert source.address == (host, 7000)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_loopback_needs_no_key(host: str) -> None:
    assert parse_sources(FETCH | {"remote_host": host}, trusted_network=False)


def test_keys_that_mean_nothing_here_are_no_hindrance() -> None:
    params = FETCH | {"remote_block_ids": nested(100), "x" * 1000: b"\x00", "tp_size": "many"}
    assert parse_sources(params, trusted_network=False) == (SOURCE,)


# A client sends these with `"vllm_xargs": {"kv_transfer_params": 0}`.
@pytest.mark.parametrize("params", [0, "", [], "x", ["do_remote_decode"], False, 0.5], ids=repr)
def test_params_that_are_no_mapping_are_refused(params: Any) -> None:
    for ask in (wants_to_produce, lambda p: parse_sources(p, trusted_network=True)):
        with pytest.raises(ParamsError, match="is not an object") as caught:
            ask(params)
        assert len(str(caught.value)) < 100


# --- several producers -----------------------------------------------------------------------


def test_alternatives_follow_the_first_choice_with_the_same_handoff() -> None:
    others = [
        {"remote_host": "127.0.0.1", "remote_port": 7001},
        {"remote_host": "::1", "remote_port": 7002, "remote_incarnation": INCARNATION},
    ]
    assert parse_sources(FETCH | {"remote_alternatives": others}, trusted_network=False) == (
        SOURCE,
        Source(HANDOFF, ("127.0.0.1", 7001), None),
        Source(HANDOFF, ("::1", 7002), INCARNATION),
    )


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_alternatives_are_refused(name: str) -> None:
    if not HOSTILE[name]:
        assert parse_sources(FETCH | {"remote_alternatives": HOSTILE[name]}, False) == (SOURCE,)
        return
    refusal(FETCH | {"remote_alternatives": HOSTILE[name]})
    refusal(FETCH | {"remote_alternatives": [{"remote_host": HOSTILE[name], "remote_port": 1}]})
    if name != "a number":
        other = {"remote_host": "::1", "remote_port": HOSTILE[name]}
        refusal(FETCH | {"remote_alternatives": [other]})


def test_too_many_alternatives_are_refused() -> None:
    other = {"remote_host": "127.0.0.1", "remote_port": 7001}
    assert len(parse_sources(FETCH | {"remote_alternatives": [other] * 8}, False)) == 9
    assert "at most 8" in refusal(FETCH | {"remote_alternatives": [other] * 9})


def test_an_alternative_without_a_key_is_loopback_too() -> None:
    other = {"remote_host": "10.0.0.1", "remote_port": 7001}
    assert "not loopback" in refusal(FETCH | {"remote_alternatives": [other]})


# --- codecs ----------------------------------------------------------------------------------


def config_of(**options: object) -> PdConfig:
    return PdConfig.parse(options, {})


def allowing(narrowest: Codec) -> PdConfig:
    lossy_max = "none" if narrowest is Codec.RAW else narrowest.value
    return config_of(codec="raw", lossy_max=lossy_max)


@pytest.mark.parametrize("params", [None, {}, {"codec": None}, FETCH], ids=["none", *"abc"])
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (config_of(), CodecChoice(Codec.RAW, Codec.RAW)),
        (config_of(codec="int4"), CodecChoice(Codec.INT4, Codec.INT4)),
        (config_of(codec="int4", lossy_max="int2"), CodecChoice(Codec.INT4, Codec.INT2)),
        (config_of(codec="auto"), CodecChoice(None, Codec.RAW)),
        (config_of(codec="auto", lossy_max="int8"), CodecChoice(None, Codec.INT8)),
    ],
    ids=["raw", "int4", "int4 of 2", "auto", "auto of 8"],
)
def test_a_request_that_names_no_codec_gets_the_configured_one(
    params: dict[str, Any] | None, config: PdConfig, expected: CodecChoice
) -> None:
    assert parse_codec(params, config) == expected


@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("narrowest", Codec)
def test_a_request_may_name_a_codec_up_to_the_narrowest_allowed(
    codec: Codec, narrowest: Codec
) -> None:
    params, config = {"codec": codec.value}, allowing(narrowest)
    if codec.rank <= narrowest.rank:
        assert parse_codec(params, config) == CodecChoice(codec, narrowest)
        return
    with pytest.raises(ParamsError, match=f"codec='{codec}' is not allowed here") as caught:
        parse_codec(params, config)
    assert caught.value.reason is Reason.BAD_PARAMS
    allowed = ", ".join(["auto", *(c for c in Codec if c.rank <= narrowest.rank)])
    assert str(caught.value).endswith(f"allowed are {allowed}")


@pytest.mark.parametrize("narrowest", Codec)
def test_a_request_may_leave_the_choice_to_the_engine(narrowest: Codec) -> None:
    assert parse_codec({"codec": "auto"}, allowing(narrowest)) == CodecChoice(None, narrowest)


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_codec_that_is_none_is_refused_in_few_words(value: object) -> None:
    with pytest.raises(ParamsError) as caught:
        parse_codec({"codec": value}, allowing(Codec.INT2))
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["INT4", "int3", " int4", "none"])
def test_a_name_that_is_no_codec_s_is_refused(name: str) -> None:
    with pytest.raises(ParamsError, match="allowed are auto, raw, int8, int4, int2"):
        parse_codec({"codec": name}, allowing(Codec.INT2))
