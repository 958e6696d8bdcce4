"""The control channel's messages: what engines say to each other, and ranks to their own engine.

How they travel is in ``framing``.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import BlockId, HandoffId, Incarnation
from vllm_pd_plugin.mapping.kv_cache import EngineKvCache
from vllm_pd_plugin.memory.identity import KvIdentity
from vllm_pd_plugin.memory.layout import RankMemory

Count = Annotated[int, msgspec.Meta(ge=0)]

MIN_LEASE_S = 0.05


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """A consumer introduces itself, in the oldest version that it understands; answered by Welcome,
    in the newest that both do. newest: that the consumer understands."""

    engine_id: str
    newest: Count = 0


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag="welcome"):
    """A producer's memory and rules: one ``RankMemory`` for each rank, see ``EngineKvCache``.

    kv: what its KV is. revision: grows whenever that changes.
    """

    engine_id: str
    kv_cache: EngineKvCache
    kv: KvIdentity
    revision: Count
    ranks: tuple[RankMemory, ...]
    lease_s: Annotated[float, msgspec.Meta(ge=MIN_LEASE_S, le=86_400)]


class Want(msgspec.Struct, frozen=True, array_like=True, tag="want"):
    """A consumer's scheduler asks for a handoff; answered by Offer or Refuse.

    It may come before the producer has heard of the handoff, and the offer follows when the
    producer begins to compute it: in the meantime heartbeats say that both are alive.
    """

    handoff_id: HandoffId


class Offer(msgspec.Struct, frozen=True, array_like=True, tag="offer"):
    """The handoff has started: its size, its prompt (see ``PromptFingerprint``), and which
    ``Welcome.revision`` its KV is of."""

    handoff_id: HandoffId
    num_tokens: Count
    prompt: bytes
    revision: Count = 0


class Subscribe(msgspec.Struct, frozen=True, array_like=True, tag="subscribe"):
    """One consumer rank has allocated and wants to know where the KV is.

    Answered at once by Progress or Seal with whole block tables, and then by further ones, each
    with what has been added to the tables. Sent again when a table has a gap.

    rank, num_ranks: which of how many ranks of the consumer this is; when all of them have read
        what they want, the handoff is committed.
    source_ranks: the producer's ranks that have it.
    """

    handoff_id: HandoffId
    rank: Count
    num_ranks: Count
    source_ranks: tuple[Count, ...]


class TableSlice(msgspec.Struct, frozen=True, array_like=True):
    """A stretch of one KV cache group's block table, from position ``start`` on."""

    start: Count
    blocks: tuple[BlockId, ...]


class Written(msgspec.Struct, frozen=True, array_like=True):
    """How far KV is final in a pipeline stage: tokens [0, base_tokens) of every layer, and tokens
    [0, num_tokens) of the first ``num_layers`` layers in the order of the forward pass."""

    base_tokens: Count = 0
    num_tokens: Count = 0
    num_layers: Count = 0


class Progress(msgspec.Struct, frozen=True, array_like=True, tag="progress"):
    """KV is final on the ranks that have what the receiver wants.

    written: one for each pipeline stage of the producer; nothing for one that has none of it.
    epoch: how often the producer has lost the handoff's blocks and started afresh. Whatever was
        read in an earlier epoch is void.
    tables: one slice for each KV cache group.
    """

    handoff_id: HandoffId
    epoch: Count
    written: tuple[Written, ...]
    tables: tuple[TableSlice, ...]


class Seal(msgspec.Struct, frozen=True, array_like=True, tag="seal"):
    """All KV of the handoff is final: tokens [0, num_tokens) of every layer.

    sampled: the token that the producer sampled after them; None if it sampled none.
    """

    handoff_id: HandoffId
    epoch: Count
    num_tokens: Count
    tables: tuple[TableSlice, ...]
    sampled: Count | None = None


