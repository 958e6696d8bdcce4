"""How fast things have gone with one peer, and what follows from that for the next; pure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

from vllm_pd_plugin.codecs.codec import Codec

_HALF_LIFE_S = 60.0
_ENOUGH_SAMPLES = 3
_TRY_AGAIN = 256
_WORTH_IT = 4.0
_MUCH_SOONER, _SOONER_S = 0.9, 0.005


class Rate:
    """Amount a second over what was observed of late: what is older counts less."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._at = clock()
        self._amount = self._seconds = 0.0
        self.samples = 0

    def add(self, amount: float, seconds: float) -> None:
        now = self._clock()
        kept = 0.5 ** ((now - self._at) / _HALF_LIFE_S)
        self._at = now
        self._amount = kept * self._amount + amount
        self._seconds = kept * self._seconds + seconds
        self.samples += 1

    @property
    def value(self) -> float | None:
        """None while nothing has been observed."""
        return self._amount / self._seconds if self._seconds > 0 else None


class PeerRates:
    """What was observed with one peer.

    link: bytes a second that reads move.
    prefill: bytes of KV a second that become final while it computes a prompt.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.link = Rate(clock)
        self.prefill = Rate(clock)
        self._ways: dict[tuple[bool, int], Rate] = {}
        self._chosen = 0

    def moved(self, packed: bool, descriptor_bytes: float, num_bytes: int, seconds: float) -> None:
        """So many bytes have arrived, by a read from block to block or packed.

        descriptor_bytes: how long the runs of blocks are on average, read as they lie.
        """
        self._way(packed, descriptor_bytes).add(num_bytes, seconds)

    def prefers_packing(self, descriptor_bytes: float) -> bool:
        """Say whether packing has been faster for blocks that lie as scattered as these.

        Either way is tried a few times first, and the slower one again now and then.
        """
        packed, direct = (self._way(way, descriptor_bytes) for way in (True, False))
        for way in (direct, packed):
            if way.samples < _ENOUGH_SAMPLES:
                return way is packed
        self._chosen += 1
        faster = (packed.value or 0.0) > (direct.value or 0.0)
        return faster != (self._chosen % _TRY_AGAIN == 0)

    def _way(self, packed: bool, descriptor_bytes: float) -> Rate:
        key = (packed, round(math.log2(max(1.0, descriptor_bytes))))
        if key not in self._ways:
            self._ways[key] = Rate(self._clock)
        return self._ways[key]


@dataclasses.dataclass(frozen=True, slots=True)
class Prospect:
    """What is known of a handoff when its codec is chosen; times are in seconds, rates in bytes a
    second, of KV as it is in the cache unless said otherwise.

    kv_bytes: all of it. sizes: what each codec makes of that.
    link: None while it is not known.
    prefill: None when the KV is there already, or its rate is not known.
    coding: rate of writing down and reading back, for each lossy codec, the widest first.
    stretches: how many reads it will take, about.
    """

    kv_bytes: int
    sizes: Mapping[Codec, int]
    link: float | None
    prefill: float | None
    coding: Mapping[Codec, float]
    stretches: int

    def finish_s(self, codec: Codec) -> float:
        """Return when the last byte is in place: the slowest of computing, coding and moving sets
        the pace, and the last stretch is coded and moved after that."""
        assert self.link is not None
        move_s = self.sizes[codec] / self.link
        code_s = 0.0 if codec is Codec.RAW else self.kv_bytes / self.coding[codec]
        ready_s = self.kv_bytes / self.prefill if self.prefill else 0.0
        return max(ready_s, move_s, code_s) + (move_s + code_s) / self.stretches


def choose_codec(prospect: Prospect, narrowest: Codec) -> Codec:
    """Return the widest codec that finishes about as soon as any up to ``narrowest``.

    Where the link is unknown, or moves bytes nearly as fast as they can be coded (shared memory),
    that is raw: precision is given up for a gain that shows only.
    """
    if prospect.link is None:
        return Codec.RAW
    least = _WORTH_IT * prospect.link
    lossy = (c for c in prospect.coding if c.rank <= narrowest.rank)
    allowed = [Codec.RAW, *(codec for codec in lossy if prospect.coding[codec] >= least)]
    soonest = min(map(prospect.finish_s, allowed))
    return next(c for c in allowed if _MUCH_SOONER * prospect.finish_s(c) <= soonest + _SOONER_S)
