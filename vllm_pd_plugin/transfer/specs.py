"""Per request: what a consumer's scheduler tells its worker ranks to fetch, and how it went.

    CONNECTING -> FETCHING -> (CHECKING ->) COMMITTING -> ended, well or with a reason

What has been read is used only after a commit was granted.
"""

from __future__ import annotations

import dataclasses
import enum

from vllm_pd_plugin.codecs.codec import Codec, CodecChoice
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.ids import RequestId, Source
from vllm_pd_plugin.memory.layout import BlockTables
from vllm_pd_plugin.net.transport import ReadPlan


class FetchState(enum.Enum):
    CONNECTING = "connecting"
    FETCHING = "fetching"
    CHECKING = "checking"
    """Everything has been read; the producer's digest of it is awaited."""
    COMMITTING = "committing"
    DRAINING = "draining"
    """Failed, but a read may still write: the blocks must be kept until it has ended."""
    ENDED = "ended"


@dataclasses.dataclass(frozen=True, slots=True)
class FetchSpec:
    """What a worker rank is told to fetch.

    The consumer has KV for tokens [0, first_token) and wants [0, num_tokens) in ``blocks``.
    attempt: how many sources were tried before this one.
    is_last: whether there is no other source to turn to when this one fails.
    codec: how it is to be written down.
    seeds: whether it is of use only together with the token that the producer samples.
    """

    request_id: RequestId
    source: Source
    first_token: int
    num_tokens: int
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


@dataclasses.dataclass(frozen=True, slots=True)
class FetchResult:
    """How a fetch ended on one rank. ``reason`` is None when the KV is committed and usable.

    counts, codec: what was read for it, and how it was written down.
    seconds: from the worker's first knowledge of the fetch to its end.
    valid_tokens: length of the prompt's prefix whose KV is usable all the same, when it failed.
    attempt, is_last: those of the ``FetchSpec``.
    sampled: the token that the producer sampled after the prompt; None until it was sealed.
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

    @property
    def is_final(self) -> bool:
        """Whether nothing more comes of this request."""
        return self.reason is None or self.is_last
