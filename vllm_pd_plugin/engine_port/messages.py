"""What a frontend and an engine say to each other on the engine's control channel.

A frontend attaches to an engine, adds requests as vLLM's own API server would, and receives what
the engine's steps give out. The header is that of ``framing``; the body is one of the structs
below; what is vLLM's own (a request, the outputs of a step) follows as further frames, in vLLM's
own MessagePack. Nothing is ever unpickled.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from vllm_pd_plugin.errors import PdError
from vllm_pd_plugin.ids import EngineId, Incarnation, RequestId
from vllm_pd_plugin.memory.identity import KvIdentity
from vllm_pd_plugin.protocol.framing import (
    MAX_BODY_BYTES,
    MAX_HEADER_BYTES,
    PROTOCOL_VERSION,
    Header,
    VersionError,
    WireError,
)

PING_INTERVAL_S = 0.5
"""How often a frontend pings; an engine's state is never older than this and a round trip."""
LEASE_S = 15.0
"""An engine ends the requests of a frontend that has been silent for so long."""

DESCRIPTION_PATH = "/pd/v1/engine"
"""Where an HTTP server says, of each of its engine cores, where its control channel is: a list, in
the order of their data parallel ranks. Not guarded by its API key: the channel has a key of its
own."""

Count = Annotated[int, msgspec.Meta(ge=0)]


class FrontendError(PdError):
    """A frontend cannot use an engine; the message says which, and what to do."""


class EngineLoad(msgspec.Struct, frozen=True, array_like=True):
    """How busy an engine is.

    waiting_tokens: prompt tokens that it still has to compute.
    kv_usage: share of the KV cache in use, 0 to 1.
    num_steps: that have given something out so far, to whomever: an engine that has something to do
        and at which it does not grow stands still.
    """

    running: Count = 0
    waiting: Count = 0
    waiting_tokens: Count = 0
    kv_usage: float = 0.0
    num_steps: Count = 0


class EngineDescription(msgspec.Struct, frozen=True):
    """What a frontend must know of an engine.

    role: ``prefill``, ``decode`` or ``both``.
    control_host, control_port: where other engines reach its control channel.
    codecs: that a request may ask for here.
    kv: what its KV is; engines of one pool have the same.
    kv_tokens: size of its KV cache. block_tokens: of one block.
    data_parallel_rank: of its server's engine cores; each is an engine of its own to a frontend.
    options: what it samples by, see ``served_options``; empty where that is not known.
    has_lora: whether it takes requests with LoRA adapters.
    """

    engine_id: EngineId
    role: str
    model: str
    vllm_version: str
    control_host: str
    control_port: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    data_parallel_size: int
    codecs: tuple[str, ...]
    vocab_size: int
    kv: KvIdentity
    kv_tokens: int
    block_tokens: int
    data_parallel_rank: int = 0
    options: dict[str, str] = {}
    has_lora: bool = False


class Attach(msgspec.Struct, frozen=True, array_like=True, tag="attach"):
    """A frontend introduces itself; answered by Attached, which comes again when the description
    has changed."""

    frontend: str


class Attached(msgspec.Struct, frozen=True, array_like=True, tag="attached"):
    description: EngineDescription
    load: EngineLoad


class Add(msgspec.Struct, frozen=True, array_like=True, tag="add"):
    """A request; its ``EngineCoreRequest`` follows as further frames. Outputs answer it.

    number: counts them from 1, since the frontend has attached; 0 if it does not count.
    """

    request_id: RequestId
    number: Count = 0


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """The frontend does not want these any more; not answered."""

    request_ids: tuple[RequestId, ...]


class Ping(msgspec.Struct, frozen=True, array_like=True, tag="ping"):
    """The frontend is alive; answered by State, or by Unknown if it is not attached."""


class Outputs(msgspec.Struct, frozen=True, array_like=True, tag="outputs"):
    """What a step gave out for one frontend; the ``EngineCoreOutputs`` follows as further frames.

    number: counts them from 1, so that the frontend notices a lost one.
    """

    number: Count


