"""Two hosts on one machine: network namespaces joined by a link whose rate can be set.

    client, router ── http ──▶ host 0        not counted, not limited
                   ── http ──▶ host 1
                     host 0 ◀── kv ──▶ host 1   counted, and limited by a token bucket (tbf)

Needs root and iproute2. All names carry the process id, so two runs do not meet; what a run that
was killed left behind is removed by the next one.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

KV_DEVICE = "kv"
"""The link's name inside each namespace."""

BURST = "512kb"
LATENCY = "400ms"

# Both ranges are set aside for benchmarks by RFC 2544; only the first is seen outside.
_HTTP_NETWORKS = ipaddress.ip_network("198.18.0.0/16")
_KV_ADDRESSES = ("198.19.0.1", "198.19.0.2")
_ADDRESSES_PER_RUN = 8
_NAMESPACE = re.compile(r"pdbench-(\d+)-(\d)")


class NetworkError(RuntimeError):
    """The namespaces or the link cannot be made; the message says what to do."""


@dataclasses.dataclass(frozen=True, slots=True)
class Host:
    """A namespace. ``kv_ip`` is its end of the link, ``http_ip`` is reached from outside."""

    namespace: str
    kv_ip: str
    http_ip: str

    def command(self, *arguments: str) -> list[str]:
        """Return the command that runs these arguments on this host."""
        return ["ip", "netns", "exec", self.namespace, *arguments]


@dataclasses.dataclass(frozen=True, slots=True)
class Network:
    """Both hosts, and the link between them."""

    hosts: tuple[Host, Host]

    def limit(self, mbit: int) -> None:
        """Set the link's rate in both directions; 0 takes the limit away."""
        for host in self.hosts:
            device = ("dev", KV_DEVICE, "root")
            with suppress(NetworkError):  # there is none the first time
                _run("tc", "-n", host.namespace, "qdisc", "del", *device)
            if mbit:
                rate = ("rate", f"{mbit}mbit", "burst", BURST, "latency", LATENCY)
                _run("tc", "-n", host.namespace, "qdisc", "add", *device, "tbf", *rate)

    def cut(self) -> None:
        """Have every packet on the link vanish; the devices stay up. ``limit`` mends it."""
        # A bucket smaller than any packet: tbf drops what can never fit.
        bucket = ("tbf", "rate", "8bit", "burst", "10b", "limit", "10b")
        for host in self.hosts:
            device = ("dev", KV_DEVICE, "root")
            _run("tc", "-n", host.namespace, "qdisc", "replace", *device, *bucket)

    def wire_bytes(self) -> int:
        """Return the bytes that the link has carried so far, both directions together."""
        namespace = self.hosts[0].namespace
        shown = _run("ip", "-n", namespace, "-s", "-j", "link", "show", "dev", KV_DEVICE)
        counts = json.loads(shown)[0]["stats64"]
        return int(counts["rx"]["bytes"]) + int(counts["tx"]["bytes"])


def what_is_missing() -> str | None:
    """Return one line that says what this machine lacks, or None."""
    tools = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if tools:
        return (
            f"{' and '.join(tools)} not found; install them with: apt-get install iproute2 "
            "(and have /usr/sbin in PATH)"
        )
    if os.geteuid() != 0:
        return "network namespaces need root; run this as root, for example with sudo"
    return None


@contextmanager
def two_hosts() -> Iterator[Network]:
    """Make both hosts and the link, unlimited; remove them at the end, with all that runs there.

    Raises:
        NetworkError: this machine does not allow it.
    """
    missing = what_is_missing()
    if missing:
        raise NetworkError(missing)
    _remove_stale()
    run = os.getpid()
    try:
        for number in range(2):
            _run("ip", "netns", "add", _namespace(run, number))
            _run("ip", "-n", _namespace(run, number), "link", "set", "lo", "up")
        hosts = (_join_http(run, 0), _join_http(run, 1))
        first, second = (host.namespace for host in hosts)
        _run("ip", "link", "add", KV_DEVICE, "netns", first, "type", "veth",
             "peer", "name", KV_DEVICE, "netns", second)  # fmt: skip
        for host in hosts:
            _bring_up(host.namespace, KV_DEVICE, f"{host.kv_ip}/30")
        yield Network(hosts)
    finally:
        for number in range(2):
            _remove(run, number)


def _join_http(run: int, number: int) -> Host:
    """Join one namespace with the outside, by a subnet of its own."""
    first = (run * _ADDRESSES_PER_RUN) % _HTTP_NETWORKS.num_addresses + 4 * number
    outside, inside = (str(_HTTP_NETWORKS[first + offset]) for offset in (1, 2))
    namespace, device = _namespace(run, number), _outside_device(run, number)
    _run("ip", "link", "add", device, "type", "veth", "peer", "name", "http", "netns", namespace)
    _run("ip", "link", "set", device, "addrgenmode", "none")
    _run("ip", "addr", "add", f"{outside}/30", "dev", device)
    _run("ip", "link", "set", device, "up")
    _bring_up(namespace, "http", f"{inside}/30")
    return Host(namespace, _KV_ADDRESSES[number], inside)


def _bring_up(namespace: str, device: str, address: str) -> None:
    # Without an IPv6 address the kernel sends nothing of its own accord that would be counted.
    _run("ip", "-n", namespace, "link", "set", device, "addrgenmode", "none")
    _run("ip", "-n", namespace, "addr", "add", address, "dev", device)
    _run("ip", "-n", namespace, "link", "set", device, "up")


def _namespace(run: int, number: int) -> str:
    return f"pdbench-{run}-{number}"


def _outside_device(run: int, number: int) -> str:
    return f"pdb{run}-{number}"


def _remove_stale() -> None:
    """Remove what runs left whose process is gone."""
    for line in _run("ip", "netns", "list").splitlines():
        found = _NAMESPACE.match(line)
        if found and not Path(f"/proc/{found[1]}").exists():
            _remove(int(found[1]), int(found[2]))


def _remove(run: int, number: int) -> None:
    """End what still runs in a namespace, and remove it; one that is not there is fine."""
    namespace = _namespace(run, number)
    with suppress(NetworkError):
        for pid in _run("ip", "netns", "pids", namespace).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
    with suppress(NetworkError):
        _run("ip", "link", "del", _outside_device(run, number))
    # The link goes with a namespace, but a namespace only with the last process in it.
    with suppress(NetworkError):
        _run("ip", "-n", namespace, "link", "del", KV_DEVICE)
    with suppress(NetworkError):
        _run("ip", "netns", "del", namespace)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NetworkError(
            f"`{' '.join(command)}` failed: {done.stderr.strip()} "
            "(this needs CAP_NET_ADMIN, network namespaces, and sch_tbf for a limited link)"
        )
    return done.stdout
