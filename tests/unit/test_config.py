from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.config import CLUSTER_KEY_VARIABLE, PdConfig, read_secret
from vllm_pd_plugin.errors import ConfigError
from vllm_pd_plugin.net.hosts import is_loopback

KEY = "0123456789abcdef"
KEYED = {CLUSTER_KEY_VARIABLE: KEY}
OPTIONS = [f.name for f in dataclasses.fields(PdConfig) if f.name != "cluster_key"]
TIMES = [name for name in OPTIONS if name.endswith("_s")]


def refusal(options: dict[str, Any], environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        PdConfig.parse(options, environ or {})
    return str(caught.value)


def test_defaults_bind_loopback_and_advertise_it() -> None:
    config = PdConfig.parse({}, {})
    assert (config.host, config.port, config.advertise_host) == ("127.0.0.1", 0, "127.0.0.1")
    assert config.cluster_key is None


def test_every_option_is_taken_over() -> None:
    options = {
        "host": "0.0.0.0",
        "port": 7000,
        "advertise_host": "10.0.0.1",
        "lease_s": 3,
        "peer_timeout_s": 0.1,
        "fetch_timeout_s": 86_400,
        "queue_timeout_s": 600.0,
        "stretch_bytes": 1,
        "integrity": "digest",
        "codec": "int4",
        "lossy_max": "int8",
        "packing": "never",
        "staging_bytes": 2**20,
        "allow_fp8": True,
        "weights_id": "policy-7",
        "probe": "never",
    }
    assert list(options) == OPTIONS
    config = PdConfig.parse(options, KEYED)
    assert dataclasses.asdict(config) == options | {"cluster_key": KEY}
    assert isinstance(config.lease_s, float)


@pytest.mark.parametrize("value", ["sha256", "", True, None, ["digest"]])
@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("integrity", "none and digest"),
        ("codec", "raw, int8, int4, int2 and auto"),
        ("lossy_max", "none, int8, int4 and int2"),
        ("packing", "auto, always and never"),
        ("probe", "always and never"),
    ],
)
def test_a_word_that_is_none_of_the_allowed_is_refused(
    name: str, allowed: str, value: object
) -> None:
    message = refusal({name: value})
    assert f"{name}={value!r} is not known" in message
    assert f"allowed are {allowed}" in message


def test_fp8_is_allowed_by_a_yes_only() -> None:
    assert PdConfig.parse({}, {}).allow_fp8 is False
    assert PdConfig.parse({"allow_fp8": False}, {}).allow_fp8 is False
    for value in ("true", "yes", 1, 0, None, []):
        assert refusal({"allow_fp8": value}) == f"allow_fp8={value!r} is neither true nor false"


@pytest.mark.parametrize(("name", "value"), [("lossy_max", "raw"), ("lossy_max", "auto")])
def test_the_narrowest_codec_allowed_is_a_lossy_one_or_none(name: str, value: str) -> None:
    assert f"{name}={value!r}" in refusal({name: value})


@pytest.mark.parametrize(
    ("codec", "lossy_max", "narrowest"),
    [
        ("raw", "none", Codec.RAW),
        ("auto", "none", Codec.RAW),
        ("auto", "int4", Codec.INT4),
        ("int8", "none", Codec.INT8),
        ("int8", "int2", Codec.INT2),
        ("int2", "int8", Codec.INT2),
    ],
)
def test_a_lossy_codec_is_allowed_by_naming_it(
    codec: str, lossy_max: str, narrowest: Codec
) -> None:
    assert PdConfig.parse({"codec": codec, "lossy_max": lossy_max}, {}).narrowest is narrowest


def test_no_lossy_codec_is_allowed_unless_the_operator_says_so() -> None:
    assert PdConfig.parse({}, {}).narrowest is Codec.RAW


@pytest.mark.parametrize("options", [{"codec": "int8"}, {"lossy_max": "int4"}], ids=str)
def test_lossy_codecs_need_staging_memory(options: dict[str, str]) -> None:
    message = refusal({"staging_bytes": 0} | options)
    assert "staging_bytes=0 leaves no room" in message
    assert "or use codec=raw" in message


@pytest.mark.parametrize("options", [{}, {"codec": "auto"}, {"packing": "always"}], ids=str)
def test_without_lossy_codecs_there_may_be_no_staging_memory(options: dict[str, str]) -> None:
    assert PdConfig.parse({"staging_bytes": 0} | options, {}).staging_bytes == 0


def test_an_unknown_option_is_named_with_all_that_are_allowed() -> None:
    message = refusal({"lease": 3})
    assert "'lease'" in message
    assert all(name in message for name in OPTIONS)


def test_the_cluster_key_is_not_an_option() -> None:
    message = refusal({"cluster_key": KEY})
    assert "'cluster_key'" in message
    assert KEY not in message


@pytest.mark.parametrize("value", [-1, 65536, 7000.0, "7000", True, None, [7000]])
def test_a_port_that_is_none_is_refused(value: object) -> None:
    message = refusal({"port": value})
    assert f"port={value!r}" in message
    assert "0 (any free one) to 65535" in message


@pytest.mark.parametrize("value", [0, 65535])
def test_the_ends_of_the_port_range_are_allowed(value: int) -> None:
    assert PdConfig.parse({"port": value}, {}).port == value


