"""Per request: one fetch on one rank of the consumer: its segments, and what they come to.

A ``Fetch`` reads all segments together, each from its own source. What it leaves is a prefix of
the prompt: a segment counts only if all before it are valid. So when one fails for good, those
behind it are given up, while those before it go on; what they bring is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from vllm_pd_plugin.errors import OTHER_KV, Reason
from vllm_pd_plugin.transfer.reading import Arrived, OpenReading, Reading
from vllm_pd_plugin.transfer.specs import FetchResult, FetchSpec


class Fetch:
    """One fetch. It knows of its sources only what a ``Reading`` says.

    attend: lets something happen to a fetch, and looks when it is to be polled next.
    on_end: called once, when nothing writes to its blocks any more.
    """

    def __init__(
        self,
        spec: FetchSpec,
        open_reading: OpenReading,
        clock: Callable[[], float],
        attend: Callable[[Fetch, Callable[[], None]], None],
        on_end: Callable[[Fetch, FetchResult], None],
    ) -> None:
        self.spec = spec
        self.result: FetchResult | None = None
        """None while it is under way."""
        self._clock = clock
        self._attend = attend
        self._on_end = on_end
        self._started_at = clock()
        self._is_last = spec.is_last
        self._is_faulty = False
        self.readings: list[Reading] = [
            open_reading(spec, segment, self) for segment in spec.segments
        ]
        """The latest attempt at each segment."""
        self._open = list(self.readings)
        """Those of them that have not ended."""
        self._reasons: list[Reason] = []
        """Why segments could not be had, the first first."""

    # --- what its plane asks of it -----------------------------------------------------------

    def begin(self) -> None:
        for reading in self._under_way():
            reading.begin()

    def poll(self) -> None:
        for reading in self._under_way():
            reading.poll()

    def wait_s(self) -> float:
        """Return for how many seconds ``poll`` has nothing to do."""
        return min(reading.wait_s() for reading in self._open)

    def fail(self, reason: Reason) -> None:
        """End, once nothing writes to its blocks any more."""
        for reading in self._under_way():
            reading.give_up(reason)

    def refuse(self) -> None:
        """The same, and nothing more comes of its request."""
        self._is_last = True
        self.fail(Reason.INTERNAL)

    def give_up(self) -> None:
        """It could not be driven: it ends; at once where it could not even be told so."""
        if not self._is_faulty:
            self._is_faulty = True
            self.fail(Reason.INTERNAL)
            return
        for reading in self._under_way():
            reading.cut_off()

    def _under_way(self) -> Iterator[Reading]:
        """Go through what has not ended; what is done to one may end another."""
        for reading in self._open.copy():
            if reading in self._open:
                yield reading

    # --- what its readings tell it -----------------------------------------------------------

    def attend(self, act: Callable[[], None]) -> None:
        self._attend(self, act)

    def reading_ended(self, reading: Reading, reason: Reason | None) -> None:
        place = self.readings.index(reading)
        self._open.remove(reading)
        if reason is not None:
            if (another := reading.again()) is not None:
                self.readings[place] = another
                self._open.append(another)
                another.begin()
                return
            self._reasons.append(reason)
            for behind in self.readings[place + 1 :]:
                if behind in self._open:
                    behind.give_up(Reason.CANCELLED)
        if not self._open and self.result is None:  # else one behind it has been the last
            self._end()

    # --- ending ------------------------------------------------------------------------------

    def _end(self) -> None:
        arrived = Arrived.together(reading.arrived for reading in self.readings)
        self.result = FetchResult(
            self.spec.request_id,
            self._reasons[0] if self._reasons else None,
            arrived.counts,
            arrived.codec,
            self._clock() - self._started_at,
            0 if OTHER_KV.intersection(self._reasons) else self._valid_tokens(),
            self.spec.attempt,
            self._is_last,
            arrived.sampled,
            arrived.lacks_tokens,
        )
        self._on_end(self, self.result)

    def _valid_tokens(self) -> int:
        """How many of the prompt's first tokens have usable KV."""
        valid = 0
        for segment, reading in zip(self.spec.segments, self.readings, strict=True):
            valid = max(valid, reading.valid_tokens)
            if reading.valid_tokens < segment.tokens.stop:
                break
        return valid
