"""The two processes of a handoff: one has a forward pass that takes its time, one fetches.

The kernels must be in the extension's place before this is imported (``stand_for_extension``).
"""

from __future__ import annotations

import ctypes
import dataclasses
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tests.gpu.engine import PATIENCE_S, Engine, RankParts, config_of
from tests.gpu.fake_cache import LAYOUT, NUM_TOKENS, FakeCache, expected_after, kv_of, tables
from tests.gpu.kernels import Kernels, say_wrong
from tests.gpu.notes import Notes
from tests.gpu.transports import CudaIpc, MappedTransport, SharedFiles
from vllm_pd_plugin.codecs import ops
from vllm_pd_plugin.codecs.codec import Codec, CodecChoice
from vllm_pd_plugin.ids import Source, new_handoff_id
from vllm_pd_plugin.net.transport import Transport
from vllm_pd_plugin.protocol.events import Offered, Released
from vllm_pd_plugin.protocol.export_states import ExportState
from vllm_pd_plugin.protocol.steps import Advance
from vllm_pd_plugin.transfer.specs import FetchResult, FetchSpec, Segment

WAYS = (
    ("raw", Codec.RAW, "never"),
    ("packed", Codec.RAW, "always"),
    ("int8", Codec.INT8, "never"),
)
"""Name, codec, and whether raw KV is packed."""

CHUNKS = (range(128), range(128, 256), range(256, NUM_TOKENS))
LAYER_S = 0.015
_HERE, _THERE = tables(1), tables(2)
_EVERY_LAYER = tuple(range(1, len(LAYOUT.layers) + 1))
_EMPTY_HERE, _EMPTY_THERE = -7.0, -3.0
"""What the caches are filled with before."""
_SAMPLED = 77


@dataclasses.dataclass(frozen=True, slots=True)
class Side:
    """via: "opened memory" or "NIXL". work: a folder for memory that lies in files."""

    kernels: Kernels
    work: Path
    device: str
    via: str

    def make_engine(self, name: str, codec: Codec, packing: str) -> tuple[Engine, FakeCache]:
        """Return an engine that has started, and its cache."""
        is_cuda = self.device == "cuda"
        memory = CudaIpc(self.kernels) if is_cuda else SharedFiles(self.work / "memory")
        transport: Transport = MappedTransport(memory)
        if self.via == "NIXL":
            from vllm_pd_plugin.net.nixl_transport import NixlTransport

            transport = NixlTransport("VRAM" if is_cuda else "DRAM", 0)
        cache = FakeCache.allocate(memory.allocate)
        cache.fill(0.0)
        self.synchronize()
        parts = RankParts(LAYOUT, cache.caches, transport, memory.allocate)
        engine = Engine(name, config_of(codec, packing), parts)
        engine.start(torch.device(self.device))
        return engine, cache

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


# --- the producer ----------------------------------------------------------------------------


def produce(connection: Connection, side: Side) -> None:
    """Compute a prompt for each ``(handoff id, prompt)`` that comes; until nothing does."""
    engine, cache = side.make_engine("producer", Codec.INT8, "never")
    engine.lend()
    connection.send((engine.address, engine.incarnation))
    step = 0
    try:
        while True:
            handoff_id, prompt = connection.recv()
            step = _produce_one(connection, (engine, cache, side), handoff_id, prompt, step)
    except EOFError:
        engine.close()


def _produce_one(
    connection: Connection, parts: tuple[Engine, FakeCache, Side], handoff_id: Any, prompt: int,
    step: int,
) -> int:  # fmt: skip
    engine, cache, side = parts
    cache.fill(_EMPTY_THERE)
    side.synchronize()
    request, digest = f"p-{prompt}", f"prompt {prompt}".encode()
    engine.on_control(lambda c: c.enqueue(handoff_id, request, NUM_TOKENS, digest))
    engine.on_control(lambda c: c.open(handoff_id))
    connection.recv()  # the consumer has begun to fetch
    forward = Forward(side, cache, prompt)
    for tokens in CHUNKS:
        step += 1
        advance = Advance(handoff_id, 0, tokens.stop, _THERE, (_EVERY_LAYER,))
        engine.on_control(lambda c, step=step, advance=advance: c.advance(step, [advance]))
        for number, layer in enumerate(forward.layers, 1):
            engine.announce(step, number, forward.write(layer, tokens))
    forward.finish()
    engine.on_control(lambda c: c.seal(handoff_id, request, NUM_TOKENS, _THERE, _SAMPLED))
    released = engine.event(Released)
    assert isinstance(released, Released)
    connection.send((released.state is ExportState.COMMITTED, engine.faults))
    return step