class State(msgspec.Struct, frozen=True, array_like=True, tag="state"):
    """How busy the engine is. last_outputs: the number of the last Outputs that was sent.

    begun: those of the frontend's requests that have given nothing out yet, and wait no longer: the
        engine computes them, or reads their KV. preempted: those that have, and wait again.
    last_add: the number of the frontend's last Add that is in ``load``, as are all before it; None
        if the engine does not say.
    num_frontends: that have attached, this one included; 0 if the engine does not say.
    """

    load: EngineLoad
    last_outputs: Count
    begun: tuple[RequestId, ...] = ()
    preempted: tuple[RequestId, ...] = ()
    last_add: Count | None = None
    num_frontends: Count = 0


class Unknown(msgspec.Struct, frozen=True, array_like=True, tag="unknown"):
    """The frontend is not attached, or no longer: its requests are gone; it must attach anew."""


BlockHash = int | bytes


class Stored(msgspec.Struct, frozen=True, array_like=True, tag="stored"):
    """Blocks that are in the prefix cache now: ``token_ids`` in blocks of ``block_tokens``, each
    following the one before it and the first following ``parent``."""

    parent: BlockHash | None
    hashes: tuple[BlockHash, ...]
    token_ids: tuple[int, ...]
    block_tokens: Count


class Removed(msgspec.Struct, frozen=True, array_like=True, tag="removed"):
    """Blocks that are not in the prefix cache any more."""

    hashes: tuple[BlockHash, ...]


class Cleared(msgspec.Struct, frozen=True, array_like=True, tag="cleared"):
    """The prefix cache is empty."""


class Blocks(msgspec.Struct, frozen=True, array_like=True, tag="blocks"):
    """What has changed in the engine's prefix cache, in order; not answered.

    A frontend that attaches learns only what changes from then on.
    """

    changes: tuple[Stored | Removed | Cleared, ...]


FromFrontend = Attach | Add | Abort | Ping
ToFrontend = Attached | Outputs | State | Blocks | Unknown
Message = FromFrontend | ToFrontend

_KINDS: dict[str, type[Message]] = {
    str(kind.__struct_config__.tag): kind
    for kind in (Attach, Attached, Add, Abort, Ping, Outputs, State, Blocks, Unknown)
}
_MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_header_decoder = msgspec.msgpack.Decoder(Header)
_body_decoders = {name: msgspec.msgpack.Decoder(kind) for name, kind in _KINDS.items()}


def encode(
    message: Message, sender: Incarnation, target: Incarnation, payload: list[bytes] | None = None
) -> list[bytes]:
    """Return the frames of a message."""
    kind = str(message.__struct_config__.tag)
    header = Header(PROTOCOL_VERSION, kind, sender, target)
    return [msgspec.msgpack.encode(header), msgspec.msgpack.encode(message), *(payload or ())]


def is_ours(frames: list[bytes]) -> bool:
    """Say whether a message belongs here, and not to the protocol between engines."""
    if not frames or len(frames[0]) > MAX_HEADER_BYTES:
        return False
    try:
        return _header_decoder.decode(frames[0]).kind in _KINDS
    except _MALFORMED:
        return False


def decode(frames: list[bytes]) -> tuple[Header, Message, list[bytes]]:
    """Parse a message; returns the frames of vLLM's own as they are.

    Raises:
        VersionError: the header is of another protocol version.
        WireError: the frames are anything else than a message of this protocol.
    """
    if len(frames) < 2 or len(frames[0]) > MAX_HEADER_BYTES or len(frames[1]) > MAX_BODY_BYTES:
        raise WireError("not a header and a body of allowed size")
    try:
        header = _header_decoder.decode(frames[0])
        if header.version != PROTOCOL_VERSION:
            raise VersionError(header.version)
        decoder = _body_decoders.get(header.kind)
        if decoder is None:
            raise WireError(f"unknown kind of message {header.kind[:32]!r}")
        return header, decoder.decode(frames[1]), frames[2:]
    except _MALFORMED as error:
        raise WireError(f"malformed message: {error}") from error
