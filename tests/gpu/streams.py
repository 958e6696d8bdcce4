"""Stage: stream order. A forward pass writes KV late on one stream, and ops work on another.

As in the plug-in, an event is recorded behind each layer, and what is written counts only when the
event has been reached: the host polls it (``transfer.announcer``), or the other stream waits for
it. The control does neither, and must find the KV from before.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

import torch

from tests.gpu.build import library_in
from tests.gpu.kernels import Call, Kernels, say_wrong
from tests.gpu.notes import Notes, NotTriedError
from vllm_pd_plugin.codecs import ops_reference
from vllm_pd_plugin.codecs.codec import WIDE

LAYERS, BLOCKS, HEADS, TOKENS, WIDTH = 4, 32, 8, 16, 128
LAYER_NS = 5_000_000
OPS = ("pack_blocks", "encode_blocks", "digest_blocks")
_PATIENCE_S = 5.0

Wait = Callable[[torch.cuda.Event, torch.cuda.Stream], None]


def run(notes: Notes) -> None:
    if notes.is_stand_in:
        raise NotTriedError("stand-in device: it has no streams")
    check(Kernels(library_in(notes.work)), notes, torch.device("cuda"))


def check(kernels: Kernels, notes: Notes, device: torch.device) -> None:
    trial = Trial(kernels, device)
    ways = {"polled by the host": _poll, "waited for by the stream": _wait_on_stream}
    for name, wait in ways.items():
        for seed in range(3):
            for op, is_new in trial.forward(wait, seed).items():
                notes.check(is_new == [True] * LAYERS, f"event {name}: {op} saw {is_new}")
    stale = trial.forward(_do_not_wait, seed=9)
    notes.note(control=stale)
    for op, is_new in stale.items():
        notes.check(not all(is_new), f"the control of {op} could not be made to fail")
    notes.check(trial.decoded_is_seen(), "KV that was decoded is not what the next forward reads")


class Trial:
    """A cache of several layers, what a forward pass writes to it, and what ops make of that."""

    def __init__(self, kernels: Kernels, device: torch.device) -> None:
        self._write = kernels.function("pd_write_late")
        self._forward = torch.cuda.Stream(priority=-1)
        self._coder = torch.cuda.Stream(priority=0)  # the lowest; neither waits for the other
        self._caches = [_kv(0, layer).to(device) for layer in range(LAYERS)]
        self._blocks = torch.arange(BLOCKS, device=device)
        self._how = (WIDE.bits, WIDE.by_channel, WIDE.group, 0)
        size = self._caches[0].numel() * 2
        stripes = HEADS * WIDE.stripe_bytes(BLOCKS * TOKENS, WIDTH, 0)
        self._packed = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(LAYERS)]
        self._encoded = [self._packed[0].new_zeros(stripes) for _ in range(LAYERS)]
        self._digests = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(LAYERS)]
        self._calls: list[tuple[Call, Call, Call]] = []
        self._decodes: list[Call] = []
        for layer, cache in enumerate(self._caches):
            tiles = [cache[:, :, :, None, None]]
            tokens = BLOCKS * TOKENS
            self._calls.append(
                (
                    kernels.packing([cache], self._blocks, self._packed[layer]),
                    kernels.encoding(tiles, self._blocks, tokens, self._how, self._encoded[layer]),
                    kernels.digesting([cache], self._blocks, self._digests[layer]),
                )
            )
            self._decodes.append(
                kernels.decoding(tiles, self._blocks, tokens, self._how, self._encoded[layer])
            )

    def forward(self, wait: Wait, seed: int) -> dict[str, list[bool]]:
        """Write all layers late, and have the ops work on each as soon as ``wait`` returns.

        Returns for each op whether it saw what was written, layer by layer.
        """
        written = [_kv(seed, layer) for layer in range(LAYERS)]
        sources = [kv.to(cache.device) for kv, cache in zip(written, self._caches, strict=True)]
        for cache, digest in zip(self._caches, self._digests, strict=True):
            cache.fill_(-1.0)
            digest.zero_()
        torch.cuda.synchronize()
        events = []
        for cache, source in zip(self._caches, sources, strict=True):
            self._write_late(cache, source)
            event = torch.cuda.Event()
            event.record(self._forward)
            events.append(event)
        for event, calls in zip(events, self._calls, strict=True):
            wait(event, self._coder)
            with torch.cuda.stream(self._coder):
                for call in calls:
                    call()
        torch.cuda.synchronize()
        saw = (
            [
                torch.equal(packed.cpu(), kv.view(torch.uint8).flatten())
                for packed, kv in zip(self._packed, written, strict=True)
            ],
            [
                torch.equal(encoded.cpu(), _encoded(kv, self._how))
                for encoded, kv in zip(self._encoded, written, strict=True)
            ],
            [
                int(digest) == int(ops_reference.digest_blocks([kv], torch.arange(BLOCKS)))
                for digest, kv in zip(self._digests, written, strict=True)
            ],
        )
        return dict(zip(OPS, saw, strict=True))

    def decoded_is_seen(self) -> bool:
        """Decode on one stream, wait for it on the host, and read on the other."""
        kv = _kv(20, 0)
        encoded = _encoded(kv, self._how)
        self._encoded[0].copy_(encoded)
        expected = torch.zeros_like(kv)
        ops_reference.decode_blocks(
            encoded, torch.arange(BLOCKS), BLOCKS * TOKENS, WIDE.bits, WIDE.group, WIDE.by_channel,
            0, [expected[:, :, :, None, None]],
        )  # fmt: skip
        torch.cuda.synchronize()
        with torch.cuda.stream(self._coder):
            self._decodes[0]()
        self._coder.synchronize()
        with torch.cuda.stream(self._forward):
            read = self._caches[0].clone()
        self._forward.synchronize()
        return torch.equal(read.cpu(), expected)

    def _write_late(self, cache: torch.Tensor, source: torch.Tensor) -> None:
        words = ctypes.c_int64(cache.numel() // 2)
        to, from_ = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (cache, source))
        stream = ctypes.c_void_p(self._forward.cuda_stream)
        say_wrong(self._write(to, from_, words, ctypes.c_int64(LAYER_NS), stream))


def _poll(event: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
    ends_at = time.monotonic() + _PATIENCE_S
    while not event.query():
        if time.monotonic() > ends_at:
            raise RuntimeError("the forward pass does not come to its event")
        time.sleep(0.0005)


def _wait_on_stream(event: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
    stream.wait_event(event)


def _do_not_wait(event: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
    """The control."""


def _kv(seed: int, layer: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * seed + layer)
    shape = (BLOCKS, HEADS, TOKENS, WIDTH)
    return torch.randn(shape, generator=generator).to(torch.bfloat16)


def _encoded(kv: torch.Tensor, how: tuple[int, bool, int, int]) -> torch.Tensor:
    bits, by_channel, group, sinks = how
    slab = torch.zeros(HEADS * WIDE.stripe_bytes(BLOCKS * TOKENS, WIDTH, 0), dtype=torch.uint8)
    tiles = [kv[:, :, :, None, None]]
    ops_reference.encode_blocks(
        tiles, torch.arange(BLOCKS), BLOCKS * TOKENS, bits, group, by_channel, sinks, slab
    )
    return slab
