"""What a frontend has under way on one engine, added up as it comes and goes.

A route looks at every engine, so that nothing there may take longer the more is under way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from vllm_pd_plugin.frontend.requests.legs import Leg, LegKind


@dataclasses.dataclass(frozen=True, slots=True)
class Share:
    """This frontend's part in what an engine has to do.

    waiting_tokens: of prompts that it still has to compute, cached or not: so engines count them,
    too, before they begin. requests: all that it works on.
    kv_tokens: of the prompts of these, whose KV it holds or will hold. running: requests whose
    answers it writes, or will.
    """

    waiting_tokens: int = 0
    requests: int = 0
    kv_tokens: int = 0
    running: int = 0


class Work:
    """The legs on an engine; its length is their number. version: another one after a change."""

    def __init__(self) -> None:
        self.version = 0
        self._legs: set[Leg] = set()
        self._uncomputed: set[Leg] = set()
        self._waiting_tokens = self._kv_tokens = self._running = 0
        self.to_compute = 0
        """Prompt tokens that are to be computed there, as far as they are not cached."""

    def __len__(self) -> int:
        return len(self._legs)

    def __iter__(self) -> Iterator[Leg]:
        return iter(self._legs)

    @property
    def share(self) -> Share:
        return Share(self._waiting_tokens, len(self._legs), self._kv_tokens, self._running)

    def share_without(self, legs: Iterable[Leg]) -> Share:
        """Return what the share would be if some of the legs had not begun."""
        left = [leg for leg in legs if leg in self._legs]
        return Share(
            self._waiting_tokens - sum(leg.num_tokens for leg in left if leg in self._uncomputed),
            len(self._legs) - len(left),
            self._kv_tokens - sum(leg.num_tokens for leg in left),
            self._running - sum(leg.kind is not LegKind.PREFILL for leg in left),
        )

    def add(self, leg: Leg) -> None:
        """A leg begins."""
        if leg in self._legs:
            return
        self.version += 1
        self._legs.add(leg)
        self._kv_tokens += leg.num_tokens
        self._running += leg.kind is not LegKind.PREFILL
        if leg.kind is not LegKind.DECODE and not leg.has_output:
            self._uncomputed.add(leg)
            self._waiting_tokens += leg.num_tokens
            self.to_compute += leg.to_compute

    def computed(self, leg: Leg) -> None:
        """A leg's prompt is computed."""
        if leg in self._uncomputed:
            self.version += 1
            self._uncomputed.remove(leg)
            self._waiting_tokens -= leg.num_tokens
            self.to_compute -= leg.to_compute

    def discard(self, leg: Leg) -> None:
        """A leg is over."""
        if leg not in self._legs:
            return
        self.computed(leg)
        self.version += 1
        self._legs.remove(leg)
        self._kv_tokens -= leg.num_tokens
        self._running -= leg.kind is not LegKind.PREFILL

    def clear(self) -> None:
        """The engine is gone."""
        for leg in list(self._legs):
            self.discard(leg)
