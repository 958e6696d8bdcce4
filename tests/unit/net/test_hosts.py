"""What a host is, as text."""

from __future__ import annotations

import pytest

from vllm_pd_plugin.net.hosts import is_host, is_loopback, is_wildcard


@pytest.mark.parametrize(
    "text",
    [
        "localhost", "p1", "p1.example.org", "p1.example.org.", "P-1.Example", "my_container",
        "127.0.0.1", "10.0.0.1", "::1", "fd00::1", "::ffff:10.0.0.1", "a" * 63, "4a.example",
    ],
)  # fmt: skip
def test_names_and_addresses_are_hosts(text: str) -> None:
    assert is_host(text)


@pytest.mark.parametrize(
    "text",
    [
        "", ".", ".....", "-x", "x-", "_srv", "a..b", "a b", "a/b", "a:1", "[::1]", "::1%eth0",
        "*", "a\n", "a" * 64, "a" * 254, "ａ.example", "1234", "127.1", "0", "1.2.3.4.5",
        "1.2.3.256",
    ],
)  # fmt: skip
def test_what_no_resolver_takes_as_it_is_meant_is_not(text: str) -> None:
    assert not is_host(text)


@pytest.mark.parametrize(
    ("host", "loopback", "wildcard"),
    [
        ("localhost", True, False),
        ("127.0.0.2", True, False),
        ("::1", True, False),
        ("10.0.0.1", False, False),
        ("example.org", False, False),
        ("0.0.0.0", False, True),
        ("::", False, True),
        ("*", False, True),
    ],
)
def test_whom_a_host_means(host: str, loopback: bool, wildcard: bool) -> None:
    assert (is_loopback(host), is_wildcard(host)) == (loopback, wildcard)
