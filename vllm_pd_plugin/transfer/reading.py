"""What a fetch knows of a source of KV: how a segment is read from it.

``peer_reading`` has how that is done with a peer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Protocol

from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.transfer.specs import FetchCounts, FetchSpec, Segment


@dataclasses.dataclass(frozen=True, slots=True)
class Arrived:
    """What has been read, whether or not it can be used.

    codec: the narrowest that it came through.
    sampled: the token that the producer sampled after the prompt; None until that is known.
    lacks_tokens: see ``FetchResult``.
    """

    counts: FetchCounts
    codec: Codec
    sampled: int | None
    lacks_tokens: bool = False

    @classmethod
    def together(cls, parts: Iterable[Arrived]) -> Arrived:
        """Return what several readings have brought, in the order of their segments."""
        arrived = cls(FetchCounts(), Codec.RAW, None)
        for part in parts:
            codec = max(arrived.codec, part.codec, key=lambda codec: codec.rank)
            lacks = arrived.lacks_tokens or part.lacks_tokens
            arrived = cls(arrived.counts + part.counts, codec, part.sampled, lacks)
        return arrived


class Reading(Protocol):
    """One attempt to read a segment from its source, until it ends: well, when all of the segment
    is valid, or with a reason. It tells its fetch once, when nothing writes to the blocks any more.
    """

    def begin(self) -> None: ...

    def poll(self) -> None:
        """Go on with what has ended, and with what is due."""

    def wait_s(self) -> float:
        """Return for how many seconds ``poll`` has nothing to do."""

    def give_up(self, reason: Reason) -> None:
        """End for a reason, once nothing writes to the blocks any more; one that is about to end
        already does so for its own."""

    def cut_off(self) -> None:
        """End at once, whatever else that ends."""

    def again(self) -> Reading | None:
        """Return the attempt that takes the place of this one, which has ended with a reason; None
        where that is final."""

    @property
    def arrived(self) -> Arrived: ...

    @property
    def valid_tokens(self) -> int:
        """How many of the prompt's first tokens have usable KV, whatever becomes of the rest, if
        those before the segment have; 0 while there are none in the segment."""


class ReadingOwner(Protocol):
    """The fetch that a reading belongs to."""

    def attend(self, act: Callable[[], None]) -> None:
        """Let something happen to the reading that its fetch has not asked for."""

    def reading_ended(self, reading: Reading, reason: Reason | None) -> None: ...


OpenReading = Callable[[FetchSpec, Segment, ReadingOwner], Reading]
"""Makes the first attempt at a segment, which has not begun."""
