"""How messages travel: two frames, and how they are told apart.

The *header* has the same form in every protocol version, so that two versions can tell each other
why they do not talk; the *body* is decoded only when the header's version and kind are known. Both
are MessagePack; nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import functools

import msgspec

from vllm_pd_plugin.errors import PdError
from vllm_pd_plugin.ids import Incarnation
from vllm_pd_plugin.protocol import wire

PROTOCOL_VERSION = 7
OLDEST_VERSION = 7
"""The oldest version that is still understood; two engines speak the newest that both know. Within
a version, fields are only added, at the end and with a default."""

MAX_BODY_BYTES = 64 * 2**20
MAX_HEADER_BYTES = 512


class WireError(PdError):
    """A message is malformed, too large, or of an unknown kind; it is dropped and counted."""


class VersionError(WireError):
    """The peer speaks another version of the protocol."""

    def __init__(self, theirs: int) -> None:
        ours = f"{OLDEST_VERSION} to {PROTOCOL_VERSION}"
        if OLDEST_VERSION == PROTOCOL_VERSION:
            ours = str(PROTOCOL_VERSION)
        super().__init__(
            f"the peer speaks version {theirs} of the control protocol, this engine version "
            f"{ours}; run the same release of vllm-pd-plugin on both"
        )
        self.theirs = theirs


class Header(msgspec.Struct, frozen=True, array_like=True):
    """First frame of every message.

    sender: the sending engine's incarnation.
    target: the incarnation that the sender means to reach; empty while it is not known.
    """

    version: int
    kind: str
    sender: Incarnation
    target: Incarnation


# What msgspec raises for bytes from outside; the latter two are no MsgspecError.
_MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_header_decoder = msgspec.msgpack.Decoder(Header)
_body_decoders = {name: msgspec.msgpack.Decoder(kind) for name, kind in wire.KINDS.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class Encoded:
    """A message that is large and goes to many: its body was encoded once."""

    kind: str
    body: bytes

    @classmethod
    def of(cls, message: wire.Message) -> Encoded:
        return cls(wire.KIND_OF[type(message)], msgspec.msgpack.encode(message))


def encode(
    message: wire.Message | Encoded,
    sender: Incarnation,
    target: Incarnation,
    version: int = PROTOCOL_VERSION,
) -> list[bytes]:
    """Return the two frames of a message, in a version that the receiver understands."""
    if isinstance(message, Encoded):
        kind, body = message.kind, message.body
    else:
        kind, body = wire.KIND_OF[type(message)], msgspec.msgpack.encode(message)
    return [_header(version, kind, sender, target), body]


@functools.lru_cache(maxsize=4096)
def _header(version: int, kind: str, sender: Incarnation, target: Incarnation) -> bytes:
    return msgspec.msgpack.encode(Header(version, kind, sender, target))


def decode(frames: list[bytes]) -> tuple[Header, wire.Message]:
    """Parse the two frames of a message.

    Raises:
        VersionError: the header is of another protocol version.
        WireError: the frames are anything else than a message of this protocol.
    """
    if len(frames) != 2 or len(frames[0]) > MAX_HEADER_BYTES or len(frames[1]) > MAX_BODY_BYTES:
        raise WireError("not a header and a body of allowed size")
    try:
        header = _header_decoder.decode(frames[0])
    except _MALFORMED as error:
        raise WireError(f"malformed header: {error}") from error
    if not OLDEST_VERSION <= header.version <= PROTOCOL_VERSION:
        raise VersionError(header.version)
    decoder = _body_decoders.get(header.kind)
    if decoder is None:
        raise WireError(f"unknown kind of message {header.kind[:32]!r}")
    try:
        return header, decoder.decode(frames[1])
    except _MALFORMED as error:
        raise WireError(f"malformed {header.kind}: {error}") from error
