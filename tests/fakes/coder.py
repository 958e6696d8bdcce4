"""Moves KV between a fake memory and its staging memory, bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from tests.fakes.memory import BLOCK_TOKENS, FakeMemory
from vllm_pd_plugin.codecs import Codec
from vllm_pd_plugin.pieces import Piece, Pieces
from vllm_pd_plugin.plan import BlockTables

STAGING_BYTES = 4096


class FakeCoder:
    """See ``packer.Coder``. Small: a large stretch takes several pieces.

    is_broken: what it writes down is not what is in the cache.
    """

    num_bytes = STAGING_BYTES

    def __init__(self, memory: FakeMemory, pieces: Pieces) -> None:
        self._memory = memory
        self._pieces = pieces
        self._outgoing, self._incoming = (np.zeros(STAGING_BYTES, np.uint8) for _ in range(2))
        self.is_broken = False
        self.num_encoded = self.num_decoded = 0

    def spans(self) -> list[tuple[int, int]]:
        """Address and bytes of what is packed, and of what is read."""
        return [(half.ctypes.data, half.nbytes) for half in (self._outgoing, self._incoming)]

    def encode(self, piece: Piece, codec: Codec, tables: BlockTables, offset: int) -> None:
        assert codec is Codec.RAW
        self.num_encoded += 1
        for rows in self._rows(piece, tables):
            self._outgoing[offset : offset + len(rows)] = rows + np.uint8(self.is_broken)
            offset += len(rows)

    def decode(self, piece: Piece, codec: Codec, tables: BlockTables, offset: int) -> None:
        assert codec is Codec.RAW
        self.num_decoded += 1
        for rows in self._rows(piece, tables):
            rows[:] = self._incoming[offset : offset + len(rows)]
            offset += len(rows)

    def digest_outgoing(self, offset: int, num_bytes: int) -> bytes:
        return hashlib.blake2b(self._outgoing[offset : offset + num_bytes]).digest()

    def digest_incoming(self, offset: int, num_bytes: int) -> bytes:
        return hashlib.blake2b(self._incoming[offset : offset + num_bytes]).digest()

    def _rows(self, piece: Piece, tables: BlockTables) -> Iterator[NDArray[np.uint8]]:
        for part in piece.slices:
            for layer in part.layers:
                for index, position in enumerate(part.positions):
                    tokens = min(BLOCK_TOKENS, part.tokens - index * BLOCK_TOKENS)
                    yield self._memory.rows(layer, tables[part.group][position], tokens)
