"""What an operator says of a frontend."""

from __future__ import annotations

import argparse
import os
import warnings

import pytest

from vllm_pd_plugin.errors import ConfigError
from vllm_pd_plugin.frontend.admin_keys import AdminKey
from vllm_pd_plugin.net.channel import CurveKeys

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm_pd_plugin.frontend.options import (
        FrontendOptions,
        add_engine_options,
        add_frontend_options,
        engine_url,
        parse_engines,
        parse_options,
    )
    from vllm_pd_plugin.frontend.routing.choice import NoPrefill, Policy, Role, Strategy
    from vllm_pd_plugin.frontend.underway import Limits

P, D = "http://10.0.0.1:8000", "http://10.0.0.2:8000"


@pytest.fixture(autouse=True)
def _no_cluster_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PD_CLUSTER_KEY", raising=False)


def parse(*arguments: str) -> FrontendOptions:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_frontend_options(parser)
    add_engine_options(parser)
    args = parser.parse_args(arguments)
    return parse_options(args, parse_engines(args), os.environ)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://10.0.0.1:8000", "http://10.0.0.1:8000"),
        ("http://10.0.0.1:8000/", "http://10.0.0.1:8000"),
        ("10.0.0.1:8000", "http://10.0.0.1:8000"),
        ("engine-3", "http://engine-3"),
        ("engine-3:8000", "http://engine-3:8000"),
        ("https://engine-3:8443", "https://engine-3:8443"),
        ("http://[::1]:8000", "http://[::1]:8000"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("http://[FD00::1]:8000/", "http://[fd00::1]:8000"),
        ("http://Engine-3.Example:8000", "http://engine-3.example:8000"),
        ("http://engine_3:8000", "http://engine_3:8000"),
        ("[::1]", "http://[::1]"),
    ],
)
def test_an_engine_s_address_is_read(text: str, expected: str) -> None:
    assert engine_url(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "http://",
        "ftp://engine",
        "tcp://engine:8000",
        "http://engine:8000/v1",
        "/engine",
        "://",
        "http://user:secret@engine:8000",
        "http://@engine",
        "http://127.1:8000",
        "http://a b:1",
        "http://[fe80::1%25eth0]:1",
        "http://engine:99999",
        "http://[::1:8000",
        "http://-x:1",
    ],
)
def test_what_is_no_address_is_refused_by_name(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="http://HOST:PORT") as caught:
        engine_url(text)
    assert repr(text) in str(caught.value)


def test_engines_are_sorted_in_by_role() -> None:
    options = parse("--decode", D, "--prefill", P, "10.0.0.3:8000", "--both", "b:1")
    roles = {url: wanted.role for url, wanted in options.engines.items()}
    assert roles == {
        P: Role.PREFILL,
        "http://10.0.0.3:8000": Role.PREFILL,
        D: Role.DECODE,
        "http://b:1": Role.BOTH,
    }
    assert all(wanted.drain_until is None for wanted in options.engines.values())


def test_an_engine_that_is_named_twice_is_one_engine() -> None:
    options = parse("--decode", D, f"{D}/", D.removeprefix("http://"), "--prefill", P)
    assert {url: wanted.role for url, wanted in options.engines.items()} == {
        P: Role.PREFILL,
        D: Role.DECODE,
    }


def test_an_engine_that_is_named_as_two_things_is_refused() -> None:
    with pytest.raises(ConfigError, match=f"{D} is named as prefill and as decode; .* --both"):
        parse("--decode", D, "--prefill", P, f"{D}/")


def test_engines_may_be_added_on_loopback_and_at_hosts_that_were_named() -> None:
    hosts = parse("--decode", D, "--engine-hosts", "10.1.0.0/16", "*.example").engine_hosts
    allowed = ["http://10.0.0.2:1", "http://10.1.2.3:1", "http://a.example", "http://[::1]:1"]
    assert all(map(hosts.allows, allowed))
    assert not hosts.allows("http://10.0.0.1:1")


def test_the_admin_key_is_made_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PD_ADMIN_KEY", raising=False)
    assert parse().admin_key.is_made
    monkeypatch.setenv("VLLM_PD_ADMIN_KEY", "given")
    assert parse().admin_key == AdminKey("given", is_made=False)


def test_without_options_everything_is_decided_by_what_is_measured() -> None:
    options = parse()
    assert options.engines == {}
    assert options.policy == Policy()
    assert options.limits == Limits()
    assert options.keys is None
    assert options.wait_s == 600.0


def test_every_option_has_its_place() -> None:
    options = parse(
        "--prefill-strategy", "power-of-two",
        "--decode-strategy", "round-robin",
        "--no-prefill", "queue",
        "--local-below", "0",
        "--request-timeout", "1",
        "--first-token-timeout", "2",
        "--stall-timeout", "3",
        "--queue-timeout", "4",
        "--wait-for-engines", "5",
    )  # fmt: skip
    assert options.policy == Policy(
        Strategy.POWER_OF_TWO, Strategy.ROUND_ROBIN, NoPrefill.QUEUE, local_below=0
    )
    assert options.limits == Limits(1.0, 2.0, 3.0, 4.0)
    assert options.wait_s == 5.0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--prefill-strategy", "worst"],
        ["--no-prefill", "maybe"],
        ["--local-below", "many"],
        ["--local-below", "-5"],
        ["--workers", "0"],
        ["--workers", "-3"],
        ["--stall-timeout", "soon"],
        ["--decode", "ftp://engine"],
    ],
)
def test_an_option_that_is_none_is_refused(arguments: list[str]) -> None:
    with pytest.raises(argparse.ArgumentError):
        parse(*arguments)


def test_a_number_that_is_too_small_is_refused_by_name_and_least_value() -> None:
    with pytest.raises(argparse.ArgumentError, match=r"--workers: '0' is no .* of 1 or more$"):
        parse("--workers", "0")
    assert parse("--workers", "1").workers == 1
    assert parse("--workers", "3").workers == 3


def test_the_cluster_key_is_the_engines_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PD_CLUSTER_KEY", "the key of this cluster")
    assert parse().keys == CurveKeys.derive("the key of this cluster")