class Commit(msgspec.Struct, frozen=True, array_like=True, tag="commit"):
    """One consumer rank has read something: did the producer still hold those blocks?

    is_last: everything has been read, and the rank will not read again. Without it only what
        arrived so far is asked for, and the handoff goes on.
    """

    handoff_id: HandoffId
    epoch: Count
    rank: Count
    is_last: bool


class Committed(msgspec.Struct, frozen=True, array_like=True, tag="committed"):
    """Yes: what that rank had read in that epoch when it asked is valid."""

    handoff_id: HandoffId
    epoch: Count
    is_last: bool


class Check(msgspec.Struct, frozen=True, array_like=True, tag="check"):
    """One consumer rank has read tokens [first_token, num_tokens) from its counterpart
    ``source_rank`` and wants to know what it should have read; answered by Checked. Only with the
    option ``integrity``."""

    handoff_id: HandoffId
    epoch: Count
    rank: Count
    source_rank: Count
    first_token: Count
    num_tokens: Count


class Checked(msgspec.Struct, frozen=True, array_like=True, tag="checked"):
    """The digest of those blocks as they are in the producer's memory; see ``kv_digest``."""

    handoff_id: HandoffId
    epoch: Count
    digest: bytes


class LayerRun(msgspec.Struct, frozen=True, array_like=True):
    """So many layers, next in the order of the forward pass, of which the positions [start, stop)
    of their block table are meant."""

    num_layers: Count
    start: Count
    stop: Count


class Pack(msgspec.Struct, frozen=True, array_like=True, tag="pack"):
    """One consumer rank wants some of its counterpart's KV in one piece, written down by a codec;
    answered by Packed.

    source_rank: the counterpart.
    number: tells the pieces of one handoff and rank apart.
    num_tokens: how many tokens of the handoff count; a last block may have room for more.
    digest: whether the piece's digest is wanted.
    """

    handoff_id: HandoffId
    epoch: Count
    rank: Count
    source_rank: Count
    number: Count
    codec: Codec
    num_tokens: Count
    layers: tuple[LayerRun, ...]
    digest: bool


class Gather(msgspec.Struct, frozen=True, array_like=True, tag="gather"):
    """One consumer rank wants tokens [start, stop) of some heads and layers in one piece, whose
    layout depends on neither engine's blocks: see ``mapping.match.Slab``; answered by Packed.

    number, digest: as in Pack.
    regions: of the layers on ``source_rank``, all of its KV cache group ``group``.
    first_head, num_heads: as they are numbered in its pages.
    dtype: of the piece; what is kept in another is converted.
    """

    handoff_id: HandoffId
    epoch: Count
    rank: Count
    source_rank: Count
    number: Count
    group: Count
    regions: tuple[Count, ...]
    first_head: Count
    num_heads: Count
    start: Count
    stop: Count
    dtype: str
    digest: bool


class Packed(msgspec.Struct, frozen=True, array_like=True, tag="packed"):
    """The piece lies in the staging memory of the rank that was asked for it, and stays there until
    Unpacked, or until the handoff is over.

    offset, num_bytes: where in ``RankMemory.staging``.
    digest: as ``slab_digest`` has it; empty if it was not asked for.
    """

    handoff_id: HandoffId
    epoch: Count
    number: Count
    offset: Count
    num_bytes: Count
    digest: bytes


class Unpacked(msgspec.Struct, frozen=True, array_like=True, tag="unpacked"):
    """One consumer rank has read a piece, or will not read it; not answered."""

    handoff_id: HandoffId
    rank: Count
    source_rank: Count
    number: Count


class Refuse(msgspec.Struct, frozen=True, array_like=True, tag="refuse"):
    """No: the handoff is over for this consumer; what it has read must be discarded."""

    handoff_id: HandoffId
    reason: Reason


class Heartbeat(msgspec.Struct, frozen=True, array_like=True, tag="heartbeat"):
    """The consumer still wants these handoffs; renews their leases. Answered by Alive."""

    handoff_ids: tuple[HandoffId, ...]


