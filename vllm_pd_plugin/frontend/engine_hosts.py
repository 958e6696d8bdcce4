"""Which hosts a frontend asks when somebody adds an engine by its address."""

from __future__ import annotations

import dataclasses
import fnmatch
import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from vllm_pd_plugin.errors import ConfigError
from vllm_pd_plugin.frontend.routing.choice import EngineKey
from vllm_pd_plugin.net.hosts import is_loopback

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclasses.dataclass(frozen=True, slots=True)
class EngineHosts:
    """Loopback, the hosts that were named at the start, and what else the operator allows.

    names: of hosts, with ``*`` for any part of one. networks: that contain addresses.
    """

    names: frozenset[str] = frozenset()
    networks: tuple[_Network, ...] = ()

    @classmethod
    def parse(cls, patterns: Iterable[str], engines: Iterable[EngineKey]) -> EngineHosts:
        """patterns: names, addresses and networks (``10.0.0.0/24``). engines: of the pool.

        Raises:
            ConfigError: one is no network, though it has a slash.
        """
        names, networks = set[str](), list[_Network]()
        for pattern in (*patterns, *map(host_of, engines)):
            try:
                networks.append(ipaddress.ip_network(pattern.strip("[]")))
            except ValueError as error:
                if "/" in pattern:
                    text = f"--engine-hosts {pattern!r} is no network: {error}"
                    raise ConfigError(text) from error
                names.add(pattern.lower())
        return cls(frozenset(names), tuple(networks))

    def allows(self, url: EngineKey) -> bool:
        host = host_of(url)
        if is_loopback(host) or any(fnmatch.fnmatchcase(host, name) for name in self.names):
            return True
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        return any(address in network for network in self.networks)


def host_of(url: EngineKey) -> str:
    """Return the host of an engine's address, in small letters and without brackets."""
    return urlsplit(url).hostname or ""
