"""Whatever the engine process calls may raise once: what it belongs to ends, all else goes on.

Two engines' halves, with real sockets, threads, NIXL, ops and vLLM's own requests and blocks. A
first run notes from where each foreign function is called; then each of these calls raises, once,
among handoffs. A call that the run does not reach, and that is not named here as one of the start
or the end, fails the test.
"""

from __future__ import annotations

import ast
import importlib
import os
import secrets
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import zmq

import vllm_pd_plugin

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    import nixl._api
    import torch
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.request import Request

    from tests.fakes.bare_engine import NUM_BLOCKS, BareEngine, kv_of
    from vllm_pd_plugin.codecs import ops

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(300)]

PACKAGE = Path(vllm_pd_plugin.__file__).parent
Site = tuple[str, str, str]
"""A foreign function, and the module and function of ours that calls it."""


class Library(NamedTuple):
    """Functions that an owner has, and where our engine process may call them."""

    owner: Any
    names: tuple[str, ...]
    home: str


LIBRARIES = (
    Library(
        zmq.Socket, ("send_multipart", "recv_multipart", "connect", "bind", "close"), "net/channel"
    ),
    Library(zmq.Poller, ("poll", "register", "unregister"), "net/channel"),
    Library(zmq.Context, ("socket", "destroy", "set"), "net/channel"),
    Library(os, ("eventfd", "eventfd_read", "eventfd_write"), "net/channel"),
    Library(time, ("sleep",), "net/channel"),
    Library(
        nixl._api.nixl_agent,
        (
            "get_agent_metadata", "register_memory", "get_reg_descs", "add_remote_agent",
            "initialize_xfer", "transfer", "check_xfer_state", "release_xfer_handle",
            "get_new_notifs", "get_xfer_descs",
        ),
        "net/nixl_transport",
    ),
    Library(
        ops,
        ("pack_blocks", "unpack_blocks", "encode_blocks", "decode_blocks", "digest_blocks"),
        "packing/*",
    ),
    Library(KVCacheManager, ("get_block_ids",), "edge/*"),
    Library(KVCacheBlocks, ("get_block_ids",), "edge/*"),
    Library(BlockPool, ("get_cached_block",), "edge/*"),
    Library(Request, ("update_block_hashes",), "edge/*"),
)  # fmt: skip
START_AND_END = {
    ("set", "channel", "Loop.__init__"),
    ("register", "channel", "Loop.__init__"),
    ("eventfd", "channel", "Loop.__init__"),
    ("eventfd_write", "channel", "Loop.close"),
    ("destroy", "channel", "Loop.close"),
    ("close", "channel", "Loop.close"),
    ("bind", "channel", "Listener.__init__"),
    ("close", "channel", "Listener.__init__"),
    ("get_agent_metadata", "nixl_transport", "NixlTransport.register"),
    # When a peer is lost: ``test_peers_idle`` has them.
    ("close", "channel", "Dealer.close"),
    ("unregister", "channel", "Loop.remove"),
}
"""Calls that are made before a request can come, or when the engine ends: there, a fault is the
operator's to see."""
OF_A_NEW_PEER = {
    ("socket", "channel", "_socket"),
    ("register", "channel", "Loop.add"),
    ("register_memory", "nixl_transport", "NixlTransport._new_agent"),
    ("get_reg_descs", "nixl_transport", "NixlTransport._new_agent"),
    ("connect", "channel", "Dealer.__init__"),
    ("add_remote_agent", "nixl_transport", "NixlTransport.add_peer"),
}
"""Of a new peer: reached again only with one."""


class Injector:
    """Notes each call of a foreign function by our code, and lets one raise."""

    def __init__(self) -> None:
        self.sites: set[Site] = set()
        self.armed: Site | None = None
        self.raised = threading.Event()

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            frame = sys._getframe(1)
            path = Path(frame.f_code.co_filename)
            if PACKAGE in path.parents:
                site = (name, path.stem, frame.f_code.co_qualname.replace(".<locals>", ""))
                self.sites.add(site)
                if site == self.armed:
                    self.armed = None
                    self.raised.set()
                    raise RuntimeError(f"injected: {site}")
            return function(*args, **kwargs)

        return wrapped

    @contextmanager
    def installed(self) -> Iterator[None]:
        before = [(each.owner, n, getattr(each.owner, n)) for each in LIBRARIES for n in each.names]
        try:
            for owner, name, function in before:
                setattr(owner, name, self.wrap(name, function))
            yield
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)


