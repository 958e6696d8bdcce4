"""A request of this engine whose KV comes from elsewhere: how far it is.

Each source that is tried is an ``Attempt``, with a state of its own that ends with a reason:

    WANTED -> OFFERED -> FETCHING -> ENDED
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vllm_pd_plugin.codecs.codec import Codec, CodecChoice
from vllm_pd_plugin.errors import OTHER_KV, Reason
from vllm_pd_plugin.ids import RequestId, Source
from vllm_pd_plugin.memory.layout import BlockTables
from vllm_pd_plugin.transfer.specs import FetchSpec, Segment

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_pd_plugin.edge.prompts import PromptFingerprint
    from vllm_pd_plugin.edge.provenance import Provenance


class Stage(enum.Enum):
    FOLLOWING = "following"
    """Another request fetches the same handoff (``n`` > 1): its blocks will be in the cache."""
    TRYING = "trying"
    FINISHED = "finished"
    """The request has ended; its fetch is still to be reported."""
    FAILED = "failed"


class AttemptState(enum.Enum):
    WANTED = "wanted"
    OFFERED = "offered"
    FETCHING = "fetching"
    ENDED = "ended"


STAGES: Mapping[Stage, frozenset[Stage]] = {
    Stage.FOLLOWING: frozenset({Stage.FAILED}),
    Stage.TRYING: frozenset({Stage.FINISHED, Stage.FAILED}),
    Stage.FINISHED: frozenset({Stage.FAILED}),
    Stage.FAILED: frozenset({Stage.FAILED}),
}
"""What may follow on what, until the request is forgotten."""

ATTEMPTS: Mapping[AttemptState, frozenset[AttemptState]] = {
    AttemptState.WANTED: frozenset({AttemptState.OFFERED, AttemptState.ENDED}),
    AttemptState.OFFERED: frozenset({AttemptState.FETCHING, AttemptState.ENDED}),
    AttemptState.FETCHING: frozenset({AttemptState.ENDED}),
    AttemptState.ENDED: frozenset(),
}
"""The same for an attempt."""


@dataclasses.dataclass(slots=True, eq=False)
class Attempt:
    """One source's turn to give a request its KV.

    source: it names the producer's incarnation once that has offered.
    number: how many were tried before. is_last: whether there is no other.
    """

    source: Source
    number: int
    is_last: bool
    state: AttemptState = AttemptState.WANTED
    lost: Reason | None = None
    """Why the source is of no use any more, while the workers end their fetch from it."""
    reason: Reason | None = None
    """Why it has ended without its KV."""

    @property
    def is_void(self) -> bool:
        """Whether what is being fetched is no KV of this engine's model any more."""
        return self.lost in OTHER_KV

    def is_at(self, source: Source) -> bool:
        """Whether it is this source's turn, of whichever incarnation."""
        ours = self.source
        return (ours.handoff_id, ours.address) == (source.handoff_id, source.address)

    def follow(self, state: AttemptState) -> None:
        """Go on to a state."""
        assert state in ATTEMPTS[self.state], (self.state, state)
        self.state = state

    def end(self, reason: Reason) -> None:
        """Nothing comes of it."""
        self.follow(AttemptState.ENDED)
        self.reason = reason


@dataclasses.dataclass(frozen=True, slots=True)
class Allocation:
    """Which of its tokens are to come from elsewhere, and vLLM's blocks."""

    tokens: range
    blocks: BlockTables


@dataclasses.dataclass(slots=True, eq=False)
class ConsumingRequest:
    """One request.

    sources: where the KV may be, in the order in which they are tried.
    """

    request: Request
    sources: tuple[Source, ...]
    codec: CodecChoice = CodecChoice()
    seeds: bool = False
    """It is to go on after the token that the producer has sampled."""
    prompt: PromptFingerprint | None = None
    """None where nothing is fetched."""
    stage: Stage = Stage.TRYING
    attempt: Attempt | None = None
    """The latest; None while there was none."""
    num_tokens: int = 0
    """How many were offered first."""
    missing: int = 0
    """How many of them this engine lacked when it was last asked."""
    allocation: Allocation | None = None
    """None while it has no blocks to fetch into."""
    lossy: Codec = Codec.RAW
    """The narrowest codec that its hashes in the prefix cache tell of."""
    plain_tokens: int = 0
    """Of so many tokens at the beginning the hashes do not tell of it."""

    def follow(self, stage: Stage) -> None:
        """Go on to a stage."""
        assert stage in STAGES[self.stage], (self.stage, stage)
        self.stage = stage

    def begin_attempt(self) -> Attempt:
        """Turn to the next source."""
        number = 0 if self.attempt is None else self.attempt.number + 1
        is_last = number == len(self.sources) - 1
        self.attempt = Attempt(self.sources[number], number, is_last)
        return self.attempt

    def fail(self, reason: Reason) -> None:
        """Nothing comes of any attempt."""
        self.follow(Stage.FAILED)
        if self.attempt is not None and self.attempt.state is not AttemptState.ENDED:
            self.attempt.end(reason)

    def is_at(self, state: AttemptState) -> bool:
        """Whether an attempt is under way and has come so far."""
        attempt = self.attempt if self.stage is Stage.TRYING else None
        return attempt is not None and attempt.state is state

    def describe_fetch(self) -> FetchSpec:
        """Return what the workers are to fetch now."""
        attempt, allocation = self.attempt, self.allocation
        assert attempt is not None
        assert allocation is not None
        return FetchSpec(
            self.request.request_id,
            (Segment(allocation.tokens, attempt.source),),
            allocation.blocks,
            attempt.number,
            attempt.is_last,
            self.codec,
            self.seeds,
        )

    def look_for_lossy(self, provenance: Provenance | None) -> bool:
        """Where it allows a lossy codec, let it find what came through one before; say whether
        there is such."""
        allows = self.codec.codec is not Codec.RAW and self.codec.narrowest is not Codec.RAW
        if provenance is None or not allows or self.lossy is not Codec.RAW:
            return False
        self.lossy, self.plain_tokens = provenance.look_for(self.request, self.codec)
        return self.lossy is not Codec.RAW

    def note_codec(self, provenance: Provenance | None, codec: Codec) -> None:
        """KV has arrived that vLLM is about to cache."""
        if codec is Codec.RAW:
            return
        assert provenance is not None
        assert self.allocation is not None
        first_token = self.allocation.tokens.start
        # A plain prefix that was there may have been evicted since, and fetched with the rest.
        if codec.rank <= self.lossy.rank and first_token >= self.plain_tokens:
            return
        provenance.arrived(self.request, first_token, codec)
        self.lossy, self.plain_tokens = codec, first_token

    def seed(self, sampled: int) -> None:
        """Begin after the producer's token; it has not been scheduled yet."""
        request = self.request
        # vLLM must take it for a part of the prompt; what is sampled next is the first output.
        assert request.prompt_token_ids is not None
        request.prompt_token_ids.append(sampled)
        request._all_token_ids.append(sampled)
        request.num_prompt_tokens += 1
        request.update_block_hashes()


@dataclasses.dataclass(frozen=True, slots=True)
class FetchOrders:
    """What the workers are to do; see ``metadata.StepMetadata``."""

    fetches: tuple[FetchSpec, ...]
    refused: tuple[RequestId, ...]
    cancels: dict[RequestId, Reason]
