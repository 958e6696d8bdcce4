"""Per process: the half of a rank's staging memory that its fetches read pieces into."""

from __future__ import annotations

import dataclasses
import enum

from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.ids import RequestId
from vllm_pd_plugin.memory.layout import Span
from vllm_pd_plugin.packing.packer import Coder
from vllm_pd_plugin.packing.pieces import Pieces
from vllm_pd_plugin.packing.staging import Room


class Packing(enum.StrEnum):
    """Whether the producer is to pack what lies scattered; see ``PdConfig``."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


Taker = tuple[RequestId, int]
"""Who takes room: a request, for its tokens from here on."""


@dataclasses.dataclass(frozen=True, slots=True)
class Incoming:
    """Staging memory for what is read.

    coding: how many bytes of KV a second each lossy codec writes down and reads back.
    """

    span: Span
    room: Room[Taker]
    pieces: Pieces
    coder: Coder
    packing: Packing
    coding: dict[Codec, float]
