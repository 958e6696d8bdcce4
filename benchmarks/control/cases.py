"""The cases, as a program that also runs in a checkout of an older commit.

It prints one JSON object a case: `case`, `ms`, and what else is counted. Everything is the
package's own code and the fakes of the checkout's tests; no socket is opened, and only the case of
a scattered prompt moves bytes, with NIXL, within this process.

    PYTHONPATH=CHECKOUT python benchmarks/control/cases.py
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's
    try:
        from tests.fakes.cluster import FakeCluster
        from vllm_pd_plugin.edge.metrics import PdStats
        from vllm_pd_plugin.edge.producer_requests import ProducingRequests
        from vllm_pd_plugin.memory.layout import Group, RankLayout, RankMemory, Region
        from vllm_pd_plugin.net import nixl_transport
        from vllm_pd_plugin.protocol import framing, wire
    except ImportError:  # before the packages
        from vllm_pd_plugin.layout import Group, RankLayout, RankMemory, Region
        from vllm_pd_plugin.metrics import PdStats
        from vllm_pd_plugin.producing import ProducingRequests

        from tests.fakes.engines import FakeCluster
        from vllm_pd_plugin import nixl_transport, wire
        from vllm_pd_plugin import wire as framing
from tests.fakes import engines, memory
from vllm_pd_plugin.ids import Source, new_handoff_id, new_incarnation

LAYERS, RANKS, BLOCK_TOKENS = 62, 8, 16
TOKEN_BYTES = 512  # of one layer on one rank: a head of 128, K and V, in bfloat16
STRETCH_BYTES = 2 * 2**20
REPEAT = 5

Case = Callable[[], dict[str, float]]


def layout_of(ranks: int) -> Any:
    layers = tuple(f"model.layers.{i}.attn" for i in range(LAYERS))
    group = Group("full", BLOCK_TOKENS, None, layers, (1, BLOCK_TOKENS, 256), "bfloat16")
    fields = {"model": "m"} if "model" in RankLayout.__struct_fields__ else {}
    return RankLayout(tensor_parallel_size=ranks, groups=(group,), **fields)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing of what is timed is to be the collector's."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def milliseconds(act: Callable[[], object], times: int = 1) -> float:
    """Return the median duration of one call."""
    taken = []
    with quiet():
        for _ in range(times):
            began = time.perf_counter()
            act()
            taken.append(1e3 * (time.perf_counter() - began))
    return statistics.median(taken)


# --- a prefill engine's step --------------------------------------------------------------------


class Step:
    """A producer of `RANKS` ranks, and prompts of which it computes a step."""

    def __init__(self, prompts: int, tokens: int, consumers: int) -> None:
        self.cluster = FakeCluster(layout=layout_of(RANKS))
        self.control = self.cluster.producer.control
        self.messages = 0
        self.senders: dict[str, Any] = {}
        self._take_messages()
        self.blocks: dict[str, Any] = {}
        calls: list[Callable[[Any], None]] = []
        self.calls = calls
        self.requests = ProducingRequests(STRETCH_BYTES, calls.append, PdStats())
        region = Region(0, 10_000, BLOCK_TOKENS * TOKEN_BYTES, BLOCK_TOKENS * TOKEN_BYTES)
        self.requests.describe(layout_of(RANKS), RankMemory((region,) * LAYERS, b""))
        self.requests.bind(SimpleNamespace(get_block_ids=self.blocks.__getitem__))  # type: ignore[arg-type]
        self.scheduled = {f"r{i}": tokens for i in range(prompts)}
        self.handoffs: list[Any] = []
        for number, name in enumerate(self.scheduled):
            self._add(number, name, tokens, number % consumers)
        self._run_calls()
        for number, handoff in enumerate(self.handoffs):
            for rank in range(RANKS):
                subscribe = wire.Subscribe(handoff, rank, 1, (rank,))
                self._tell(subscribe, f"c{number % consumers}-{rank}")

    def run(self) -> dict[str, float]:
        """One step: what the engine's thread decides, and what the control thread sends."""
        self.messages = 0

        def step() -> None:
            announcement = self.requests.advance(self.scheduled)
            assert announcement is not None
            self._run_calls()
            self.stretches = len(announcement.after_layers)
            for num_layers in announcement.after_layers:
                for rank in range(RANKS):
                    self._announce(announcement.step, rank, num_layers)

        ms = milliseconds(step)
        return {"ms": ms, "messages": self.messages / RANKS, "stretches": self.stretches}

    def _add(self, number: int, name: str, tokens: int, consumer: int) -> None:
        blocks = -(-tokens // BLOCK_TOKENS)
        self.blocks[name] = (list(range(1 + number * blocks, 1 + (number + 1) * blocks)),)
        request = SimpleNamespace(
            request_id=name, prompt_token_ids=[7] * tokens, all_token_ids=[7] * tokens,
            num_prompt_tokens=tokens, num_computed_tokens=0, num_preemptions=0,
            kv_transfer_params=None, lora_request=None, mm_features=None,
        )  # fmt: skip
        handoff = new_handoff_id()
        self.handoffs.append(handoff)
        self.requests.add(request, handoff)  # type: ignore[arg-type]
        self.requests.scheduled(name)
        self._run_calls()
        self._tell(wire.Want(handoff), f"c{consumer}")

    def _announce(self, step: int, rank: int, num_layers: int) -> None:
        worker = self.cluster.producer.worker.incarnation
        target = self.cluster.producer.identity.incarnation
        frames = framing.encode(wire.Announce(step, rank, num_layers), worker, target)
        self.control.receive(b"worker-%d" % rank, frames)

    def _tell(self, message: Any, who: str) -> None:
        sender = self.senders.setdefault(who, new_incarnation())
        target = self.cluster.producer.identity.incarnation
        self.control.receive(who.encode(), framing.encode(message, sender, target))

    def _run_calls(self) -> None:
        for call in self.calls:
            call(self.control)
        self.calls.clear()
        self.control.turn()

    def _take_messages(self) -> None:
        def count(_identity: bytes, _frames: list[bytes]) -> None:
            self.messages += 1

        if hasattr(self.control, "_outbox"):
            self.control._outbox._send = count
        else:
            self.control._answer = count


def many_prompts_for_one() -> dict[str, float]:
    return Step(prompts=64, tokens=128, consumers=1).run()


def many_prompts_for_many() -> dict[str, float]:
    return Step(prompts=64, tokens=128, consumers=64).run()


def one_prompt() -> dict[str, float]:
    return Step(prompts=1, tokens=8192, consumers=1).run()


# --- idle fetches, open handoffs, peers ---------------------------------------------------------


def idle_fetches() -> dict[str, float]:
    """A decode rank whose fetches all wait for their prompts to be computed."""
    cluster = FakeCluster()
    for number in range(256):
        source = cluster.producer.begin(f"p{number}", 8)
        cluster.consumer.fetch(f"c{number}", source, [7, 9], 8)
    for _ in range(8):
        cluster.settle()
    return {"ms": milliseconds(cluster.consumer.plane.turn, 200), "messages": 0}


def open_handoffs() -> dict[str, float]:
    """A prefill engine that has a thousand handoffs under way hears of one of them."""
    cluster = FakeCluster()
    sources = [cluster.producer.begin(f"p{number}", 8) for number in range(1000)]
    for number, source in enumerate(sources):
        cluster.consumer.control.want(f"c{number}", source)
    for _ in range(8):
        cluster.settle()
    control, target = cluster.producer.control, cluster.producer.identity.incarnation
    sender = new_incarnation()
    frames = [
        framing.encode(wire.Subscribe(s.handoff_id, 0, 1, (0,)), sender, target)
        for s in sources[:200]
    ]
    waiting = iter(frames)

    def take_one() -> None:
        control.receive(b"rank", next(waiting))
        control.turn()

    return {"ms": milliseconds(take_one, len(frames)), "messages": 1}


def heartbeats() -> dict[str, float]:
    """A decode engine tells a thousand prefill engines that their handoffs are still wanted."""
    cluster = FakeCluster()
    template = cluster.producer.control._welcome
    sent = 0

    class Link:
        def __init__(self, on_message: Callable[[list[bytes]], None]) -> None:
            self.on_message = on_message
            self.incarnation = new_incarnation()

        def send(self, frames: list[bytes]) -> None:
            nonlocal sent
            sent += 1
            if framing.decode(frames)[0].kind == "hello":
                links.append(self)

        def close(self) -> None:
            """Not asked."""

    def answer() -> None:
        for link in links:
            link.on_message(framing.encode(wire.Alive({}), link.incarnation, target))

    def count(_link: Link, _frames: list[bytes]) -> None:
        nonlocal sent
        sent += 1

    links: list[Link] = []
    control = cluster.consumer.control
    peers = (control._wanting if hasattr(control, "_wanting") else control)._peers
    peers._connect = lambda address, on_message: Link(on_message)
    for number in range(1000):
        source = Source(new_handoff_id(), (f"10.0.{number // 250}.{number % 250}", 7000), None)
        control.want(f"c{number}", source)
    target = cluster.consumer.identity.incarnation
    for link in links:
        link.on_message(framing.encode(template, link.incarnation, target))
    control.turn()
    assert sent == 2000  # each was greeted, and asked
    Link.send = count  # type: ignore[method-assign]
    rounds = []
    for _ in range(7):
        cluster.clock.advance(1.01)
        rounds.append(milliseconds(control.turn))
        answer()
    assert sent == 9000
    return {"ms": statistics.median(rounds), "messages": 1000}


def answers() -> dict[str, float]:
    """One of a thousand prefill engines answers a heartbeat."""
    cluster = FakeCluster()
    links: list[Any] = []

    def connect(_address: object, on_message: Callable[[list[bytes]], None]) -> Any:
        link = SimpleNamespace(
            send=lambda frames: None, close=lambda: None, take=on_message, who=new_incarnation()
        )
        links.append(link)
        return link

    control = cluster.consumer.control
    peers = (control._wanting if hasattr(control, "_wanting") else control)._peers
    peers._connect = connect
    target = cluster.consumer.identity.incarnation
    for number in range(1000):
        source = Source(new_handoff_id(), (f"10.0.{number // 250}.{number % 250}", 7000), None)
        control.want(f"c{number}", source)
    for link in links:
        link.take(framing.encode(cluster.producer.control._welcome, link.who, target))
    control.turn()
    waiting = iter([(link, framing.encode(wire.Alive({}), link.who, target)) for link in links])

    def take_one() -> None:
        link, frames = next(waiting)
        link.take(frames)
        control.turn()

    return {"ms": milliseconds(take_one, 200), "messages": 1}


# --- a long prompt, scattered -------------------------------------------------------------------


def scattered_prompt() -> list[dict[str, float]]:
    """The longest call on a decode rank's transfer thread while it connects to a peer, and fetches
    a block; and while it fetches 64k tokens whose blocks are neighbours nowhere."""
    blocks, block_bytes = 4096, 2048
    memory._NUM_BLOCKS, memory.BLOCK_BYTES = blocks + 1, block_bytes
    engines.FakeTransport = lambda *_: nixl_transport.NixlTransport("DRAM", 0)
    layers = tuple(f"model.layers.{i}.attn" for i in range(LAYERS))
    group = Group("full", BLOCK_TOKENS, None, layers, (1, BLOCK_TOKENS, 128), "uint8")
    fields = {"model": "m"} if "model" in RankLayout.__struct_fields__ else {}
    cluster = FakeCluster(layout=RankLayout(tensor_parallel_size=1, groups=(group,), **fields))
    cluster.clock.__class__.__call__ = lambda self: time.monotonic()  # type: ignore[method-assign]
    producer, consumer = cluster.producer, cluster.consumer
    for layer in range(LAYERS):
        producer.caches[layer][:] = layer + 1
        consumer.caches[layer][:] = 0xEE  # no page is to be touched for the first time
    chance = random.Random(1)
    there, here = (chance.sample(range(1, blocks + 1), blocks) for _ in range(2))
    first = producer.produce("first", there[:1], BLOCK_TOKENS)
    source = producer.produce("p", there, blocks * BLOCK_TOKENS)
    time.sleep(0.5)  # an engine has been up for a while
    worst = 0.0

    def timed(act: Callable[[], object]) -> None:
        nonlocal worst
        began = time.perf_counter()
        act()
        worst = max(worst, time.perf_counter() - began)

    consumer._report = lambda result: consumer.results.append(result)  # type: ignore[method-assign]
    consumer.plane._on_result = consumer._report

    def fetch(name: str, source: Source, here: list[int]) -> dict[str, float]:
        nonlocal worst
        worst, began = 0.0, time.monotonic()
        consumer.results.clear()
        with quiet():
            timed(lambda: consumer.fetch(name, source, here, len(here) * BLOCK_TOKENS))
            while not consumer.results:
                while cluster.network.in_flight:
                    packet = cluster.network.in_flight.pop(0)
                    if packet.lane[1] == "back":
                        timed(packet.deliver)
                    else:
                        packet.deliver()
                timed(consumer.plane.turn)
                producer.transport.progress()
                assert time.monotonic() < began + 60, "the prompt does not arrive"
        assert consumer.results[0].reason is None
        return {"ms": 1e3 * worst, "messages": 0, "seconds": time.monotonic() - began}

    rows = [fetch("first", first, here[:1]), fetch("c", source, here)]
    assert all((consumer.caches[layer][1:] == layer + 1).all() for layer in range(LAYERS))
    return rows


CASES: dict[str, Case] = {
    "a step of 64 prompts of 128 tokens, 62 layers, 8 ranks, one consumer": many_prompts_for_one,
    "the same, 64 consumers": many_prompts_for_many,
    "a step of one prompt of 8,192 tokens, 62 layers, 8 ranks": one_prompt,
    "a turn of a consumer with 256 idle fetches": idle_fetches,
    "a message to a producer with 1,000 open handoffs": open_handoffs,
    "a heartbeat round to 1,000 peers": heartbeats,
    "an answer of one of 1,000 peers": answers,
}
LONGEST_CALLS = (
    "the longest call while a consumer's rank connects to a new peer",
    "the longest call while 64k scattered tokens are fetched, 62 layers",
)


def main() -> None:
    logging.disable(logging.WARNING)
    for name, case in CASES.items():
        print(json.dumps({"case": name} | case()), flush=True)
    for name, row in zip(LONGEST_CALLS, scattered_prompt(), strict=True):
        print(json.dumps({"case": name} | row), flush=True)


if __name__ == "__main__":
    main()
