"""Moves KV between a fake memory and its staging memory, bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from tests.fakes.memory import FakeMemory
from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.memory.layout import BlockTables
from vllm_pd_plugin.packing.heads import HeadsPiece
from vllm_pd_plugin.packing.pieces import Piece


class FakeCoding:
    """Something that happens when it is waited for."""

    def __init__(self, act: Callable[[], None], under_way: list[FakeCoding]) -> None:
        self._act = act
        self._under_way = under_way

    def is_done(self) -> bool:
        return self not in self._under_way

    def wait(self) -> None:
        if self in self._under_way:
            self._under_way.remove(self)
            self._act()


class FakeCoder:
    """See ``packer.Coder``.

    outgoing, incoming: the two halves of the staging memory.
    is_broken: what it writes down is not what is in the cache.
    refuses: it raises, as PyTorch does where arguments do not fit.
    holds: what it does is done only when ``finish`` is called, as on a GPU.
    """

    def __init__(self, memory: FakeMemory, num_bytes: int) -> None:
        self._memory = memory
        self.outgoing, self.incoming = (np.zeros(num_bytes, np.uint8) for _ in range(2))
        self.is_broken = self.refuses = self.holds = False
        self.under_way: list[FakeCoding] = []
        self.num_encoded = self.num_decoded = 0

    def spans(self) -> list[tuple[int, int]]:
        """Address and bytes of what is packed, and of what is read."""
        return [(half.ctypes.data, half.nbytes) for half in (self.outgoing, self.incoming)]

    def encode(self, piece: Piece, codec: Codec, tables: BlockTables, offset: int) -> FakeCoding:
        self._check(codec)
        self.num_encoded += 1

        def write() -> None:
            start = offset
            for block in self._blocks(piece, tables):
                self.outgoing[start : start + len(block)] = block + np.uint8(self.is_broken)
                start += len(block)
            assert start == offset + piece.num_bytes, "a piece has another size than was agreed"

        return self._coding(write)

    def decode(self, piece: Piece, codec: Codec, tables: BlockTables, offset: int) -> FakeCoding:
        self._check(codec)
        self.num_decoded += 1

        def read() -> None:
            start = offset
            for block in self._blocks(piece, tables):
                block[:] = self.incoming[start : start + len(block)]
                start += len(block)

        return self._coding(read)

    def gather(self, piece: HeadsPiece, tables: BlockTables, offset: int) -> FakeCoding:
        raise AssertionError("engines that are alike ask for blocks")

    scatter = gather

    def finish(self) -> None:
        """All that is under way is done."""
        for coding in list(self.under_way):
            coding.wait()

    def digest_outgoing(self, offset: int, num_bytes: int) -> bytes:
        return hashlib.blake2b(self.outgoing[offset : offset + num_bytes]).digest()

    def digest_incoming(self, offset: int, num_bytes: int) -> bytes:
        return hashlib.blake2b(self.incoming[offset : offset + num_bytes]).digest()

    def _coding(self, act: Callable[[], None]) -> FakeCoding:
        coding = FakeCoding(act, self.under_way)
        self.under_way.append(coding)
        if not self.holds:
            coding.wait()
        return coding

    def _check(self, codec: Codec) -> None:
        assert codec is Codec.RAW
        if self.refuses:
            raise RuntimeError("some arguments do not fit")

    def _blocks(self, piece: Piece, tables: BlockTables) -> Iterator[NDArray[np.uint8]]:
        for part in piece.slices:
            for layer in part.layers:
                for position in part.positions:
                    yield self._memory.caches[layer][tables[part.group][position]]