class Alive(msgspec.Struct, frozen=True, array_like=True, tag="alive"):
    """The producer lives; ``lost`` are handoffs that it no longer holds for the consumer."""

    lost: dict[HandoffId, Reason]


Answer = Offer | Progress | Seal | Packed | Checked | Committed | Refuse | Alive


class Batch(msgspec.Struct, frozen=True, array_like=True, tag="batch"):
    """Several answers at once, in the order in which they would have been sent."""

    messages: tuple[Answer, ...]


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag="cancel"):
    """The consumer no longer wants the handoff; not answered."""

    handoff_id: HandoffId


class Announce(msgspec.Struct, frozen=True, array_like=True, tag="announce"):
    """Inside one engine, a worker rank to its own control plane; not answered.

    In the forward pass of step ``step``, the KV of the first ``num_layers`` layers of its pipeline
    stage is written.
    """

    step: Count
    rank: Count
    num_layers: Count


class Examine(msgspec.Struct, frozen=True, array_like=True, tag="examine"):
    """Inside one engine, the control plane to a worker rank: the digest of these blocks is wanted;
    answered by Examined."""

    check: Check
    tables: tuple[tuple[BlockId, ...], ...]


class Examined(msgspec.Struct, frozen=True, array_like=True, tag="examined"):
    """Inside one engine, a worker rank to its own control plane; not answered."""

    check: Check
    digest: bytes


class Stage(msgspec.Struct, frozen=True, array_like=True, tag="stage"):
    """Inside one engine, the control plane to a worker rank: a piece is wanted; answered by Staged,
    when there is room for it. consumer: the incarnation of who wants it."""

    pack: Pack | Gather
    tables: tuple[tuple[BlockId, ...], ...]
    consumer: Incarnation


class Staged(msgspec.Struct, frozen=True, array_like=True, tag="staged"):
    """Inside one engine, a worker rank to its own control plane; not answered.

    consumer, rank: whose it is. source_rank: which rank this is.
    packed: None when the piece cannot be made, for ``reason``.
    """

    handoff_id: HandoffId
    consumer: Incarnation
    rank: Count
    source_rank: Count
    packed: Packed | None
    reason: Reason | None


class Unstage(msgspec.Struct, frozen=True, array_like=True, tag="unstage"):
    """Inside one engine, the control plane to a worker rank: a rank of the consumer does not need a
    piece any more; without all but the first, nobody needs any of the handoff's. Not answered."""

    handoff_id: HandoffId
    consumer: Incarnation | None = None
    rank: Count | None = None
    number: Count | None = None


class Nudge(msgspec.Struct, frozen=True, array_like=True, tag="nudge"):
    """Inside one engine, a worker rank to its own control plane; not answered.

    A fetch has ended on that rank: an engine that only waits for it need not wait any longer.
    """


FromConsumer = (
    Hello | Want | Subscribe | Pack | Gather | Unpacked | Check | Commit | Heartbeat | Cancel
)
FromWorker = Announce | Examined | Staged | Nudge
Request = FromConsumer | FromWorker
"""What a consumer sends, and a worker to its own engine."""

ToConsumer = Welcome | Answer | Batch
ToWorker = Examine | Stage | Unstage
Reply = ToConsumer | ToWorker
"""What a producer sends, and an engine to its own workers."""

Message = Request | Reply

KINDS: dict[str, type[Message]] = {
    str(kind.__struct_config__.tag): kind
    for kind in (
        Hello, Welcome, Want, Offer, Subscribe, Progress, Seal, Pack, Gather, Packed, Unpacked,
        Commit, Committed, Check, Checked, Refuse, Heartbeat, Alive, Batch, Cancel, Announce,
        Examine, Examined, Stage, Staged, Unstage, Nudge,
    )
}  # fmt: skip
"""By the name that a header has."""
KIND_OF = {kind: name for name, kind in KINDS.items()}
