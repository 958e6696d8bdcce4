"""One try at a client's request over one route: its legs, and what they have given out."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_pd_plugin.frontend.requests.legs import Leg, LegKind

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.metrics.stats import PrefillStats

    from vllm_pd_plugin.frontend.routing.choice import EngineKey, Route


class Novelty(enum.Enum):
    """What an output has that the client has not got from an attempt before."""

    SOME = enum.auto()
    NONE = enum.auto()
    DIFFERS = enum.auto()
    """It is not what the client has got."""


@dataclasses.dataclass(slots=True, eq=False)
class Attempt:
    """One try.

    number: from 1. seeds: the decode engine goes on after the prefill engine's token.
    to_repeat: how many tokens are still to come that the client has got before.
    """

    number: int
    route: Route
    seeds: bool
    to_repeat: int
    prefill_failed: bool = False
    """The prefill engine has said so of its own part, and the decode engine deals with it."""
    prefill_stats: PrefillStats | None = None
    _prefill: Leg | None = None
    _answering: Leg | None = None
    """The leg whose tokens are the answer: the decode engine's, or that of one engine alone."""
    _held: list[EngineCoreOutput] = dataclasses.field(default_factory=list)
    """What the decode engine gave out before the prefill engine's token came."""

    @property
    def legs(self) -> list[Leg]:
        """Return what is under way."""
        return [leg for leg in (self._prefill, self._answering) if leg is not None]

    @property
    def prefills(self) -> bool:
        """Whether an engine computes the prompt for another one."""
        return self._prefill is not None

    @property
    def decodes(self) -> bool:
        """Whether the decode engine has given something out: the handoff is over."""
        leg = self._answering
        return leg is not None and leg.kind is LegKind.DECODE and leg.has_output

    @property
    def waits_for_token(self) -> bool:
        """Whether what the decode engine gives out comes too early."""
        return self.seeds and self._prefill is not None

    def needs(self, engine: EngineKey) -> bool:
        """Whether it cannot go on without an engine that has no leg any more: it had sampled its
        token, but the decode engine may not have all KV yet."""
        handed_off = self.route.prefill == engine and self._answering is not None
        return handed_off and not self.decodes

    def begin(self, leg: Leg) -> None:
        if leg.kind is LegKind.PREFILL:
            self._prefill = leg
        else:
            self._answering = leg

    def has(self, leg: Leg) -> bool:
        """Whether a leg is under way, and not one of an attempt before."""
        return leg is self._answering or leg is self._prefill

    def end(self, leg: Leg) -> None:
        """A leg is over."""
        if leg is self._prefill:
            self._prefill = None
        else:
            self._answering = None

    def end_all(self) -> list[Leg]:
        """Nothing more comes of it; return the legs that were under way."""
        legs, self._held = self.legs, []
        self._prefill = self._answering = None
        return legs

    def hold(self, output: EngineCoreOutput) -> None:
        """Keep what comes too early."""
        self._held.append(output)

    def take_held(self) -> list[EngineCoreOutput]:
        """Return what was kept."""
        held, self._held = self._held, []
        return held

    def cut_known(self, output: EngineCoreOutput, sent: Sequence[int]) -> Novelty:
        """Take away from an output what the client has got already; while that is to be repeated.

        sent: all of that, from the first token on.
        """
        start = len(sent) - self.to_repeat
        known = min(self.to_repeat, len(output.new_token_ids))
        if output.new_token_ids[:known] != list(sent[start : start + known]):
            return Novelty.DIFFERS
        self.to_repeat -= known
        if self.to_repeat and output.finish_reason is not None:
            return Novelty.DIFFERS
        output.new_token_ids = output.new_token_ids[known:]
        if known:
            output.new_sampling_mask = output.routed_experts = None  # they count all tokens
        if output.new_logprobs is not None:
            rows = output.new_logprobs
            output.new_logprobs = rows._replace(
                logprob_token_ids=rows.logprob_token_ids[known:],
                logprobs=rows.logprobs[known:],
                sampled_token_ranks=rows.sampled_token_ranks[known:],
            )
        has_more = bool(output.new_token_ids) or output.finish_reason is not None
        return Novelty.SOME if has_more else Novelty.NONE