@pytest.mark.parametrize("name", TIMES)
@pytest.mark.parametrize(
    "value", [0, 0.04, -1, 86_401, "30", True, None, float("nan"), float("inf"), 10**400]
)
def test_a_time_that_cannot_work_is_refused(name: str, value: object) -> None:
    message = refusal({name: value})
    assert f"{name}={value!r}" in message
    assert "0.05 to 86400 seconds" in message


@pytest.mark.parametrize(("name", "least"), [("stretch_bytes", 1), ("staging_bytes", 0)])
@pytest.mark.parametrize("value", ["too small", -1, 2**50 + 1, 1.0, "2MiB", True, None, [1]])
def test_what_is_no_size_is_refused(name: str, least: int, value: object) -> None:
    value = least - 1 if value == "too small" else value
    message = refusal({name: value})
    assert f"{name}={value!r}" in message
    assert f"{least} to 2**50 bytes" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stretch_bytes", 1),
        ("stretch_bytes", 2**50),
        ("staging_bytes", 0),
        ("staging_bytes", 2**50),
    ],
)
def test_the_ends_of_the_range_of_sizes_are_allowed(name: str, value: int) -> None:
    assert getattr(PdConfig.parse({name: value}, {}), name) == value


@pytest.mark.parametrize("name", ["host", "advertise_host"])
@pytest.mark.parametrize("value", [1, None, ["127.0.0.1"], b"127.0.0.1"])
def test_an_address_that_is_no_text_is_refused(name: str, value: object) -> None:
    message = refusal({name: value})
    assert f"{name}={value!r}" in message
    assert "host name or an IP address" in message


def test_an_empty_host_is_refused() -> None:
    assert "host=''" in refusal({"host": ""})


@pytest.mark.parametrize("name", ["host", "advertise_host"])
@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "::", "example.org", "127.example.org"])
def test_without_a_key_only_loopback_can_be_bound_or_advertised(name: str, host: str) -> None:
    message = refusal({"host": "127.0.0.1", "advertise_host": "127.0.0.1"} | {name: host})
    assert message.startswith(f"{name}={host!r} is not a loopback address")
    assert CLUSTER_KEY_VARIABLE in message
    assert f"use {name}=127.0.0.1" in message


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    assert PdConfig.parse({"host": host}, {}).advertise_host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "0:0:0:0:0:0:0:0", "*"])
def test_a_wildcard_host_needs_an_address_to_advertise(host: str) -> None:
    message = refusal({"host": host}, KEYED)
    assert f"host={host!r}" in message
    assert "advertise_host" in message


def test_a_wildcard_host_with_an_address_to_advertise_is_allowed() -> None:
    options = {"host": "0.0.0.0", "advertise_host": "10.0.0.1"}
    assert PdConfig.parse(options, KEYED).advertise_host == "10.0.0.1"


def test_a_bound_address_is_advertised() -> None:
    assert PdConfig.parse({"host": "10.0.0.1"}, KEYED).advertise_host == "10.0.0.1"


def test_a_short_key_is_refused_without_being_shown() -> None:
    message = refusal({}, {CLUSTER_KEY_VARIABLE: "sesame"})
    assert CLUSTER_KEY_VARIABLE in message
    assert "6 characters" in message
    assert "at least 16" in message
    assert "sesame" not in message


def test_a_key_of_just_the_minimum_is_allowed() -> None:
    assert PdConfig.parse({}, KEYED).cluster_key == KEY


def test_an_empty_key_is_no_key() -> None:
    assert PdConfig.parse({}, {CLUSTER_KEY_VARIABLE: ""}).cluster_key is None


def test_a_key_comes_from_a_file_as_a_secret_store_mounts_it(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(KEY + "\n")
    assert PdConfig.parse({}, {f"{CLUSTER_KEY_VARIABLE}_FILE": str(path)}).cluster_key == KEY
    path.write_text(f" {KEY}\r\n")
    assert read_secret({"K_FILE": str(path)}, "K") == f" {KEY}"


def test_neither_a_key_nor_a_file_is_no_key() -> None:
    assert read_secret({}, "K") is None
    assert read_secret({"K": "", "K_FILE": ""}, "K") is None


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"one\ntwo\n", "has several lines"),
        (b"\xff\xfe", "is no text"),
    ],
)
def test_a_file_without_a_key_is_named(tmp_path: Path, content: bytes | None, why: str) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_secret({"K_FILE": str(path)}, "K")
    assert str(caught.value).startswith(f"K_FILE: {path} {why}")
    assert len(str(caught.value).splitlines()) == 1


def test_a_key_in_two_places_is_refused() -> None:
    with pytest.raises(ConfigError, match="K and K_FILE are both set"):
        read_secret({"K": "a", "K_FILE": "/b"}, "K")


def test_the_key_is_never_shown() -> None:
    config = PdConfig.parse({}, KEYED)
    assert KEY not in repr(config)
    assert KEY not in str(config)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("127.255.0.1", True),
        ("::1", True),
        ("localhost.example.org", False),
        ("0.0.0.0", False),
        ("::ffff:10.0.0.1", False),
        ("2130706433", False),
        ("", False),
    ],
)
def test_loopback_is_recognised_without_a_lookup(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
