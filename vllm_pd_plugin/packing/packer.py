"""Per process: a worker rank writes pieces of KV down for its consumers.

A ``Packer`` is owned by the rank's transfer thread. Pieces wait until there is room, those of each
consumer in their order, and the consumers in turn. One that does not read what was written for it
keeps no more than is left for all others: it never holds up them, nor the engine.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.containment import Containment
from vllm_pd_plugin.errors import HandoffError, Reason
from vllm_pd_plugin.ids import HandoffId, Incarnation
from vllm_pd_plugin.memory.layout import BlockTables
from vllm_pd_plugin.packing.heads import HeadsPiece, checked_heads
from vllm_pd_plugin.packing.pieces import Piece, Pieces
from vllm_pd_plugin.packing.staging import Staging
from vllm_pd_plugin.protocol import wire

logger = logging.getLogger(__name__)


class Coding(Protocol):
    """KV on its way between the cache and staging memory: nothing there may be touched, or told of,
    until it is done. On a CPU it is at once; on a GPU when its stream has come to it."""

    def is_done(self) -> bool: ...

    def wait(self) -> None:
        """Return when it is done."""


class Coder(Protocol):
    """Moves KV between the cache and staging memory. Raises RuntimeError where arguments do not
    fit."""

    def encode(self, piece: Piece, codec: Codec, tables: BlockTables, offset: int) -> Coding:
        """Write a piece of the cache down at an offset of the outgoing staging memory."""

    def decode(self, piece: Piece, codec: Codec, tables: BlockTables, offset: int) -> Coding:
        """Take a piece at an offset of the incoming staging memory into the cache."""

    def gather(self, piece: HeadsPiece, tables: BlockTables, offset: int) -> Coding:
        """Write some heads of the cache down, as ``encode`` does."""

    def scatter(self, piece: HeadsPiece, tables: BlockTables, offset: int) -> Coding:
        """Take some heads into the cache, as ``decode`` does."""

    def digest_outgoing(self, offset: int, num_bytes: int) -> bytes:
        """Return the digest of a piece that was written down."""

    def digest_incoming(self, offset: int, num_bytes: int) -> bytes:
        """Return the digest of a piece that was read."""


_Key = tuple[HandoffId, Incarnation, int, int]
"""The handoff, who wants it and as which rank, and its number for the piece."""


@dataclasses.dataclass(slots=True, eq=False)
class _Place:
    """Where a piece lies, and whose it is."""

    offset: int
    num_bytes: int
    consumer: Incarnation


@dataclasses.dataclass(slots=True, eq=False)
class _Writing:
    """A piece that is being written down; is_void: nobody needs it any more."""

    stage: wire.Stage
    place: _Place
    coding: Coding
    is_void: bool = False


class Packer:
    """The pieces of one rank that consumers have asked for."""

    def __init__(self, pieces: Pieces, staging: Staging, coder: Coder) -> None:
        self._contain = Containment("packer")
        self._pieces = pieces
        self._staging = staging
        self._coder = coder
        self._waiting: dict[Incarnation, deque[wire.Stage]] = {}
        """By consumer; first is whose turn it is."""
        self._wanted: set[_Key] = set()
        self._writing: _Writing | None = None
        self._staged: dict[_Key, tuple[wire.Packed, _Place]] = {}
        self._held: Counter[Incarnation] = Counter()
        """Bytes, by consumer."""
        self._again: deque[wire.Stage] = deque()

    @property
    def faults(self) -> int:
        """How many were caught; see ``Containment``."""
        return self._contain.faults

    @property
    def taken_bytes(self) -> int:
        return self._staging.taken_bytes

    @property
    def is_writing(self) -> bool:
        """Whether a piece is on its way, and ``turn`` has to be called to see it done."""
        return self._writing is not None

    def stage(self, stage: wire.Stage) -> None:
        """A piece is wanted; or it was before, and one of the messages about it was lost."""
        key = _key(stage)
        if key in self._staged:
            self._again.append(stage)
        elif key not in self._wanted and not self._is_writing_down(key):
            self._wanted.add(key)
            self._waiting.setdefault(stage.consumer, deque()).append(stage)

    def unstage(self, unstage: wire.Unstage) -> None:
        """A piece is not needed any more, or none of a handoff's."""
        which = unstage.consumer, unstage.rank, unstage.number
        nobody = (None, None, None)
        self._forget(lambda key: key[0] == unstage.handoff_id and which in (nobody, key[1:]))

    def clear(self) -> None:
        """This engine hands nothing off any more: no piece is needed."""
        self._forget(lambda key: True)

    def turn(self) -> wire.Staged | None:
        """Write down the next piece, and return an answer; None when there is none yet.

        One at a time: the thread has other things to do as well."""
        while self._again:
            stage = self._again.popleft()
            if staged := self._staged.get(_key(stage)):
                return _answer(stage, staged[0])
        while True:
            if self._writing is None:
                refused = self._begin()
                if refused is not None or self._writing is None:
                    return refused
            answer = self._finish()
            if answer is not None or self._writing is not None:
                return answer

    # --- inside --------------------------------------------------------------------------------

    def _begin(self) -> wire.Staged | None:
        """Begin with the next piece for which there is room; returns a refusal of one that cannot
        be written."""
        for consumer in list(self._waiting):
            stage = self._waiting[consumer][0]
            try:
                piece = self._measure(stage)
            except HandoffError as error:
                handoff_id = stage.pack.handoff_id
                logger.warning("handoff %s: a piece cannot be packed: %s", handoff_id, error)
                self._take_off(stage)
                return _answer(stage, None, error.reason)
            place = self._room_for(piece, consumer)
            if place is None:
                continue
            self._take_off(stage)
            encode = partial(self._encode, piece, stage, place)
            coding = self._contain.run("packing", encode, None)
            if coding is None:
                return self._failed(stage, place)
            self._writing = _Writing(stage, place, coding)
            return None
        return None

    def _encode(self, piece: Piece | HeadsPiece, stage: wire.Stage, place: _Place) -> Coding:
        if isinstance(piece, HeadsPiece):
            return self._coder.gather(piece, stage.tables, place.offset)
        assert isinstance(stage.pack, wire.Pack)
        return self._coder.encode(piece, stage.pack.codec, stage.tables, place.offset)

    def _room_for(self, piece: Piece | HeadsPiece, consumer: Incarnation) -> _Place | None:
        """Take room for a piece; none where its consumer would hold more than is left."""
        held, free = self._held[consumer], self._staging.free_bytes
        if held and held + piece.num_bytes > free:
            return None
        offset = self._staging.take(piece.num_bytes)
        if offset is None:
            return None
        self._held[consumer] += piece.num_bytes
        return _Place(offset, piece.num_bytes, consumer)

    def _finish(self) -> wire.Staged | None:
        """Return the answer of a piece that has been written down; None while it is not, or when
        nobody needs it any more."""
        writing = self._writing
        assert writing is not None
        is_done = self._contain.run("packing", writing.coding.is_done, None)
        if is_done is False:
            return None
        self._writing = None
        stage, place = writing.stage, writing.place
        if writing.is_void:
            self._give_back(place)
            return None
        packed = self._contain.run("packing", partial(self._describe, stage, place), None)
        if is_done is None or packed is None:
            return self._failed(stage, place)
        self._staged[_key(stage)] = (packed, place)
        return _answer(stage, packed)

    def _failed(self, stage: wire.Stage, place: _Place) -> wire.Staged:
        self._give_back(place)
        return _answer(stage, None, Reason.INTERNAL)

    def _describe(self, stage: wire.Stage, place: _Place) -> wire.Packed:
        pack, size = stage.pack, place.num_bytes
        digest = self._coder.digest_outgoing(place.offset, size) if pack.digest else b""
        return wire.Packed(pack.handoff_id, pack.epoch, pack.number, place.offset, size, digest)

    def _is_writing_down(self, key: _Key) -> bool:
        writing = self._writing
        return writing is not None and not writing.is_void and _key(writing.stage) == key

    def _forget(self, is_meant: Callable[[_Key], bool]) -> None:
        for stages in list(self._waiting.values()):
            for stage in [stage for stage in stages if is_meant(_key(stage))]:
                self._take_off(stage)
        if self._writing is not None and is_meant(_key(self._writing.stage)):
            self._writing.is_void = True
        for key in [key for key in self._staged if is_meant(key)]:
            self._give_back(self._staged.pop(key)[1])

    def _take_off(self, stage: wire.Stage) -> None:
        """It does not wait any more; it is the next consumer's turn."""
        self._wanted.discard(_key(stage))
        stages = self._waiting.pop(stage.consumer)
        stages.remove(stage)
        if stages:
            self._waiting[stage.consumer] = stages

    def _give_back(self, place: _Place) -> None:
        self._staging.give_back(place.offset)
        self._held[place.consumer] -= place.num_bytes
        if not self._held[place.consumer]:
            del self._held[place.consumer]

    def _measure(self, stage: wire.Stage) -> Piece | HeadsPiece:
        """Check what a peer asks for. Raises HandoffError."""
        pack = stage.pack
        piece: Piece | HeadsPiece
        if isinstance(pack, wire.Gather):
            piece = checked_heads(self._pieces, pack, stage.tables)
        else:
            piece = self._pieces.checked(pack.layers, pack.num_tokens, pack.codec, stage.tables)
        if piece.num_bytes > self._staging.max_piece_bytes:
            raise HandoffError(
                Reason.INTERNAL,
                f"a piece of {piece.num_bytes} bytes is wanted, at most "
                f"{self._staging.max_piece_bytes} fit",
            )
        return piece


def _key(stage: wire.Stage) -> _Key:
    return stage.pack.handoff_id, stage.consumer, stage.pack.rank, stage.pack.number


def _answer(
    stage: wire.Stage, packed: wire.Packed | None, reason: Reason | None = None
) -> wire.Staged:
    pack = stage.pack
    return wire.Staged(pack.handoff_id, stage.consumer, pack.rank, pack.source_rank, packed, reason)
