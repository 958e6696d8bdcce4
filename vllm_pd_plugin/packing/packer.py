"""Per process: a worker rank writes pieces of KV down for its consumers.

A ``Packer`` is owned by the rank's transfer thread. Pieces wait, first come first served, until
there is room: a consumer that does not read holds up others' pieces, and never the engine.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Protocol

from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.containment import Containment
from vllm_pd_plugin.errors import HandoffError, Reason
from vllm_pd_plugin.ids import HandoffId
from vllm_pd_plugin.memory.layout import BlockTables
from vllm_pd_plugin.packing.pieces import Piece, Pieces
from vllm_pd_plugin.packing.staging import Staging
from vllm_pd_plugin.protocol import wire

logger = logging.getLogger(__name__)


class Coder(Protocol):
    """Moves KV between the cache and staging memory; each call returns when that is done."""

    def encode(self, piece: Piece, codec: Codec, tables: BlockTables, offset: int) -> None:
        """Write a piece of the cache down at an offset of the outgoing staging memory."""

    def decode(self, piece: Piece, codec: Codec, tables: BlockTables, offset: int) -> None:
        """Take a piece at an offset of the incoming staging memory into the cache."""

    def digest_outgoing(self, offset: int, num_bytes: int) -> bytes:
        """Return the digest of a piece that was written down."""

    def digest_incoming(self, offset: int, num_bytes: int) -> bytes:
        """Return the digest of a piece that was read."""


class Packer:
    """The pieces of one rank that consumers have asked for."""

    def __init__(self, pieces: Pieces, staging: Staging, coder: Coder) -> None:
        self._contain = Containment("packer")
        self._pieces = pieces
        self._staging = staging
        self._coder = coder
        self._waiting: deque[wire.Stage] = deque()
        self._staged: dict[tuple[HandoffId, int], wire.Packed] = {}
        self._again: deque[wire.Stage] = deque()

    @property
    def faults(self) -> int:
        """How many were caught; see ``Containment``."""
        return self._contain.faults

    @property
    def taken_bytes(self) -> int:
        return self._staging.taken_bytes

    def stage(self, stage: wire.Stage) -> None:
        """A piece is wanted; or it was before, and one of the messages about it was lost."""
        if _key(stage) in self._staged:
            self._again.append(stage)
        elif all(_key(stage) != _key(waiting) for waiting in self._waiting):
            self._waiting.append(stage)

    def unstage(self, handoff_id: HandoffId, number: int | None) -> None:
        """A piece is not needed any more, or none of a handoff's."""

        def is_meant(other: tuple[HandoffId, int]) -> bool:
            return other[0] == handoff_id and number in (None, other[1])

        self._waiting = deque(w for w in self._waiting if not is_meant(_key(w)))
        for key in [key for key in self._staged if is_meant(key)]:
            self._staging.give_back(self._staged.pop(key).offset)

    def clear(self) -> None:
        """This engine hands nothing off any more: no piece is needed."""
        self._waiting.clear()
        for packed in self._staged.values():
            self._staging.give_back(packed.offset)
        self._staged.clear()

    def turn(self) -> wire.Staged | None:
        """Write down the next piece, and return the answer; None when it waits for room.

        One at a time: the thread has other things to do as well."""
        while self._again:
            stage = self._again.popleft()
            if packed := self._staged.get(_key(stage)):
                return wire.Staged(stage.pack.handoff_id, stage.pack.rank, packed, None)
        if not self._waiting:
            return None
        stage = self._waiting[0]
        pack = stage.pack
        try:
            piece = self._measure(stage)
        except HandoffError as error:
            logger.warning("handoff %s: a piece cannot be packed: %s", pack.handoff_id, error)
            self._waiting.popleft()
            return wire.Staged(pack.handoff_id, pack.rank, None, error.reason)
        offset = self._staging.take(piece.num_bytes)
        if offset is None:
            return None
        self._waiting.popleft()
        packed = self._contain.run("packing", lambda: self._write(stage, piece, offset), None)
        if packed is None:
            self._staging.give_back(offset)
            return wire.Staged(pack.handoff_id, pack.rank, None, Reason.INTERNAL)
        self._staged[_key(stage)] = packed
        return wire.Staged(pack.handoff_id, pack.rank, packed, None)

    def _measure(self, stage: wire.Stage) -> Piece:
        """Check what a peer asks for. Raises HandoffError."""
        pack = stage.pack
        piece = self._pieces.checked(pack.layers, pack.num_tokens, pack.codec, stage.tables)
        if piece.num_bytes > self._staging.max_piece_bytes:
            raise HandoffError(
                Reason.INTERNAL,
                f"a piece of {piece.num_bytes} bytes is wanted, at most "
                f"{self._staging.max_piece_bytes} fit",
            )
        return piece

    def _write(self, stage: wire.Stage, piece: Piece, offset: int) -> wire.Packed:
        pack = stage.pack
        self._coder.encode(piece, pack.codec, stage.tables, offset)
        digest = self._coder.digest_outgoing(offset, piece.num_bytes) if pack.digest else b""
        return wire.Packed(
            pack.handoff_id, pack.epoch, pack.number, offset, piece.num_bytes, digest
        )


def _key(stage: wire.Stage) -> tuple[HandoffId, int]:
    return stage.pack.handoff_id, stage.pack.number