class Pair:
    """A producer and a consumer, and handoffs between them."""

    def __init__(self) -> None:
        quick = {
            "lease_s": 1.5,
            "peer_timeout_s": 1.0,
            "fetch_timeout_s": 2.0,
            "queue_timeout_s": 4.0,
        }
        self._options = quick
        self.producer = BareEngine("prefill", **quick, stretch_bytes=1)
        self.consumer = self._new_consumer()
        self._count = 0
        self.rest = NUM_BLOCKS - 1

    def _new_consumer(self) -> BareEngine:
        return BareEngine(
            "decode", **self._options, lossy_max="int2", packing="always", integrity="digest"
        )

    def renew_consumer(self) -> None:
        """From now on it is another engine, that has not met the producer yet."""
        self.consumer.close()
        self.consumer = self._new_consumer()

    def hand_off(self, codec: str = "raw") -> str:
        """Begin a handoff; return its requests' name."""
        self._count += 1
        name, handoff_id = f"r{self._count}", secrets.token_hex(16)
        prompt = [self._count * 100 + i for i in range(70)]
        host, port = self.producer.address
        self.consumer.add(
            name,
            prompt,
            {
                "do_remote_prefill": True, "remote_host": host, "remote_port": port,
                "remote_handoff_id": handoff_id, "codec": codec, "seed_first_token": True,
            },
        )  # fmt: skip
        self.producer.add(name, prompt, {"do_remote_decode": True, "handoff_id": handoff_id})
        return name

    def settle(self, names: list[str], timeout_s: float = 20.0) -> None:
        """Step both engines until these handoffs are over, and nothing is held any more."""
        deadline = time.monotonic() + timeout_s
        while not self._is_over(names):
            assert time.monotonic() < deadline, f"not over: {self.describe(names)}"
            for engine in (self.producer, self.consumer):
                engine.step()

    def _is_over(self, names: list[str]) -> bool:
        engines = (self.producer, self.consumer)
        ended = all(engine.requests[name].outcome for engine in engines for name in names)
        return ended and all(engine.free_blocks == self.rest for engine in engines)

    def describe(self, names: list[str]) -> object:
        engines = {"producer": self.producer, "consumer": self.consumer}
        return {
            role: [
                (name, e.requests[name].outcome, e.requests[name].waits_for_kv, e.free_blocks)
                for name in names
            ]
            for role, e in engines.items()
        }

    def assert_right(self, name: str, exact: bool = True) -> None:
        tracked = self.consumer.requests[name]
        assert tracked.outcome == "fetched", f"{name}: {tracked.outcome or 'open'}"
        prompt = self.producer.requests[name].request.prompt_token_ids
        assert prompt is not None
        assert tracked.kv is not None
        expected = torch.stack([kv_of(prompt[:70], layer) for layer in range(2)])
        rows = slice(0, 70)
        got, wanted = (
            kv.permute(0, 2, 1, 3, 4).reshape(2, 2, -1, kv.shape[-1])[:, :, rows]
            for kv in (tracked.kv, expected)
        )
        if exact:
            assert torch.equal(got, wanted)
        else:  # int8's error is at most a 254th of a row's largest number
            assert torch.allclose(got, wanted, rtol=0.01)

    def close(self) -> None:
        self.consumer.close()
        self.producer.close()


def calls_in_the_source() -> set[Site]:
    """Every call of those functions by those modules."""
    found: set[Site] = set()
    for library in LIBRARIES:
        for path in PACKAGE.glob(f"{library.home}.py"):
            _walk(ast.parse(path.read_text()), path.stem, "", library.names, found)
    return found


def _walk(
    node: ast.AST, module: str, within: str, names: tuple[str, ...], found: set[Site]
) -> None:
    for child in ast.iter_child_nodes(node):
        inside = within
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            inside = f"{within}.{child.name}".lstrip(".")
        elif isinstance(child, ast.Lambda):
            inside = f"{within}.<lambda>"
        elif isinstance(child, ast.Call):
            name = getattr(child.func, "attr", getattr(child.func, "id", ""))
            if name in names:
                found.add((name, module, within))
        _walk(child, module, inside, names, found)


def _around(site: Site) -> Site:
    """A comprehension is a function of its own to Python, and a name is to be found without it."""
    name, module, within = site
    return name, module, within.split(".<")[0]


@pytest.fixture(scope="module")
def injector() -> Iterator[Injector]:
    injector = Injector()
    with injector.installed():
        yield injector


@pytest.fixture(scope="module")
def pair(injector: Injector) -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


def test_each_call_may_raise_once_and_a_healthy_handoff_completes(
    injector: Injector, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("peer_reading", "peer_pieces", "peer_reads"):
        found = importlib.import_module(f"vllm_pd_plugin.transfer.{module}")
        monkeypatch.setattr(found, "ASK_AGAIN_S", 0.3)
    names = [pair.hand_off("raw"), pair.hand_off("int8"), pair.hand_off("raw")]
    pair.settle(names)
    pair.assert_right(names[0])
    pair.assert_right(names[1], exact=False)

    missed = {_around(site) for site in calls_in_the_source()}
    missed -= {_around(site) for site in injector.sites} | START_AND_END
    assert not missed, f"foreign calls that no test lets raise: {sorted(missed)}"

    sites = [s for s in sorted(injector.sites) if _around(s) not in START_AND_END | OF_A_NEW_PEER]
    quiet = [site for site in sites if not raises_once(injector, pair, site)]
    assert not quiet, f"these were not reached again: {quiet}"


def test_each_call_for_a_new_peer_may_raise_once_and_the_next_handoff_completes(
    injector: Injector, pair: Pair
) -> None:
    quiet = []
    for site in sorted(OF_A_NEW_PEER):
        pair.renew_consumer()
        injector.raised.clear()
        injector.armed = site
        first = pair.hand_off("raw")
        pair.settle([first])
        if not injector.raised.wait(1.0):  # what is made ahead is made meanwhile
            quiet.append(site)
        injector.armed = None
        second = pair.hand_off("raw")
        pair.settle([second])
        pair.assert_right(second)
    assert not quiet, f"these were not reached: {quiet}"


def raises_once(injector: Injector, pair: Pair, site: Site) -> bool:
    """Let a call raise among handoffs; return whether it was reached."""
    injector.raised.clear()
    before = pair.hand_off("raw")
    injector.armed = site
    beside = [pair.hand_off("raw"), pair.hand_off("int8")]
    pair.settle([before, *beside])
    injector.armed = None
    after = pair.hand_off("raw")
    pair.settle([after])
    pair.assert_right(after)
    well = [n for n in (before, *beside) if pair.consumer.requests[n].outcome == "fetched"]
    for name in well:
        pair.assert_right(name, exact=name != beside[1])
    assert len(well) >= 2, f"{site} cost more than one handoff: {pair.describe([before, *beside])}"
    return injector.raised.is_set()