class Forward:
    """Writes a prompt's KV layer by layer; on a GPU late, on a stream of its own."""

    def __init__(self, side: Side, cache: FakeCache, prompt: int) -> None:
        self.layers = [LAYOUT.layers[i] for i in LAYOUT.forward_order()]
        self._cache = cache
        self._stream = None
        device = next(iter(cache.caches.values())).device
        self._kv = {layer: kv_of(prompt, layer).to(device) for layer in self.layers}
        self._places = {
            (layer, tokens): cache.places(layer, _THERE, tokens)
            for layer in self.layers
            for tokens in CHUNKS
        }
        if side.device == "cuda":
            self._stream = torch.cuda.Stream()
            self._write_late = side.kernels.function("pd_write_late")
            side.synchronize()

    def write(self, layer: str, tokens: range) -> Callable[[], bool]:
        """Return what says whether it is written."""
        kv, places = self._kv[layer][tokens.start : tokens.stop], self._places[layer, tokens]
        if self._stream is None:
            time.sleep(LAYER_S)
            self._cache.write(layer, places, kv)
            return lambda: True
        nothing, words = ctypes.c_void_p(), ctypes.c_int64(0)
        wait, stream = ctypes.c_int64(int(LAYER_S * 1e9)), ctypes.c_void_p(self._stream.cuda_stream)
        say_wrong(self._write_late(nothing, nothing, words, wait, stream))
        with torch.cuda.stream(self._stream):
            self._cache.write(layer, places, kv)
        event = torch.cuda.Event()
        event.record(self._stream)
        return lambda: bool(event.query())

    def finish(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


# --- the consumer ----------------------------------------------------------------------------


def consume(connection: Connection, side: Side, notes: Notes) -> None:
    """Fetch in each of ``WAYS``, and compare every element."""
    if not connection.poll(PATIENCE_S):
        raise RuntimeError("the producer does not start")
    address, incarnation = connection.recv()
    key = "vllm_pd_plugin::encode_blocks", side.device.upper()
    has_kernels = ops.HAS_NATIVE and torch._C._dispatch_has_kernel_for_dispatch_key(*key)
    notes.check(has_kernels, "the planes do not use the kernels")
    for prompt, (name, codec, packing) in enumerate(WAYS, 1):
        title = f"{name} over {side.via}"
        engine, cache = side.make_engine("consumer", codec, packing)
        cache.fill(_EMPTY_HERE)
        side.synchronize()
        source = Source(new_handoff_id(), tuple(address), incarnation)
        result = _fetch(engine, source, connection, prompt, codec)
        side.synchronize()
        _judge(result, codec, packing, title, notes)
        for text in cache.differences(
            expected_after(prompt, codec, _HERE, _THERE, (_EMPTY_HERE, _EMPTY_THERE))
        ):
            notes.check(False, f"{title}: {text}")
        if not connection.poll(PATIENCE_S):
            raise RuntimeError(f"{title}: the producer holds its blocks")
        is_committed, faults = connection.recv()
        notes.check(is_committed, f"{title}: the producer's handoff was not committed")
        notes.check(faults + engine.faults == 0, f"{title}: {faults}, {engine.faults} faults")
        engine.close()


def _fetch(
    engine: Engine, source: Source, connection: Connection, prompt: int, codec: Codec
) -> FetchResult:
    """Want, fetch as soon as it is offered, and let the producer compute meanwhile."""
    request = f"c-{prompt}"
    connection.send((source.handoff_id, prompt))
    engine.on_control(lambda c: c.want(request, source))
    offered = engine.event(Offered)
    assert isinstance(offered, Offered)
    if offered.prompt != f"prompt {prompt}".encode():
        raise RuntimeError(f"{offered.prompt!r} was offered")
    engine.on_control(lambda c: c.allocated(request))
    choice = CodecChoice(codec, codec)
    segment = Segment(range(NUM_TOKENS), offered.source)
    spec = FetchSpec(request, (segment,), _HERE, codec=choice, seeds=True)
    engine.on_transfer(lambda plane: plane.fetch(spec))
    connection.send("compute")
    result = engine.results.get(timeout=PATIENCE_S)
    engine.on_control(lambda c: c.close(request, cancel=result.reason is not None))
    return result


def _judge(result: FetchResult, codec: Codec, packing: str, title: str, notes: Notes) -> None:
    counts = result.counts
    is_packed = codec is not Codec.RAW or packing == "always"
    notes.check(result.reason is None, f"{title}: it failed: {result.reason}")
    notes.check(result.codec is codec, f"{title}: {result.codec} was used")
    notes.check(result.sampled == _SAMPLED, f"{title}: the sampled token is {result.sampled}")
    notes.check(counts.stretches > 1, f"{title}: all was read at once, after the forward pass")
    packed = counts.stretches if is_packed else 0
    notes.check(counts.packed == packed, f"{title}: {counts.packed} packed reads, not {packed}")
    notes.fact(
        title,
        f"{counts.kv_bytes} bytes of KV as {counts.wire_bytes}, {counts.stretches} reads, "
        f"{counts.packed} packed, {result.seconds:.2f} s with the forward pass",
    )
