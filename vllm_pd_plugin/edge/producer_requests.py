"""Requests of this engine whose KV is to be handed off, as vLLM's scheduler sees them: they hold
the exports of their prompts' KV.

Owned by the engine's own thread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from vllm.v1.request import RequestStatus

from vllm_pd_plugin.containment import Containment
from vllm_pd_plugin.edge.metrics import PdStats
from vllm_pd_plugin.edge.prompts import PromptFingerprint
from vllm_pd_plugin.errors import ParamsError
from vllm_pd_plugin.ids import HandoffId, RequestId, new_handoff_id
from vllm_pd_plugin.memory.layout import RankLayout, RankMemory
from vllm_pd_plugin.protocol.control import CallControl
from vllm_pd_plugin.protocol.events import Abandoned, Released
from vllm_pd_plugin.protocol.export_states import ExportState
from vllm_pd_plugin.protocol.params import parse_handoff_id
from vllm_pd_plugin.protocol.steps import Advance
from vllm_pd_plugin.transfer.announcer import Announcement, layers_worth_a_message

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.request import Request

    from vllm_pd_plugin.edge.identity import AdapterFingerprints

_HANDED_OFF = (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)


@dataclasses.dataclass(slots=True, eq=False)
class _Producing:
    """epoch: the request's preemptions that the control thread knows of.
    ending: how the handoff ends when the request does, if it is not sealed.
    """

    request: Request
    handoff_id: HandoffId
    epoch: int = 0
    ending: ExportState = ExportState.CANCELLED


@dataclasses.dataclass(frozen=True, slots=True)
class SealedHandoff:
    """A handoff whose request has ended well; its blocks are held."""

    handoff_id: HandoffId
    num_tokens: int


class ProducingRequests:
    """Which requests hand off, and how far each is. The control thread has their exports, and says
    when blocks may be freed (``released``) and when a request is for nothing (``abandoned``).

    stretch_bytes: see ``PdConfig``.
    """

    def __init__(
        self,
        stretch_bytes: int,
        call: CallControl,
        stats: PdStats,
        adapters: AdapterFingerprints | None = None,
        new_id: Callable[[], HandoffId] = new_handoff_id,
    ) -> None:
        self._contain = Containment("producing")
        self._new_id = new_id
        self._adapters = adapters
        self._stretch_bytes = stretch_bytes
        self._call = call
        self._stats = stats
        self._open: dict[RequestId, _Producing] = {}
        self._started: dict[RequestId, _Producing] = {}
        """Those of them that have been scheduled: as many as vLLM runs, however many wait."""
        self._by_handoff: dict[HandoffId, _Producing] = {}
        self._sealed: set[RequestId] = set()
        self._released: list[RequestId] = []
        self._abandoned: list[RequestId] = []
        self._step = 0
        self._kv_cache_manager: KVCacheManager

    def bind(self, kv_cache_manager: KVCacheManager) -> None:
        """Take what tells the block tables of running requests."""
        self._kv_cache_manager = kv_cache_manager

    def describe(self, stages: Sequence[tuple[RankLayout, RankMemory]]) -> None:
        """Take what decides how much KV a token has, on one rank of each pipeline stage."""
        self._num_layers = [len(layout.layers) for layout, _ in stages]
        self._has_windows = any(group.window is not None for group in stages[0][0].groups)
        self._layer_bytes_per_token = [
            _bytes_per_token(*stage) / max(1, len(stage[0].layers)) for stage in stages
        ]

    def __len__(self) -> int:
        return len(self._open) + len(self._sealed)

    @property
    def faults(self) -> int:
        """How many were caught; see ``Containment``."""
        return self._contain.faults

    @property
    def holds_blocks(self) -> bool:
        """Whether there are blocks of requests that have ended."""
        return bool(self._sealed)

    def choose_id(self, request: Request) -> HandoffId | None:
        """Return the id of what the request is to hand off; None when another does that: the
        choices of one request (``n`` > 1) have the same parameters.

        Raises:
            ParamsError: the chosen id is malformed, or in use for another prompt.
        """
        handoff_id = parse_handoff_id(request.kv_transfer_params)
        leader = self._by_handoff.get(handoff_id) if handoff_id else None
        if leader is not None:
            if leader.request.prompt_token_ids != request.prompt_token_ids:
                raise ParamsError(f"handoff_id={handoff_id} is in use for another prompt")
            return None
        return handoff_id or self._new_id()

    def add(self, request: Request, handoff_id: HandoffId) -> None:
        """The request has arrived."""
        request_id, num_tokens = request.request_id, request.num_prompt_tokens
        self._open[request_id] = self._by_handoff[handoff_id] = _Producing(request, handoff_id)
        prompt = PromptFingerprint(request, self._adapters)
        self._call(
            lambda control: control.enqueue(
                handoff_id, request_id, num_tokens, prompt.of(num_tokens)
            )
        )

    def scheduled(self, request_id: RequestId) -> None:
        """The request has blocks; the first time it starts to produce."""
        producing = self._open.get(request_id)
        if producing is None or request_id in self._started:
            return
        self._started[request_id] = producing
        handoff_id = producing.handoff_id
        self._call(lambda control: control.open(handoff_id))

    def advance(self, num_scheduled_tokens: Mapping[RequestId, int]) -> Announcement | None:
        """Tell the control thread what becomes of the handoffs in this step; return what the
        workers are to announce."""
        advances: list[Advance] = []

        def advance(producing: _Producing) -> None:
            request = producing.request
            scheduled = num_scheduled_tokens[request.request_id]
            start, end = request.num_computed_tokens, request.num_prompt_tokens
            if scheduled and (start < end or self._has_windows):
                num_tokens = min(start + scheduled, end)
                blocks = self._kv_cache_manager.get_block_ids(request.request_id)
                after = self._after_layers(max(0, num_tokens - start))
                handoff_id, epoch = producing.handoff_id, producing.epoch
                advances.append(Advance(handoff_id, epoch, num_tokens, blocks, after))

        scheduled = [p for i in num_scheduled_tokens if (p := self._open.get(i)) is not None]
        self._contain.each("advancing", self._started.values(), self._withdraw, self._break_off)
        self._contain.each("advancing", scheduled, advance, self._break_off)
        if not advances:
            return None
        self._step += 1
        step = self._step
        self._call(lambda control: control.advance(step, advances))
        of_stages = zip(*(advance.after_layers for advance in advances), strict=True)
        together = (set().union(*numbers) for numbers in of_stages)
        return Announcement(step, tuple(tuple(sorted(numbers)) for numbers in together))

    def _after_layers(self, num_tokens: int) -> tuple[tuple[int, ...], ...]:
        """Return when a consumer is told in a step that computes so many tokens of its prompt, for
        each pipeline stage."""
        return tuple(
            layers_worth_a_message(number, int(num_tokens * size), self._stretch_bytes)
            for number, size in zip(self._num_layers, self._layer_bytes_per_token, strict=True)
        )

    def finish(self, request: Request, blocks: Sequence[list[int]]) -> SealedHandoff | None:
        """The request has ended; returns the handoff whose blocks are to be held, if any."""
        request_id = request.request_id
        producing = self._open.pop(request_id, None)
        if producing is None:
            return None
        handoff_id = producing.handoff_id
        self._started.pop(request_id, None)
        self._by_handoff.pop(handoff_id, None)
        if request.status not in _HANDED_OFF or not any(blocks):
            self._call(lambda control: control.drop(handoff_id))
            self._stats.record_ended(producing.ending)
            return None
        num_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
        sampled = next(iter(request.output_token_ids), None)
        self._call(
            lambda control: control.seal(handoff_id, request_id, num_tokens, blocks, sampled)
        )
        self._sealed.add(request_id)
        return SealedHandoff(handoff_id, num_tokens)

    def released(self, event: Released) -> None:
        """The blocks of a request that has ended may be freed."""
        if event.request_id not in self._sealed:  # vLLM has freed them already
            return
        self._sealed.discard(event.request_id)
        self._released.append(event.request_id)
        self._stats.record_ended(event.state)

    def abandoned(self, event: Abandoned) -> None:
        """Nobody wants what a request is computing."""
        self._abandoned.append(event.request_id)
        if producing := self._open.get(event.request_id):
            producing.ending = event.state

    def take_released(self) -> tuple[RequestId, ...]:
        released, self._released = tuple(self._released), []
        return released

    def take_abandoned(self) -> list[RequestId]:
        abandoned, self._abandoned = self._abandoned, []
        return abandoned

    def _break_off(self, producing: _Producing) -> None:
        """It is not known where its KV lies: the handoff is over, and so is its request."""
        handoff_id = producing.handoff_id
        self._call(lambda control: control.drop(handoff_id))
        self._abandoned.append(producing.request.request_id)

    def _withdraw(self, producing: _Producing) -> None:
        """Where its request was preempted, what was announced is no longer true."""
        handoff_id, epoch = producing.handoff_id, producing.request.num_preemptions
        if epoch == producing.epoch:
            return
        producing.epoch = epoch
        self._call(lambda control: control.withdraw(handoff_id, epoch))
        self._stats.record_withdrawal()


def _bytes_per_token(layout: RankLayout, memory: RankMemory) -> float:
    """Return how much KV one token has on one rank, in all layers."""
    groups = [group for group in layout.groups for _ in group.layers]
    pairs = zip(memory.regions, groups, strict=True)
    return sum(region.block_bytes / group.block_tokens for region, group in pairs)
