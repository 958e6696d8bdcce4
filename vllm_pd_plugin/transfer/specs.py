"""Per request: what a consumer's scheduler tells its worker ranks to fetch, and how it went.

A fetch is a list of segments. What has been read of one is used only when its source has said that
it is valid; a peer says so by granting a commit.
"""

from __future__ import annotations

import dataclasses

from vllm_pd_plugin.codecs.codec import Codec, CodecChoice
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import RequestId, Source
from vllm_pd_plugin.memory.layout import BlockTables
from vllm_pd_plugin.net.transport import ReadPlan


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a prompt's tokens, and who has their KV.

    A segment that does not end where the prompt ends does so at the border of a block.
    """

    tokens: range
    source: Source


@dataclasses.dataclass(frozen=True, slots=True)
class FetchSpec:
    """What a worker rank is told to fetch.

    segments: in the order of the prompt, without a gap. The consumer has KV for the tokens before
        the first, and wants that of all up to the end of the last in ``blocks``.
    attempt: how many sources were tried before this one.
    is_last: whether there is no other source to turn to when this one fails.
    codec: how it is to be written down.
    seeds: whether it is of use only together with the token that the producer samples.
    """

    request_id: RequestId
    segments: tuple[Segment, ...]
    blocks: BlockTables
    attempt: int = 0
    is_last: bool = True
    codec: CodecChoice = CodecChoice()
    seeds: bool = False


@dataclasses.dataclass(slots=True)
class FetchCounts:
    """What was read for a fetch.

    wire_bytes: that reads moved. kv_bytes: that it takes in the cache.
    stretches: reads that were posted. packed: those of packed pieces.
    """

    wire_bytes: int = 0
    kv_bytes: int = 0
    descriptors: int = 0
    stretches: int = 0
    packed: int = 0

    def posted(self, plan: ReadPlan, kv_bytes: int, is_packed: bool) -> None:
        self.wire_bytes += plan.total_bytes
        self.kv_bytes += kv_bytes
        self.descriptors += plan.num_descriptors
        self.stretches += 1
        self.packed += is_packed

    def __add__(self, other: FetchCounts) -> FetchCounts:
        return FetchCounts(
            self.wire_bytes + other.wire_bytes,
            self.kv_bytes + other.kv_bytes,
            self.descriptors + other.descriptors,
            self.stretches + other.stretches,
            self.packed + other.packed,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class FetchResult:
    """How a fetch ended on one rank. ``reason`` is None when the KV is committed and usable.

    counts, codec: what was read for it, and how it was written down.
    seconds: from the worker's first knowledge of the fetch to its end.
    valid_tokens: length of the prompt's prefix whose KV is usable all the same, when it failed.
    attempt, is_last: those of the ``FetchSpec``.
    sampled: the token that the producer sampled after the prompt; None until it was sealed.
    lacks_tokens: some blocks have no KV of tokens that the prompt does not look back on: no other
        request may find them.
    """

    request_id: RequestId
    reason: Reason | None
    counts: FetchCounts
    codec: Codec
    seconds: float
    valid_tokens: int
    attempt: int = 0
    is_last: bool = True
    sampled: int | None = None
    lacks_tokens: bool = False

    @property
    def is_final(self) -> bool:
        """Whether nothing more comes of this request."""
        return self.reason is None or self.is_last
