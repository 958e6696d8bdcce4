"""Moves KV between a fake memory and its staging memory, bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from tests.fakes.memory import FakeMemory
from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.memory.layout import BlockTables
from vllm_pd_plugin.packing.pieces import Piece


class FakeCoder:
    """See ``packer.Coder``.

    outgoing, incoming: the two halves of the staging memory.
    is_broken: what it writes down is not what is in the cache.
    refuses: it raises, as PyTorch does where arguments do not fit.
    """

    def __init__(self, memory: FakeMemory, num_bytes: int) -> None:
        self._memory = memory
        self.outgoing, self.incoming = (np.zeros(num_bytes, np.uint8) for _ in range(2))
        self.is_broken = self.refuses = False
        self.num_encoded = self.num_decoded = 0

    def spans(self) -> list[tuple[int, int]]:
        """Address and bytes of what is packed, and of what is read."""
        return [(half.ctypes.data, half.nbytes) for half in (self.outgoing, self.incoming)]

    def encode(self, piece: Piece, codec: Codec, tables: BlockTables, offset: int) -> None:
        self._check(codec)
        self.num_encoded += 1
        end = offset + piece.num_bytes
        for block in self._blocks(piece, tables):
            self.outgoing[offset : offset + len(block)] = block + np.uint8(self.is_broken)
            offset += len(block)
        assert offset == end, "a piece has another size than was agreed upon"

    def decode(self, piece: Piece, codec: Codec, tables: BlockTables, offset: int) -> None:
        self._check(codec)
        self.num_decoded += 1
        for block in self._blocks(piece, tables):
            block[:] = self.incoming[offset : offset + len(block)]
            offset += len(block)

    def digest_outgoing(self, offset: int, num_bytes: int) -> bytes:
        return hashlib.blake2b(self.outgoing[offset : offset + num_bytes]).digest()

    def digest_incoming(self, offset: int, num_bytes: int) -> bytes:
        return hashlib.blake2b(self.incoming[offset : offset + num_bytes]).digest()

    def _check(self, codec: Codec) -> None:
        assert codec is Codec.RAW
        if self.refuses:
            raise RuntimeError("some arguments do not fit")

    def _blocks(self, piece: Piece, tables: BlockTables) -> Iterator[NDArray[np.uint8]]:
        for part in piece.slices:
            for layer in part.layers:
                for position in part.positions:
                    yield self._memory.caches[layer][tables[part.group][position]]
