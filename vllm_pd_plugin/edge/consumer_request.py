"""A request of this engine whose KV comes from elsewhere: how far it is."""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING

from vllm_pd_plugin.codecs.codec import Codec, CodecChoice
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import RequestId, Source
from vllm_pd_plugin.transfer.specs import FetchSpec

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_pd_plugin.edge.prompts import PromptFingerprint


class Stage(enum.Enum):
    FOLLOWING = enum.auto()
    """Another request fetches the same handoff (``n`` > 1): its blocks will be in the cache."""
    WANTED = enum.auto()
    OFFERED = enum.auto()
    FETCHING = enum.auto()
    WANTED_ELSEWHERE = enum.auto()
    """It has blocks, a fetch has failed, and another producer is asked."""
    FINISHED = enum.auto()
    """The request has ended; its fetch is still to be reported."""
    FAILED = enum.auto()


@dataclasses.dataclass(slots=True, eq=False)
class ConsumingRequest:
    """One request.

    sources: where the KV may be; the first is the one that is asked or fetched from."""

    request: Request
    sources: list[Source]
    stage: Stage = Stage.WANTED
    num_tokens: int = 0
    missing: int = 0
    """How many of them this engine lacked when it was last asked."""
    spec: FetchSpec | None = None
    """What the workers were last told to fetch."""
    attempt: int = 0
    codec: CodecChoice = CodecChoice()
    seeds: bool = False
    """It is to go on after the token that the producer has sampled."""
    lossy: Codec = Codec.RAW
    """The narrowest codec that its hashes in the prefix cache tell of."""
    plain_tokens: int = 0
    """Of so many tokens at the beginning the hashes do not tell of it."""
    prompt: PromptFingerprint | None = None
    """None where nothing is fetched."""
    is_void: bool = False
    """What is being fetched is no KV of this engine's model any more."""


@dataclasses.dataclass(frozen=True, slots=True)
class FetchOrders:
    """What the workers are to do; see ``metadata.StepMetadata``."""

    fetches: tuple[FetchSpec, ...]
    refused: tuple[RequestId, ...]
    cancels: dict[RequestId, Reason]
