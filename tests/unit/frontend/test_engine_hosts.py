"""Where engines may be that somebody adds by their address."""

from __future__ import annotations

import pytest

from vllm_pd_plugin.errors import ConfigError
from vllm_pd_plugin.frontend.engine_hosts import EngineHosts

POOL = ["http://10.0.0.1:8000", "https://Decode-1.example:8443", "http://[fd00::1]:8000"]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:9", True),
        ("http://localhost:9", True),
        ("http://[::1]:9", True),
        ("http://10.0.0.1:9", True),
        ("http://[fd00:0:0::1]:9", True),
        ("http://decode-1.example:9", True),
        ("http://10.0.0.2:9", False),
        ("http://decode-2.example:9", False),
        ("http://decode-1.example.evil:9", False),
        ("http://169.254.169.254", False),
        ("http://[fd00::2]:9", False),
    ],
)
def test_loopback_and_the_hosts_of_the_pool_are_allowed(url: str, expected: bool) -> None:
    assert EngineHosts.parse([], POOL).allows(url) is expected


@pytest.mark.parametrize(
    ("pattern", "allowed", "refused"),
    [
        ("10.0.1.0/24", "http://10.0.1.200:9", "http://10.0.2.1:9"),
        ("fd00::/64", "http://[fd00::7]:9", "http://[fd01::7]:9"),
        ("10.0.1.7", "http://10.0.1.7:9", "http://10.0.1.8:9"),
        ("[fd00::7]", "http://[fd00::7]:9", "http://[fd00::8]:9"),
        ("*.Pool.example", "http://a.pool.example:9", "http://pool.example:9"),
        ("gpu-?", "http://gpu-1", "http://gpu-12"),
    ],
)
def test_the_operator_allows_more(pattern: str, allowed: str, refused: str) -> None:
    hosts = EngineHosts.parse([pattern], [])
    assert hosts.allows(allowed)
    assert not hosts.allows(refused)


def test_a_star_is_anywhere() -> None:
    hosts = EngineHosts.parse(["*"], [])
    assert hosts.allows("http://192.0.2.1:9")
    assert hosts.allows("http://[2001:db8::1]:9")
    assert hosts.allows("http://anything.example")


@pytest.mark.parametrize("pattern", ["10.0.0.0/33", "10.0.0.1/24", "name/24"])
def test_what_is_no_network_is_named(pattern: str) -> None:
    with pytest.raises(ConfigError, match=f"--engine-hosts '{pattern}' is no network"):
        EngineHosts.parse([pattern], [])
