"""Sources of KV that do as they are told, behind the protocol that a fetch knows."""

from __future__ import annotations

import dataclasses
import math

from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.errors import Reason
from vllm_pd_plugin.transfer.reading import Arrived, Reading, ReadingOwner
from vllm_pd_plugin.transfer.specs import FetchCounts, FetchSpec, Segment


@dataclasses.dataclass(eq=False)
class FakeReading:
    """An attempt that goes on when the test says so.

    writes: it ends only when the test says so, once it was given up.
    successor: what takes its place when it has ended with a reason.
    """

    segment: Segment
    owner: ReadingOwner
    arrived: Arrived = dataclasses.field(
        default_factory=lambda: Arrived(FetchCounts(), Codec.RAW, None)
    )
    valid_tokens: int = 0
    writes: bool = False
    fails_at_once: Reason | None = None
    successor: Reading | None = None
    poll_in_s: float = math.inf
    begun: int = 0
    polled: int = 0
    given_up: list[Reason] = dataclasses.field(default_factory=list)
    is_cut_off: bool = False

    def begin(self) -> None:
        self.begun += 1
        if self.fails_at_once is not None:
            self.fail(self.fails_at_once)

    def poll(self) -> None:
        self.polled += 1

    def wait_s(self) -> float:
        return self.poll_in_s

    def give_up(self, reason: Reason) -> None:
        self.given_up.append(reason)
        if not self.writes:
            self.fail(self.given_up[0])

    def cut_off(self) -> None:
        self.is_cut_off = True
        self.fail(Reason.INTERNAL)

    def again(self) -> Reading | None:
        return self.successor

    # --- what a test does to it

    def succeed(self) -> None:
        self.valid_tokens = self.segment.tokens.stop
        self.owner.reading_ended(self, None)

    def fail(self, reason: Reason) -> None:
        self.owner.reading_ended(self, reason)


class FakeSources:
    """Opens a ``FakeReading`` for each segment."""

    def __init__(self) -> None:
        self.opened: list[FakeReading] = []

    def open(self, spec: FetchSpec, segment: Segment, owner: ReadingOwner) -> FakeReading:
        reading = FakeReading(segment, owner)
        self.opened.append(reading)
        return reading
