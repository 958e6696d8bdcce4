"""Where the engines of a chaos run live, and with what they start."""

from __future__ import annotations

import dataclasses
import random
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from benchmarks.chaos.account import Side
from benchmarks.common.engines import SMALL_FLAGS, Place, launch, nixl_arguments, nixl_settings
from benchmarks.common.network import Network, NetworkError, two_hosts
from tests import models
from tests.engine import Engine, EngineError, connector_arguments, say

ARMS = ("pdplugin", "nixl")

LEASE_S = 10
"""The same for both arms: so long a producer holds KV for a consumer that is silent."""

PEER_TIMEOUT_S, FETCH_TIMEOUT_S = 5.0, 30.0
HTTP_PORT, KV_PORT = 8000, 5600

_CORES = {Side.PRODUCER: "0", Side.CONSUMER: "1"}
_ROLES = {Side.PRODUCER: "prefill", Side.CONSUMER: "decode"}


@dataclasses.dataclass(frozen=True, slots=True)
class Site:
    """``network`` is None if both engines share this machine's loopback: no link can be cut."""

    places: Mapping[Side, Place]
    network: Network | None


def open_site(stack: ExitStack) -> Site:
    """Give each engine a network namespace, or both this machine's loopback if that cannot be."""
    try:
        network = stack.enter_context(two_hosts())
    except NetworkError as error:
        say(f"the link will not be dropped: {error}")
        return Site(dict(zip(Side, on_loopback(len(Side)), strict=True)), None)
    hosts = zip(Side, network.hosts, strict=True)
    return Site({side: Place.on_host(host, HTTP_PORT, KV_PORT) for side, host in hosts}, network)


def on_loopback(num_places: int) -> list[Place]:
    """Return places on this machine's loopback."""
    ports = lasting_ports(2 * num_places)
    pairs = zip(ports[::2], ports[1::2], strict=True)
    return [Place((), {}, "127.0.0.1", http, "127.0.0.1", kv) for http, kv in pairs]


def lasting_ports(num_ports: int) -> list[int]:
    """Return ports that nobody is given by chance while their engine is down."""
    ports: list[int] = []
    for port in random.sample(range(20_000, 30_000), 200):  # below Linux's ephemeral ports
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == num_ports:
            return ports
    raise EngineError("too few free ports between 20000 and 30000 on 127.0.0.1")


def launcher(
    arm: str,
    side: Side,
    place: Place,
    policy: str,
    folder: Path,
    cluster_key: str,
    name: str = "",
    flags: Sequence[str] = SMALL_FLAGS,
) -> Callable[[int], Engine]:
    """Return what starts the arm's engine of that side; it takes the number of its life.

    policy: vLLM's ``kv_load_failure_policy``.
    folder: where the logs go.
    name: of the engine, where there are several of a side.
    flags: what every engine is started with.
    """
    environ = {"VLLM_CPU_OMP_THREADS_BIND": _CORES[side]}
    if arm == "pdplugin":
        environ["VLLM_PD_CLUSTER_KEY"] = cluster_key
        connector = connector_arguments(
            _ROLES[side],
            kv_load_failure_policy=policy,
            host=place.kv_host,
            port=place.kv_port,
            lease_s=LEASE_S,
            peer_timeout_s=PEER_TIMEOUT_S,
            fetch_timeout_s=FETCH_TIMEOUT_S,
        )
    else:
        environ |= nixl_settings(place)
        connector = nixl_arguments(
            kv_load_failure_policy=policy, kv_connector_extra_config={"kv_lease_duration": LEASE_S}
        )
    shown, model = f"{arm}-{name or side}", models.tiny_llama()

    def start(life: int) -> Engine:
        log = folder / f"{shown}-{life}.log"
        return launch(shown, model, place, (*flags, *connector), environ, log)

    return start
